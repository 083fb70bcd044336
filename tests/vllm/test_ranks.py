"""Engines of two tensor-parallel ranks on the CPU."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm.v1", reason="vllm isn't installed; make test-vllm runs these tests")

import vllm_two_ranks
from adakv.policy import WholePages
from adakv.vllm.config import Settings
from adakv.vllm.ledger import path_of
from adakv.vllm.plan import plan
from per_rank import PerRank
from vllm_engine import BLOCK, ENVIRONMENT, Compression, engine, random_text, save_llama
from vllm_reference import Reference, comparable

HEADS = 4  # of the model; two on each rank


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"), num_kv_heads=HEADS)


def ran(model: str, settings: Settings, options: dict[str, Any], *more: Any) -> Any:
    """What comes of requests in an engine of two ranks."""
    arguments = [json.dumps(x) for x in (asdict(settings), options, *more[:2])]
    done = subprocess.run(
        [sys.executable, vllm_two_ranks.__file__, model, *arguments, *more[2:]],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert vllm_two_ranks.MARK in done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.split(vllm_two_ranks.MARK)[1].splitlines()[0])


def texts() -> list[list[int]]:
    """Prompts, the last two of which begin as the first one does."""
    rng = random.Random(4)
    prompts = [random_text(rng, length) for length in (300, 70, 205, 40, 60)]
    prompts[3:] = [prompts[0][:130] + prompt for prompt in prompts[3:]]
    return prompts


@pytest.mark.parametrize(
    ("policy", "when", "options"),
    [
        ("ada_snapkv", "always", {"enable_prefix_caching": True}),
        ("model_column_max", "always", {}),
        ("ada_snapkv", "pressure", {"num_gpu_blocks_override": 24, "max_model_len": 640}),
    ],
)
def test_each_rank_keeps_the_best_of_its_own_heads(
    model: str, policy: str, when: Any, options: dict[str, Any]
):
    """Kept rows and tokens are those of transformers with such budgets, of a layer or model-wide;
    also behind a prefix that was found, and under pressure."""
    settings, prompts = Settings(policy, budget=64, when=when), texts()
    new = [40, 30, 50, 20, 35]
    tokens, compressions, preemptions, cached, counts = ran(model, settings, options, prompts, new)
    assert any(cached) == bool(options.get("enable_prefix_caching"))
    assert preemptions == 0 and counts["requests_compressed"] >= 1
    assert bool(counts["compressed_under_pressure"]) == (when == "pressure")
    allocator = WholePages(PerRank(settings.preset.allocator, 2), BLOCK)
    reference = Reference(model, settings, replace(settings.preset, allocator=allocator))
    for prompt, written, found in zip(prompts, tokens, compressions, strict=True):
        compressed = [Compression(b, n, torch.tensor(lengths), at) for b, n, lengths, at in found]
        known = comparable(prompt, written, compressed)
        assert reference.choices(prompt, known, compressed) == known


@pytest.mark.parametrize(
    ("policy", "mode", "options"),
    [
        ("ada_snapkv", "exact", {"enable_prefix_caching": True}),
        ("critical_ada_snapkv", "fill", {}),
    ],
)
def test_budgets_that_cross_ranks_are_those_of_one_rank(
    model: str, policy: str, mode: Any, options: dict[str, Any]
):
    """Two ranks keep what an engine of one does, where each has room for its share."""
    settings, prompts = Settings(policy, budget=64, mode=mode, budgets="all_ranks"), texts()
    new = [40, 30, 50, 20, 35]
    with engine(model, settings, **options) as it:
        alone = it.run(prompts, new)
    tokens, compressions, _, _, counts = ran(model, settings, options, prompts, new)
    assert counts["requests_compressed"] >= 2
    for written, found, one_rank in zip(tokens, compressions, alone.compressions, strict=True):
        assert [x[2] for x in found] == [x.lengths.tolist() for x in one_rank]
        assert len(written) > 0
    assert tokens == alone.tokens
    assert any(
        len(set(map(sum, layer))) > 1
        for found in compressions
        for layer in [[row[:2], row[2:]] for _, _, lengths, _ in found for row in lengths]
    )


@pytest.mark.parametrize("when", ["always", "pressure"])
def test_ranks_whose_budgets_cross_do_not_wait_for_a_request_that_is_aborted(model: str, when: Any):
    """Many requests, half of which are aborted at any time, steps in flight: all others write all
    that they should, and every block is free at the end, which the engine's program checks."""
    rng = random.Random(0)
    prompts = [random_text(rng, rng.randint(90, 220)) for _ in range(12)]
    leave = [(number, rng.randint(1, 20)) for number in range(0, 12, 2)]
    options = {"leave": leave, "num_gpu_blocks_override": 30, "max_model_len": 640}
    options |= {"runs_ahead": True, "max_num_batched_tokens": 128}
    settings = Settings(budget=40, when=when, budgets="all_ranks")
    tokens, _, _, _, counts = ran(model, settings, options, prompts, 8)
    assert all(len(text) == 8 for text in tokens[1::2])
    assert counts["requests_compressed"] >= 2


def test_ranks_share_blocks_of_codes(model: str):
    """As many entries are kept as planned; every block is free at the end, which the engine's
    program checks."""
    settings, prompts = Settings(budget=64, kv_dtype="int8"), texts()
    options = {"dtype": "bfloat16"}
    tokens, _, _, _, counts = ran(model, settings, options, prompts, 20)
    assert [len(text) for text in tokens] == [20] * 5
    planned = [plan(len(x), budget=64, block_size=BLOCK, num_kv_heads=HEADS // 2) for x in prompts]
    assert counts["requests_compressed"] == sum(x is not None for x in planned)
    assert counts["blocks_given_back"] == sum(x.tail - x.kept_blocks for x in planned if x)


def test_a_killed_rank_ends_the_engine_with_an_error(model: str):
    """Soon, and without its ledger left behind."""
    before = set(path_of("").parent.glob("adakv-ledger-*"))
    (said,) = ran(model, Settings(budget=64), {}, texts(), 30, "--killed")
    assert "RuntimeError" in said or "died" in said, said
    mine = set(Path(path_of("").parent).glob("adakv-ledger-*")) - before
    assert not any(_is_unused(path) for path in mine)


def _is_unused(path: Path) -> bool:
    """Whether nobody has a lock on it; other engines of this machine have theirs."""
    import fcntl

    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True
