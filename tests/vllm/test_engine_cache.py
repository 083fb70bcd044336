"""The worker's half on an engine's pages; vLLM isn't needed."""

from __future__ import annotations

import random

import pytest
import torch

from adakv.policy import Policy, get
from adakv.vllm.config import Settings
from adakv.vllm.metadata import batch_of
from engine_steps import BLOCK, BUDGET, DIM, GROUP, HEADS, LAYERS, Steps


def run_step(steps: Steps, counts: list[int]) -> None:
    """One step of all requests, and whether it gave what it should."""
    metadata = steps.describe(counts)
    steps.end_prompts()
    step = steps.cache.begin_step(batch_of(metadata))
    for layer in range(LAYERS):
        queries, keys, values = steps.inputs(layer, counts)
        out = torch.full_like(queries, float("nan"))
        steps.cache.attend(layer, step, queries, keys, values, out)
        steps.check(out, layer, counts)
    steps.advance(counts)
    steps.give_back()


def policy(mode: str) -> Policy:
    return Settings(budget=BUDGET, mode=mode).policy_for(BLOCK)


@pytest.mark.parametrize("mode", ["fill", "exact"])
def test_engine_cache_attends_to_what_it_kept(device: torch.device, mode: str):
    """Chunks, drafts that are taken back, requests that come and go, blocks that are used again."""
    rng = random.Random(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    steps = Steps(policy(mode), device, dtype)
    for number in range(45):
        while len(steps.requests) < 4:
            steps.add(rng.choice([5, BUDGET, 100, 140, 161, 250]))
        counts = []
        for request in steps.requests:
            left = request.prompt - request.computed
            counts.append(min(left, rng.randint(1, 90)) if left > 0 else rng.choice([1, 1, 3]))
        run_step(steps, counts)
        for request, count in zip(steps.requests, counts, strict=True):
            if count == 3 and request.boundary and request.computed - 2 > request.boundary:
                request.computed -= 2
        if number % 7 == 6:
            steps.remove(rng.choice(steps.requests))
    assert len(steps.told.planned) > 8 and len(steps.told.entries) > 4


def test_engine_cache_keeps_exactly_the_budget(device: torch.device):
    steps = Steps(policy("exact"), device, torch.float32)
    steps.add(200)
    run_step(steps, [200])
    run_step(steps, [1])
    (request,) = steps.requests
    lengths = steps.cache.lengths[:, request.blocks[0]]
    assert (lengths.sum(1) == HEADS * BUDGET).all()
    assert len(set(lengths.flatten().tolist())) > 1
    assert steps.told.planned == [(request.blocks[0], 200)]
    assert steps.told.entries == [(LAYERS * HEADS * 200, LAYERS * HEADS * BUDGET)]


def test_engine_cache_fills_the_pages_that_it_takes_anyway(device: torch.device):
    lengths = {}
    for mode in ("exact", "fill"):
        torch.manual_seed(0)
        steps = Steps(policy(mode), device, torch.float32)
        steps.add(200)
        run_step(steps, [200])
        run_step(steps, [1])
        lengths[mode] = steps.cache.lengths[:, steps.requests[0].blocks[0]]
    assert torch.equal(lengths["fill"], -(-lengths["exact"] // BLOCK) * BLOCK)


def test_engine_cache_gives_a_preempted_request_a_new_start(device: torch.device):
    steps = Steps(policy("fill"), device, torch.float32)
    request = steps.add(150)
    run_step(steps, [150])
    run_step(steps, [1])
    steps.free += [block for block in request.blocks if block]
    request.blocks, request.computed, request.boundary, request.kept = [], 0, 0, []
    run_step(steps, [100])
    run_step(steps, [51])
    run_step(steps, [1])
    assert [boundary for _, boundary in steps.told.planned] == [150, 151]


def test_engine_cache_changes_nothing_when_the_scheduler_planned_otherwise(device: torch.device):
    steps = Steps(policy("fill"), device, torch.float32)
    steps.add(150)
    run_step(steps, [150])

    def refuse(first_block: int, boundary: int) -> None:
        raise RuntimeError("planned otherwise")

    steps.told.check_planned = refuse
    before = [pages.clone() for pages in steps.cache.pages]
    with pytest.raises(RuntimeError, match="planned otherwise"):
        steps.cache.begin_step(batch_of(steps.describe([1])))
    for pages, was in zip(steps.cache.pages, before, strict=True):
        assert torch.equal(pages.nan_to_num(), was.nan_to_num())


def test_engine_cache_hands_the_output_projection_to_policies_that_read_it(device: torch.device):
    steps = Steps(get("critical_ada_snapkv"), device, torch.float32)
    asked = []

    def w_o(layer: int) -> torch.Tensor:
        asked.append(layer)
        return torch.randn(16, HEADS * GROUP * DIM, device=device)

    steps.cache._w_o = w_o
    steps.add(150)
    metadata = steps.describe([150])
    step = steps.cache.begin_step(batch_of(metadata))
    for layer in range(LAYERS):
        q, k, v = steps.inputs(layer, [150])
        steps.cache.attend(layer, step, q, k, v, torch.empty_like(q))
    steps.advance([150])
    steps.cache.begin_step(batch_of(steps.describe([1])))
    assert asked == list(range(LAYERS))
