"""allocate: budgets against the definition, exactly, and the properties of arXiv 2407.11550."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import cases
import reference
from adakv import ops

SAFEGUARDS = ("blend", "hard_floor", "official_round", "none")
INF, NAN = float("inf"), float("nan")


@dataclass(frozen=True)
class Case:
    batch: int = 2
    heads: int = 4
    length: int = 300
    budget: int = 64
    window: int = 8
    floor: float = 0.2
    levels: int = 0
    seq_lens: tuple[int, ...] | None = None

    def __str__(self) -> str:
        text = f"{self.batch}x{self.heads}-T{self.length}-b{self.budget}-W{self.window}"
        text += f"-floor{self.floor}" + (f"-levels{self.levels}" if self.levels else "")
        return text + ("-ragged" if self.seq_lens else "")


CASES = [
    Case(),
    Case(levels=5),
    Case(floor=0.0),
    Case(floor=1.0),
    Case(floor=0.5, levels=20),
    Case(heads=1),
    Case(heads=8, budget=100, floor=0.37),
    Case(heads=16, length=5000, budget=512, window=32),
    Case(batch=3, seq_lens=(300, 90, 150)),
]
CORNERS = [
    Case(length=5),  # shorter than the window
    Case(length=1, budget=1, window=1),
    Case(length=64),  # the budget is the prompt
    Case(length=65),  # one entry of each head has to go
    Case(budget=1000),
    Case(budget=8),  # the window only
    Case(budget=0, window=0),
    Case(budget=9),
    Case(window=0, levels=1),  # all equal
    Case(batch=0),
    Case(batch=4, seq_lens=(0, 1, 64, 300)),
    Case(batch=2, seq_lens=(300, 65), floor=1.0),
]


def check(scores: Tensor, budget: int, **options: object) -> Tensor:
    """Both answers agree; gives them."""
    wanted = reference.allocate(scores, budget, **options)
    got = ops.allocate(scores, budget, **options)
    assert got.dtype == torch.int32
    assert torch.equal(got.cpu(), wanted), (options, got.tolist(), wanted.tolist())
    return wanted


@pytest.mark.parametrize("safeguard", SAFEGUARDS)
@pytest.mark.parametrize("case", CASES + CORNERS, ids=str)
def test_allocate_equals_the_definition(case: Case, safeguard: str, device: torch.device) -> None:
    scores = cases.random_scores(case.batch, case.heads, case.length, levels=case.levels)
    seq_lens = None if case.seq_lens is None else cases.int32(case.seq_lens, device)
    for b, seq_len in enumerate(case.seq_lens or (case.length,) * case.batch):
        scores[b, :, max(seq_len - case.window, 0) :] = NAN
    budgets = check(
        cases.noncontiguous(scores.to(device)),
        case.budget,
        window=case.window,
        seq_lens=seq_lens,
        floor=case.floor,
        safeguard=safeguard,
    )
    if safeguard != "official_round":
        full = torch.tensor(case.seq_lens or [case.length] * case.batch)
        assert torch.equal(budgets.sum(1), case.heads * full.clamp(max=case.budget))


def test_allocate_random_small(device: torch.device) -> None:
    for seed in range(500):  # of 20 sequences each
        generator = torch.Generator().manual_seed(seed)
        heads, length, window, budget, levels, safeguard, floor = (
            int(torch.randint(low, high, (), generator=generator))
            for low, high in [(1, 6), (1, 40), (0, 4), (0, 20), (1, 9), (0, 4), (0, 11)]
        )
        scores = torch.randint(levels, (20, heads, length), generator=generator).float()
        check(
            scores.to(device),
            window + budget,
            window=window,
            floor=floor / 10,
            safeguard=SAFEGUARDS[safeguard],
        )


def test_allocate_ties_go_to_the_lower_position_then_the_lower_head(device: torch.device) -> None:
    equal = torch.ones(1, 4, 100, device=device)
    for safeguard in SAFEGUARDS:
        got = ops.allocate(equal, 25, window=0, safeguard=safeguard)
        assert got.tolist() == [[25, 25, 25, 25]]
    late = torch.zeros(1, 3, 10, device=device)
    late[0, 0, 9] = late[0, 2, 3] = late[0, 1, 3] = 1.0
    assert ops.allocate(late, 1, window=0, floor=0.0).tolist() == [[1, 1, 1]]
    late[0, 0, 2] = 1.0  # four candidates for three places: head 0, then 1 and 2 at position 3
    assert ops.allocate(late, 1, window=0, floor=0.0).tolist() == [[1, 1, 1]]


def test_allocate_orders_special_floats(device: torch.device) -> None:
    special = torch.tensor(
        [[INF, -INF, 0.0, 1e-45, NAN, -1.0], [NAN, -0.0, -1e-45, 3e38, -3e38, 1.0]], device=device
    )[None]
    for budget in range(7):
        check(special, budget, window=0, floor=0.0)
    zeros = torch.tensor([[[-0.0, 0.0, -0.0]], [[0.0, -0.0, 0.0]]], device=device).view(1, 2, 3)
    assert ops.allocate(zeros, 2, window=0, floor=0.0).tolist() == [[2, 2]]


def test_allocate_floor_holds(device: torch.device) -> None:
    scores = cases.random_scores(3, 4, 500).to(device)
    for floor in (0.0, 0.2, 0.5, 0.9, 1.0):
        for safeguard in ("blend", "hard_floor"):
            budgets = ops.allocate(scores, 60, window=10, floor=floor, safeguard=safeguard)
            assert int(budgets.min()) >= 10 + int(floor * 50)
    assert (ops.allocate(scores, 60, window=10, floor=1.0) == 60).all()


def test_allocate_is_optimal_without_floor(device: torch.device) -> None:
    """Theorem 3.2: no other split keeps more mass."""
    scores = cases.random_scores(1, 3, 40)
    budgets = ops.allocate(scores.to(device), 10, window=0, floor=0.0)[0].tolist()
    best = scores[0].sort(-1, descending=True).values.cumsum(-1)
    best = torch.cat([torch.zeros(3, 1), best], 1)
    mass = sum(float(best[h, budgets[h]]) for h in range(3))
    for i in range(31):
        for j in range(31 - i):
            assert mass >= float(best[0, i] + best[1, j] + best[2, 30 - i - j]) - 1e-6


def test_allocate_does_not_depend_on_batch_or_head_order(device: torch.device) -> None:
    scores = torch.randperm(4 * 4 * 200).float().view(4, 4, 200).to(device)
    budgets = ops.allocate(scores, 50, window=10, floor=0.0)
    order = torch.tensor([2, 0, 3, 1], device=device)
    assert torch.equal(ops.allocate(scores[order], 50, window=10, floor=0.0), budgets[order])
    assert torch.equal(ops.allocate(scores[:, order], 50, window=10, floor=0.0), budgets[:, order])
    assert torch.equal(ops.allocate(scores * 0.125, 50, window=10, floor=0.0), budgets)


def test_allocate_gives_more_for_more(device: torch.device) -> None:
    scores = cases.random_scores(2, 4, 200).to(device)
    before = torch.zeros(2, 4, dtype=torch.int32, device=device)
    for budget in range(10, 201, 10):
        budgets = ops.allocate(scores, budget, window=10, floor=0.0)
        assert (budgets >= before).all()
        before = budgets
