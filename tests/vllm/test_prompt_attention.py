"""Prompts read by FlashAttention, for which plain torch stands in; vLLM isn't needed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from adakv.policy import Policy
from adakv.vllm.config import Settings
from adakv.vllm.metadata import batch_of
from adakv.vllm.prompt_attention import blocks_of, whole
from engine_steps import BLOCK, BUDGET, DIM, HEADS, LAYERS, Steps, run_step, watched
from flash_stand_in import FLASH, read

CPU = torch.device("cpu")


def policy(name: str = "ada_snapkv") -> Policy:
    return Settings(name, BUDGET).policy_for(BLOCK)


def test_blocks_are_views_of_head_major_pages():
    pages = torch.arange(4 * HEADS * 2 * BLOCK * DIM).view(-1, 2, BLOCK, DIM)
    keys, values = blocks_of(pages, HEADS)
    assert keys.shape == values.shape == (4, BLOCK, HEADS, DIM)
    assert keys.data_ptr() == pages.data_ptr() and keys.stride(-1) == 1
    for block, slot, head in ((0, 0, 0), (2, 5, 1), (3, BLOCK - 1, HEADS - 1)):
        assert torch.equal(keys[block, slot, head], pages[block * HEADS + head, 0, slot])
        assert torch.equal(values[block, slot, head], pages[block * HEADS + head, 1, slot])


def test_prompts_beside_decodes_are_read_in_one_call():
    """In any order of a step's requests; compressed ones and prompts of one token among them."""
    calls: list[dict[str, Any]] = []

    def watched(*tensors: torch.Tensor, **options: Any) -> Any:
        calls.append(options)
        return read(*tensors, **options)

    flash = replace(FLASH, read=watched)
    steps = Steps(policy(), CPU, torch.float32, flash=flash)
    for prompt in (150, 200, 161, 90):
        steps.add(prompt)
    run_step(steps, [150, 70, 1, 0])
    assert len(calls) == LAYERS and calls[0]["cu_seqlens_q"].tolist() == [0, 150, 220, 221]
    step = run_step(steps, [1, 80, 50, 60])  # the first decodes: the others lie side by side
    assert isinstance(step.whole.tokens, slice) and step.whole.tokens == slice(1, 191)
    assert calls[-1]["seqused_k"].tolist() == [150, 51, 60] and calls[-1]["out"] is not None
    step = run_step(steps, [1, 50, 110, 30])
    assert calls[-1]["max_seqlen_q"] == 110
    steps.add(100)
    steps.requests = [steps.requests[i] for i in (4, 0, 1, 2, 3)]
    fresh = steps.add(70)
    step = run_step(steps, [100, 1, 1, 1, 1, 70])
    assert not isinstance(step.whole.tokens, slice) and calls[-1]["out"] is None
    assert [step.whole.of_row[row] for row in (0, 5)] == [slice(0, 100), slice(100, 170)]
    steps.remove(fresh)
    before = len(calls)
    run_step(steps, [1] * 5)
    assert len(calls) == before and len(steps.told.planned) == 5


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_codes_of_prompts_are_read_from_copies(kv_dtype: str):
    """One page behind the other, as many as the requests' tokens take."""
    calls: list[dict[str, Any]] = []

    def watched(*tensors: torch.Tensor, **options: Any) -> Any:
        calls.append(options | {"k": tensors[1]})
        return read(*tensors, **options)

    flash = replace(FLASH, read=watched)
    steps = Steps(policy(), CPU, torch.bfloat16, flash=flash, kv_dtype=kv_dtype)
    for prompt in (150, 200, 90):
        steps.add(prompt)
    run_step(steps, [150, 70, 1])
    run_step(steps, [1, 80, 50])
    assert len(calls) == 2 * LAYERS
    assert [len(call["k"]) for call in calls[::LAYERS]] == [10 + 5 + 1, 10 + 4]
    tables = [call["block_table"].tolist() for call in calls[::LAYERS]]
    assert tables[0] == [list(range(10)), [*range(10, 16), *[15] * 4], [15] * 10]
    assert tables[1][0] == list(range(10)) and tables[1][1][:4] == [10, 11, 12, 13]
    run_step(steps, [1, 50, 39])
    run_step(steps, [1, 1, 1])
    assert len(steps.told.planned) == 3


@pytest.mark.parametrize("name", ["h2o", "ada_column_max"])
def test_folding_policies_get_the_log_sum_exp(name: str):
    """Also of parts before a prompt was long enough to be looked at."""
    chosen, folds = watched(policy(name))
    steps = Steps(chosen, CPU, torch.float32, flash=FLASH)
    for prompt in (150, 161):
        steps.add(prompt)
    run_step(steps, [30, 100])
    run_step(steps, [120, 61])
    assert [part.queries.shape[2] for part in folds] == [100] * LAYERS + [150, 61] * LAYERS
    for part in folds:
        assert part.lse is not None and part.lse.shape == part.queries.shape[:3]
    run_step(steps, [1, 1])
    run_step(steps, [1, 1])
    assert len(steps.told.entries) == 2


def test_whole_requests_are_described_without_the_device():
    """From host values, and slices of what the device has."""
    steps = Steps(policy(), CPU, torch.float32)
    for prompt in (40, 60):
        steps.add(prompt)
    batch = batch_of(steps.describe([40, 30]))
    found = whole(batch, [0, 1])
    assert found.tokens == slice(0, 70) and found.longest == 40 and found.max_seq_len == 40
    assert found.starts.tolist() == [0, 40, 70] and found.starts.dtype == torch.int32
    assert found.block_table.data_ptr() == batch.block_table.data_ptr()
    blocks, places = found.slots // BLOCK, found.slots % BLOCK
    assert places[:40].tolist() == [i % BLOCK for i in range(40)]
    assert blocks[:40].tolist() == [steps.requests[0].blocks[i // BLOCK] for i in range(40)]
