"""Worked examples, computed by hand from the algorithms of the papers.

Ada-KV is arXiv 2407.11550, CriticalKV arXiv 2502.03805, SnapKV arXiv 2404.14469. Examples of whole
policies are in tests/policy/.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import cases
from adakv import ops

# H = 2, n = 8; candidates only.
TWO_HEADS = [
    [0.12, 0.20, 0.06, 0.14, 0.09, 0.15, 0.11, 0.13],
    [0.045, 0.03, 0.70, 0.02, 0.10, 0.055, 0.01, 0.04],
]


def rows(kept: ops.Kept) -> list[list[int]]:
    ends = kept.indptr.tolist()
    return [kept.positions[a:z].tolist() for a, z in itertools.pairwise(ends)]


def top(values: list[float], count: int) -> list[int]:
    """The positions that select keeps of one row."""
    budget = cases.int32([[count]])
    return rows(ops.select(torch.tensor(values).view(1, 1, -1), budget, window=0))[0]


def window_tensors(exponentiated: Tensor) -> tuple[Tensor, Tensor]:
    """Queries ``[1, Hq, W, D]`` and keys ``[1, 1, T, D]`` with the logits log(exponentiated)."""
    heads, window, length = exponentiated.shape
    keys = torch.zeros(1, 1, length, 8 * -(-length // 8))
    keys[0, 0].fill_diagonal_(1.0)
    queries = torch.zeros(1, heads, window, keys.shape[-1])
    queries[0, ..., :length] = exponentiated.log().clamp(min=-50)
    return queries, keys


@pytest.mark.parametrize(
    ("safeguard", "floor", "budgets", "kept"),
    [
        ("blend", 1.0, [3, 3], [[1, 3, 5], [2, 4, 5]]),
        ("none", 0.5, [5, 1], [[0, 1, 3, 5, 7], [2]]),
        ("blend", 0.0, [5, 1], [[0, 1, 3, 5, 7], [2]]),
        ("blend", 0.2, [5, 1], [[0, 1, 3, 5, 7], [2]]),
        ("hard_floor", 0.2, [5, 1], [[0, 1, 3, 5, 7], [2]]),
        ("official_round", 0.2, [4, 1], [[1, 3, 5, 7], [2]]),
        ("blend", 0.5, [4, 2], [[1, 3, 5, 7], [2, 4]]),
        ("hard_floor", 0.7, [4, 2], [[1, 3, 5, 7], [2, 4]]),
    ],
)
def test_papers_budgets_of_two_heads(
    safeguard: str, floor: float, budgets: list[int], kept: list[list[int]], device: torch.device
) -> None:
    """Ada-KV, Algorithms 1 and 2."""
    scores = torch.tensor([TWO_HEADS], device=device)
    got = ops.allocate(scores, 3, window=0, floor=floor, safeguard=safeguard)
    assert got.tolist() == [budgets]
    assert rows(ops.select(scores, got, window=0)) == kept


def test_papers_budgets_with_a_window(device: torch.device) -> None:
    """Ada-KV, Algorithm 2; T = 10, W = 2, budget 8: a head can't keep more than it has."""
    scores = torch.full((1, 2, 10), -math.inf)
    scores[0, 0, :8] = torch.tensor([0.05, 0.21, 0.04, 0.12, 0.11, 0.13, 0.10, 0.14])
    scores[0, 1, :8] = torch.tensor([0.035, 0.02, 0.62, 0.03, 0.08, 0.045, 0.015, 0.025])
    scores = scores.to(device)
    assert ops.allocate(scores, 8, window=2, safeguard="none").tolist() == [[10, 6]]
    assert ops.allocate(scores, 8, window=2).tolist() == [[10, 6]]
    official = ops.allocate(scores, 8, window=2, safeguard="official_round")
    assert official.tolist() == [[9, 6]]
    kept = rows(ops.select(scores, official, window=2))
    assert kept == [[0, 1, 3, 4, 5, 6, 7, 8, 9], [0, 2, 4, 5, 8, 9]]


def test_papers_blend_and_hard_floor_differ(device: torch.device) -> None:
    """Ada-KV, Algorithm 2; n = 12, b = 5, floor 0.4, f = [9, 1]."""
    second = [90, 9, 8, 7, 6, 5, 4, 3, 2, 1.5, 1, 0.5]
    scores = torch.tensor([[list(range(30, 18, -1)), second]], device=device) / 1000
    for safeguard, budgets in [("none", [9, 1]), ("blend", [7, 3]), ("hard_floor", [8, 2])]:
        got = ops.allocate(scores, 5, window=0, floor=0.4, safeguard=safeguard)
        assert got.tolist() == [budgets]


def test_papers_window_is_inside_the_softmax(device: torch.device) -> None:
    """SnapKV, section 4; T = 4, W = 2."""
    queries, keys = window_tensors(torch.tensor([[[1.0, 2, 1, 1], [2, 2, 2, 2]]]))
    scores = ops.score(queries.to(device), keys.to(device), scale=1.0, pool="none")[0, 0].cpu()
    assert torch.allclose(scores[:2], torch.tensor([0.25, 0.375]), rtol=1e-5)
    assert scores[2:].tolist() == [-math.inf] * 2


@pytest.mark.parametrize(
    ("order", "pooled", "kept"),
    [
        ("group_first", [0.12, 0.12, 0.12, 0.11, 0.11, 0.10], [0, 1, 2]),
        ("pool_first", [0.12, 0.12, 0.23, 0.16, 0.16, 0.10], [2, 3, 4]),
    ],
)
def test_papers_order_of_pooling_and_group(
    order: ops.Order, pooled: list[float], kept: list[int], device: torch.device
) -> None:
    """Two q heads of one group, max-pool 3; what is missing to a sum of 1 lies in the window."""
    attention = torch.tensor([[0.0, 0.24, 0, 0, 0.10, 0], [0.0, 0, 0, 0.22, 0.10, 0.06]])
    rest = 1 - attention.sum(1, keepdim=True)
    queries, keys = window_tensors(torch.cat([attention, rest], 1)[:, None])
    scores = ops.score(queries.to(device), keys.to(device), scale=1.0, order=order, pool_width=3)
    scores = scores[0, 0, :6].cpu()
    assert torch.allclose(scores, torch.tensor(pooled), atol=1e-6)
    # The plateaus are equal bit for bit, so ties decide.
    assert top(scores.tolist(), 3) == kept


def test_papers_average_pooling_counts_padding(device: torch.device) -> None:
    """As torch.nn.functional.avg_pool1d and kvpress do it: width 5."""
    attention = torch.tensor([[0.5, 0.1, 0.1, 0.1, 0.1, 0.1]])
    queries, keys = window_tensors(torch.cat([attention, torch.full((1, 1), 1e-9)], 1)[:, None])
    scores = ops.score(queries.to(device), keys.to(device), scale=1.0, pool="avg", pool_width=5)
    wanted = torch.tensor([0.14, 0.16, 0.18, 0.10, 0.08, 0.06])
    assert torch.allclose(scores[0, 0, :6].cpu(), wanted, atol=1e-6)


# CriticalKV, Algorithm 1: attention, values and output projection of one head with D = 2.
ATTENTION = [0.30, 0.25, 0.05, 0.20, 0.15, 0.05]
VALUES = [[1, 0], [0.5, 0], [0, 5], [1, 0], [0, 0.9], [1, 2]]
WO = [[1, 0], [0, 2]]
NORMS = [1, 0.5, 10, 1, 1.8, 5]


def test_papers_norm_of_projected_values(device: torch.device) -> None:
    """||V Wo||_1, with D = 2 padded to 8."""
    values, w_o = torch.zeros(1, 1, 6, 8), torch.zeros(2, 8)
    values[0, 0, :, :2], w_o[:, :2] = torch.tensor(VALUES), torch.tensor(WO).T
    norms = ops.value_norm(values.to(device), w_o.to(device))
    assert torch.allclose(norms[0, 0].cpu(), torch.tensor(NORMS), rtol=1e-5)


@pytest.mark.parametrize(
    ("first", "kept", "error"),
    [(1.0, [0, 1, 3, 4], 0.6894), (0.0, [0, 2, 4, 5], 0.8323), (0.5, [0, 1, 2, 4], 0.1650)],
)
def test_papers_two_stages(
    first: float, kept: list[int], error: float, device: torch.device
) -> None:
    """Four of six: by attention, without stage one, in two stages; and the output's L1 error."""
    scores = torch.tensor(ATTENTION, device=device).view(1, 1, 6)
    norms = torch.tensor(NORMS, device=device).view(1, 1, 6)
    four = cases.int32([[4]], device)
    assert rows(ops.select(scores, four, window=0, norms=norms, first=first)) == [kept]
    a, projected = torch.tensor(ATTENTION), torch.tensor(VALUES) @ torch.tensor(WO).float()
    part = a[kept] / a[kept].sum()
    assert float((part @ projected[kept] - a @ projected).abs().sum()) == pytest.approx(
        error, abs=5e-5
    )


def test_papers_two_stages_with_adaptive_budgets(device: torch.device) -> None:
    """Both papers together: budgets come from the scores alone."""
    scores = torch.tensor([TWO_HEADS], device=device)
    norms = torch.tensor([[[1.0, 1, 9, 1, 1, 1, 4, 1], [1, 8, 1, 30, 1, 1, 1, 1]]], device=device)
    budgets = ops.allocate(scores, 3, window=0, floor=0.5)
    assert budgets.tolist() == [[4, 2]]
    assert rows(ops.select(scores, budgets, window=0, norms=norms)) == [[1, 2, 5, 6], [2, 3]]


def test_papers_plateaus_are_cut_at_the_lower_position(device: torch.device) -> None:
    """Max-pooling makes equal scores, and the tie rule decides which tokens stay."""
    attention = torch.tensor([[0.1, 0.1, 0.9, 0.1, 0.1, 0.8, 0.1, 0.1, 1.0]])
    queries, keys = window_tensors(attention[:, None])
    scores = ops.score(queries.to(device), keys.to(device), scale=1.0, pool_width=3)
    pooled = scores[0, 0, :8].cpu() / scores[0, 0, 0].cpu()
    assert torch.allclose(pooled, torch.tensor([1.0, 9, 9, 9, 8, 8, 8, 1]), rtol=1e-5)
    assert rows(ops.select(scores, cases.int32([[6]], device), window=1)) == [[1, 2, 3, 4, 5, 8]]
