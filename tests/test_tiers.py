"""Which tier of a row an entry is in, against a definition in plain Python."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from adakv.ops import Kept
from adakv.tiers import Tiers
from cases import int32, random_scores

INF = math.inf


@pytest.mark.parametrize(
    ("given", "formats", "shares"),
    [
        ("int8", ("int8",), (1,)),
        ("auto:1/4 + int4:3/4", ("auto", "int4"), (Fraction(1, 4), Fraction(3, 4))),
        ("int8:1/4 + int2:3/4", ("int8", "int2"), (Fraction(1, 4), Fraction(3, 4))),
        ("auto:.3+ int8 :0.3+int4:0.4", ("auto", "int8", "int4"), (".3", ".3", ".4")),
    ],
)
def test_tiers_are_read(given: str, formats: tuple[str, ...], shares: tuple[object, ...]) -> None:
    tiers = Tiers.given(given)
    assert tiers.formats == formats
    assert tiers.shares == tuple(map(Fraction, shares))  # type: ignore[arg-type]
    assert Tiers.given(str(tiers)) == tiers


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("int5", "kv_dtype must be one of"),
        ("auto:1/4 + int5:3/4", "kv_dtype must be one of 'auto', .* got 'int5'"),
        ("auto:1/4 + int4:1/4", "shares above 0 that sum to 1, .* got 'auto:1/4 \\+ int4:1/4'"),
        ("auto:1/4 + int4", "shares above 0 that sum to 1"),
        ("auto:0 + int4:1", "shares above 0 that sum to 1"),
        ("auto:5/4 + int4:-1/4", "shares above 0 that sum to 1"),
        ("auto:1/0 + int4:1", "shares above 0 that sum to 1"),
        ("auto:nan + int4:1", "shares above 0 that sum to 1"),
        ("auto:0.00000001 + int4:0.99999999", "at most 6 digits"),
        ("+".join(["auto:1/9"] * 9), "tiers must be at most 8"),
        ("auto" + "|rank=1/2" * 8 + ":1/2", "tiers must be at most 8"),
        (3, "kv_dtype must be one of"),
    ],
)
def test_what_is_no_tier_is_named(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tiers.given(given)


def by_hand(tiers: Tiers, kept: list[int], scores: list[float], window: int) -> list[list[int]]:
    """The window and a share of the rest, the next share, and so on; equal scores: lower first."""

    def value(position: int) -> float:
        return -INF if math.isnan(scores[position]) else scores[position]

    best = sorted(kept, key=lambda position: (-value(position), position))
    ends, upto = [0], Fraction(0)
    for share in tiers.shares:
        upto += share
        ends.append(window + math.ceil(upto * (len(kept) - window)))
    return [sorted(best[a:b]) for a, b in itertools.pairwise(ends)]


def rows_of(kept: Kept) -> list[list[int]]:
    ends = kept.indptr.tolist()
    return [kept.positions[a:b].tolist() for a, b in itertools.pairwise(ends)]


def some_scores(window: int, device: torch.device) -> Tensor:
    """With ties, NaN and infinities of both signs; the window's are infinite."""
    scores = random_scores(2, 3, 100, levels=12)
    scores[:, :, 3], scores[:, 0, 4], scores[0, :, 5:9] = INF, math.nan, -INF
    scores[:, :, 100 - window :] = INF
    return scores.to(device)


@pytest.mark.parametrize("given", ["auto:1/4+int4:3/4", "auto:.1+int8:.5+int4:.4", "int8:1"])
@pytest.mark.parametrize("window", [1, 8])
def test_tiers_are_those_of_the_definition(given: str, window: int, device: torch.device) -> None:
    tiers, scores = Tiers.given(given), some_scores(window, device)
    torch.manual_seed(0)
    rows = []
    for count in (window, 90, 17, 50, window + 1, 100 - window):
        chosen = torch.randperm(100 - window)[: count - window].tolist()
        rows.append(sorted([*chosen, *range(100 - window, 100)]))
    ends = int32([0, *torch.tensor([len(row) for row in rows]).cumsum(0).tolist()], device)
    behind = [-1] * 9  # where only the device knows how many there are
    kept = Kept(int32([p for row in rows for p in row] + behind, device), ends)
    parts = [rows_of(part) for part in tiers.split(kept, scores, window)]
    for r, row in enumerate(rows):
        expected = by_hand(tiers, row, scores[r // 3, r % 3].tolist(), window)
        assert [part[r] for part in parts] == expected
        assert sorted(p for part in expected for p in part) == row
    total = sum(map(len, rows))
    most = tiers.most(total, len(rows), window)
    counts = [sum(map(len, part)) for part in parts]
    assert all(n <= m < n + 2 * len(rows) for n, m in zip(counts, most, strict=True))


def test_the_newest_entries_are_in_the_first_tier(device: torch.device) -> None:
    """A window of 4 of 8 entries, whose quarter would be 2."""
    scores = torch.tensor([5.0, 9, 1, 2, INF, INF, INF, INF], device=device).view(1, 1, 8)
    kept = Kept(int32(range(8), device), int32([0, 8], device))
    first, second = Tiers.given("auto:1/4 + int4:3/4").split(kept, scores, 4)
    assert rows_of(first) == [[1, 4, 5, 6, 7]]
    assert rows_of(second) == [[0, 2, 3]]
