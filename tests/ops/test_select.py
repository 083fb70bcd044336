"""select: positions against the definition, exactly; one stage and two (arXiv 2502.03805)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import cases
import reference
from adakv import ops

INF, NAN = float("inf"), float("nan")


@dataclass(frozen=True)
class Case:
    batch: int = 2
    heads: int = 4
    length: int = 300
    window: int = 8
    most: int = 200
    levels: int = 0
    seq_lens: tuple[int, ...] | None = None

    def __str__(self) -> str:
        text = f"{self.batch}x{self.heads}-T{self.length}-W{self.window}-b{self.most}"
        text += f"-levels{self.levels}" if self.levels else ""
        return text + ("-ragged" if self.seq_lens else "")


CASES = [
    Case(),
    Case(levels=4),
    Case(levels=1),
    Case(heads=1, most=300),
    Case(heads=8, length=3000, window=32, most=900),
    Case(batch=3, seq_lens=(300, 90, 150)),
]
CORNERS = [
    Case(length=5),  # shorter than the window
    Case(length=1, window=1, most=1),
    Case(length=8),
    Case(length=9),
    Case(most=400),  # budgets above the prompt
    Case(most=0),  # below the window
    Case(window=0, most=0),
    Case(window=0),
    Case(batch=0),
    Case(batch=4, seq_lens=(0, 1, 8, 300)),
]


def check(scores: Tensor, budgets: Tensor, **options: object) -> list[list[int]]:
    """Both answers agree; gives the positions by row."""
    positions, indptr = reference.select(scores, budgets, **options)
    got = ops.select(scores, budgets, **options)
    assert got.positions.dtype == got.indptr.dtype == torch.int32
    assert torch.equal(got.indptr.cpu(), indptr)
    assert torch.equal(got.positions.cpu()[: len(positions)], positions)
    assert (got.positions[len(positions) :] == -1).all()
    return rows(got)


def rows(kept: ops.Kept) -> list[list[int]]:
    ends = kept.indptr.tolist()
    return [kept.positions[a:z].tolist() for a, z in itertools.pairwise(ends)]


@pytest.mark.parametrize("first", [None, 0.0, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("case", CASES + CORNERS, ids=str)
def test_select_equals_the_definition(
    case: Case, first: float | None, device: torch.device
) -> None:
    scores = cases.random_scores(case.batch, case.heads, case.length, levels=case.levels)
    norms = torch.rand(scores.shape) * 10
    budgets = torch.randint(case.most + 1, (case.batch, case.heads), dtype=torch.int32)
    lengths = case.seq_lens or (case.length,) * case.batch
    for b, seq_len in enumerate(lengths):
        scores[b, :, max(seq_len - case.window, 0) :] = NAN
        norms[b, :, seq_len:] = NAN
    kept = check(
        cases.noncontiguous(scores.to(device)),
        cases.noncontiguous(budgets.to(device)),
        window=case.window,
        seq_lens=None if case.seq_lens is None else cases.int32(case.seq_lens, device),
        **(
            {}
            if first is None
            else {"norms": cases.noncontiguous(norms.to(device)), "first": first}
        ),
    )
    for r, row in enumerate(kept):
        seq_len = lengths[r // case.heads]
        assert row == sorted(set(row))
        assert (
            row[max(len(row) - case.window, 0) :] == list(range(seq_len))[-case.window or seq_len :]
        )


def test_select_random_small(device: torch.device) -> None:
    for seed in range(500):  # of 20 sequences each
        generator = torch.Generator().manual_seed(seed)
        heads, length, window, levels, first = (
            int(torch.randint(low, high, (), generator=generator))
            for low, high in [(1, 4), (1, 40), (0, 4), (1, 9), (-3, 11)]
        )
        scores = torch.randint(levels, (20, heads, length), generator=generator).float()
        norms = torch.randint(1, 4, (20, heads, length), generator=generator).float()
        budgets = torch.randint(45, (20, heads), generator=generator, dtype=torch.int32)
        options = {} if first < 0 else {"norms": norms.to(device), "first": first / 10}
        check(scores.to(device), budgets.to(device), window=window, **options)


def test_select_takes_the_lower_of_equal_positions(device: torch.device) -> None:
    scores = torch.zeros(1, 1, 10, device=device)
    scores[0, 0, [3, 4, 8]] = 1.0
    for budget, kept in [(1, [3]), (2, [3, 4]), (4, [0, 3, 4, 8]), (6, [0, 1, 2, 3, 4, 8])]:
        assert check(scores, cases.int32([[budget]], device), window=0) == [kept]


def test_select_orders_special_floats(device: torch.device) -> None:
    special = torch.tensor([NAN, -INF, -0.0, 0.0, 1e-45, INF, -1.0, 3e38, NAN], device=device)
    for budget in range(10):
        check(special.view(1, 1, 9), cases.int32([[budget]], device), window=0)
    assert check(special.view(1, 1, 9), cases.int32([[7]], device), window=0) == [
        [0, 2, 3, 4, 5, 6, 7]
    ]


def test_select_pins_infinite_scores_whatever_their_norm(device: torch.device) -> None:
    scores = torch.rand(1, 2, 50)
    scores[0, :, [7, 20, 44]] = INF
    norms = torch.rand(1, 2, 50) + 0.5
    norms[0, :, 7], norms[0, :, 20] = 0.0, NAN
    for first in (0.0, 0.5):
        kept = check(
            scores.to(device),
            cases.int32([[5, 3]], device),
            window=0,
            norms=norms.to(device),
            first=first,
        )
        assert all({7, 20, 44} <= set(row) for row in kept)


def test_select_ranks_nan_norms_last(device: torch.device) -> None:
    scores, norms = torch.rand(1, 1, 30), torch.rand(1, 1, 30)
    norms[0, 0, ::2] = NAN
    kept = check(
        scores.to(device), cases.int32([[15]], device), window=0, norms=norms.to(device), first=0.0
    )
    assert kept == [list(range(1, 30, 2))]


def test_select_constant_norms_change_nothing(device: torch.device) -> None:
    scores = cases.random_scores(2, 4, 300).to(device)
    budgets = torch.randint(8, 200, (2, 4), dtype=torch.int32, device=device)
    norms = torch.full_like(scores, 2.0)
    plain = ops.select(scores, budgets, window=8)
    staged = ops.select(scores, budgets, window=8, norms=norms, eps=0.0)
    assert torch.equal(plain.positions, staged.positions)


def test_select_keeps_more_for_more(device: torch.device) -> None:
    scores = cases.random_scores(1, 2, 100, levels=6).to(device)
    norms = torch.rand(1, 2, 100, device=device)
    before: list[set[int]] = [set(), set()]
    for budget in range(101):
        kept = rows(ops.select(scores, cases.int32([[budget] * 2], device), window=4))
        assert all(small <= set(row) for small, row in zip(before, kept, strict=True))
        before = [set(row) for row in kept]
        staged = ops.select(scores, cases.int32([[budget] * 2], device), window=4, norms=norms)
        assert torch.equal(staged.indptr.diff(), cases.int32([max(budget, 4)] * 2, device))


def test_select_fills_the_rest_of_a_given_total(device: torch.device) -> None:
    scores = cases.random_scores(1, 2, 50).to(device)
    kept = ops.select(scores, cases.int32([[10, 20]], device), window=4, total=64)
    assert kept.positions.shape == (64,)
    assert (kept.positions[30:] == -1).all() and (kept.positions[:30] >= 0).all()


def test_select_refuses_a_total_that_is_too_small() -> None:
    scores = cases.random_scores(1, 2, 50)
    with pytest.raises(ValueError, match="positions must hold the sum of the budgets, 30"):
        ops.select(scores, cases.int32([[10, 20]]), window=4, total=29)
