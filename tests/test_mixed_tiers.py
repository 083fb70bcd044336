"""Entries that keep all, some or none of their dimensions, in the bytes of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
import torch

from adakv.basis import energies, levels
from adakv.ops import Kept
from adakv.tiers import Tiers
from cases import int32

INF = float("inf")


def test_three_entries_share_five_coefficients() -> None:
    """Weights of .6, .3 and .1 times the squares of coefficients: 9.6, 2.4, .6; 2.7, 2.7; .1. The
    five largest are three of the first entry and two of the second."""
    rows = torch.tensor([[4.0, 2, 1, 0], [3, 3, 0, 0], [1, 0, 0, 0]])
    gains = torch.tensor([0.6, 0.3, 0.1])[:, None] * rows.square().cumsum(1)
    found = levels(gains.T[:, None], [1, 2, 3, 4], torch.tensor([5]))
    assert found.tolist() == [[3, 2, 0]]


@pytest.mark.parametrize("costs", [[1, 2, 4], [3, 5, 6], [2, 2, 7], [4]], ids=str)
def test_no_choice_of_the_same_cost_saves_more(costs: list[int], device: torch.device) -> None:
    """Against all choices there are, with gains of any shape, ties and things that get nothing; if
    one thing, where the budget ended, is on its way to the level that it would have had, before."""
    count, most = 5, len(costs)
    gains = torch.rand(most, 6, count).cumsum(0)
    gains[:, 4] = (gains[:, 4] * 4).round()
    gains[:, 5, 2] = -1
    all_choices = list(product(range(most + 1), repeat=count))
    for b, budget in product(range(6), (0, 1, 6, 13, 100)):
        given = torch.full((6,), budget, device=device)
        found = levels(gains.to(device), costs, given)[b].tolist()

        def of(choice: Sequence[int], b: int = b) -> tuple[int, float]:
            taken = [(i, r - 1) for i, r in enumerate(choice) if r]
            return sum(costs[r] for _, r in taken), sum(float(gains[r, b, i]) for i, r in taken)

        assert of(found)[0] <= budget
        assert b < 5 or found[2] == 0
        every = [of(choice) for choice in all_choices]
        before = [
            [*found[:i], r, *found[i + 1 :]] for i in range(count) for r in range(found[i] + 1)
        ]
        assert any(
            saved > max(s for cost, s in every if cost <= spent) - 1e-5
            for spent, saved in map(of, before)
        )
        if budget == 100 and b < 5:
            assert found == [most] * count


def test_a_budget_for_all_gives_all_and_one_for_none_nothing(device: torch.device) -> None:
    gains = torch.rand(3, 2, 7, device=device).cumsum(0)
    given = torch.tensor([7 * 4, 0], device=device)
    assert levels(gains, [1, 2, 4], given).tolist() == [[3] * 7, [0] * 7]


def test_energies_are_shares_of_a_row(device: torch.device) -> None:
    keys, values = torch.randn(2, 1, 2, 5, 16, device=device)
    held = torch.tensor([[[1, 1, 1, 0, 0], [0, 1, 0, 0, 0]]], device=device).bool()
    found = energies([(keys, values), (keys[..., :8], values[..., :4])], held)
    for h in range(2):
        of_keys, of_values = (x[0, h, held[0, h]].square().sum(1).mean() for x in (keys, values))
        for t in range(5):
            k, v = keys[0, h, t], values[0, h, t]
            whole = k.square().sum() / of_keys + v.square().sum() / of_values
            part = k[:8].square().sum() / of_keys + v[:4].square().sum() / of_values
            expected = torch.stack([whole, part])
            assert torch.allclose(found[:, 0, h, t], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("auto | rank=1/2 | rank=1/4 : 1/3", "auto | rank=1/2 | rank=1/4 : 1/3"),
        ("int8|int8/rank=.5:.25", "int8 | int8/rank=1/2 : 1/4"),
    ],
)
def test_mixed_tiers_are_read(text: str, written: str) -> None:
    tiers = Tiers.given(text)
    assert str(tiers) == written
    assert Tiers.given(str(tiers)) == tiers
    assert tiers.mean is not None and 0 < tiers.mean < 1


@pytest.mark.parametrize(
    "text",
    [
        "auto | rank=1/2",
        "auto | rank=1/2 : 1",
        "auto | rank=1/2 : 0",
        "auto | int4 : 1/2",
        "auto | channels=1/2 : 1/2",
        "rank=1/2 | rank=1/4 : 1/2",
        "auto | int8/rank=1/2 : 1/2",
    ],
)
def test_what_is_no_mixed_tier_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"kv_dtype: mixed tiers must be a format, ranks in the"):
        Tiers.given(text)


def test_entries_go_where_they_save_most_for_their_bytes(device: torch.device) -> None:
    """By the definition of levels, over the kv heads of a sequence together; the window is whole,
    what was not kept goes nowhere, and what must stay is whole."""
    tiers = Tiers.given("auto | rank=1/2 | rank=1/4 : 1/3")
    scores = torch.rand(2, 2, 20)
    scores[:, :, 16:], scores[0, 0, 3] = INF, torch.finfo(torch.float32).max
    scores[1, 1, 5], scores[1, 0] = float("nan"), scores[1, 0] - 0.5  # of a scorer below 0
    scores[1, 0, 16:] = INF
    counts = [20, 9, 14, 20]
    rows = [sorted([*torch.randperm(16)[: n - 4].tolist(), *range(16, 20)]) for n in counts]
    rows[0] = list(range(20))
    ends = int32([0, *torch.tensor(counts).cumsum(0).tolist()], device)
    kept = Kept(int32([p for row in rows for p in row], device), ends)
    shares = torch.tensor([1.0, 0.7, 0.4])[:, None, None, None] + 0.2 * torch.rand(3, 2, 2, 20)
    shares[0] = 1.0
    costs = [260, 132, 68]
    parts = tiers.mixed(kept, scores.to(device), 4, shares.to(device), costs)
    held = [[[p for p in rows[2 * b + h] if p < 16] for h in range(2)] for b in range(2)]
    for b in range(2):
        places = [(h, p) for h in range(2) for p in held[b][h]]
        gains = torch.zeros(3, 1, len(places))
        for i, (h, p) in enumerate(places):
            known = scores[b, h, held[b][h]].nan_to_num(0)
            weight = scores[b, h, p].nan_to_num(0) - min(float(known.min()), 0)
            gains[:, 0, i] = weight.clamp(max=1e30) * shares[[2, 1, 0], b, h, p]
        budget = torch.tensor([len(places) * 260 // 3])
        (expected,) = levels(gains, [68, 132, 260], budget).tolist()
        for tier, level in enumerate((3, 2, 1)):
            for h in range(2):
                start, end = parts[tier].indptr[2 * b + h : 2 * b + h + 2].tolist()
                wanted = [p for i, (g, p) in enumerate(places) if g == h and expected[i] == level]
                wanted += [*range(16, 20)] if tier == 0 else []
                assert parts[tier].positions[start:end].tolist() == wanted
    first = parts[0].positions[: int(parts[0].indptr[1])].tolist()
    assert 3 in first
