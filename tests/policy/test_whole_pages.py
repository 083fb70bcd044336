"""Budgets rounded up to what the pages hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import adakv
from adakv.policy import Adaptive, LayerInputs, ModelWide, Uniform, WholePages, get

HEADS, LENGTH, PAGE = 3, 150, 16


def kept_rows(policy: adakv.Policy, budget: int) -> list[torch.Tensor]:
    inputs = LayerInputs(
        queries=torch.randn(2, 6, 32, 16),
        keys=torch.randn(2, HEADS, LENGTH, 16) * torch.tensor([0.2, 1, 3])[:, None, None],
        values=torch.randn(2, HEADS, LENGTH, 16),
        w_o=None,
        prompt_lens=(LENGTH, 70),
        layer=0,
        num_layers=1,
        seq_lens=torch.tensor([LENGTH, 70], dtype=torch.int32),
    )
    kept = policy.choose(inputs, budget)
    assert int(kept.indptr[-1]) <= sum(policy.totals(inputs, budget))
    return [kept.positions[a:b] for a, b in zip(kept.indptr[:-1], kept.indptr[1:], strict=True)]


@pytest.mark.parametrize("allocator", [Adaptive(), Uniform(), ModelWide()])
def test_whole_pages_add_the_next_best_entries(allocator: adakv.policy.Allocator):
    base = replace(get("ada_snapkv"), allocator=allocator)
    filled = replace(base, allocator=WholePages(allocator, PAGE))
    for budget in (40, 57, 64, 149, 200):
        torch.manual_seed(0)
        exact = kept_rows(base, budget)
        torch.manual_seed(0)
        for row, (few, many) in enumerate(zip(exact, kept_rows(filled, budget), strict=True)):
            length = (LENGTH, 70)[row // HEADS]
            assert len(many) == min(-(-len(few) // PAGE) * PAGE, length)
            assert set(few.tolist()) <= set(many.tolist())


def test_whole_pages_need_a_page_size():
    with pytest.raises(ValueError, match="page_size must be at least 1, got 0"):
        WholePages(Adaptive(), 0)
