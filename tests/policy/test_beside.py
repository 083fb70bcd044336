"""What a small model's attention says: layers and heads that belong together, pages and entries."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import beside
import listed_pages
from adakv.policy import SmallKV, SpecAttn, get_read
from adakv.policy.beside import head_map, layer_map, top_p


def test_layers_are_matched_in_order_at_the_least_cost() -> None:
    torch.manual_seed(0)
    for rows, columns in ((1, 1), (5, 3), (4, 6), (7, 4)):
        cost = torch.rand(rows, columns, dtype=torch.float64)
        found = layer_map(cost)
        assert list(found) == sorted(found) and len(found) == rows
        total = sum(float(cost[j, i]) for j, i in enumerate(found))
        assert total == pytest.approx(beside.layer_map(cost))


def test_heads_are_matched_by_their_best_entries() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.rand(5, 40), torch.rand(7, 40)
    for count in (1, 8, 40):
        for row, found in zip(ours, head_map(ours, theirs, count).tolist(), strict=True):
            indices = [beside.jaccard(row, other, count) for other in theirs]
            assert indices[found] == max(indices)
    assert head_map(theirs, theirs, 10).tolist() == [*range(7)]


def test_golden_numbers_of_a_mass() -> None:
    weights = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04], dtype=torch.float64)
    threshold = top_p(weights, 0.85)
    assert float(threshold) == pytest.approx(0.099609, abs=1e-6)
    assert (weights >= threshold).nonzero().flatten().tolist() == [0, 1, 2]


def test_a_mass_is_held_by_few(device: torch.device) -> None:
    torch.manual_seed(0)
    weights = (3 * torch.randn(4, 9, 300, device=device)).softmax(-1)
    for mass in (0.1, 0.9, 0.99):
        found = top_p(weights, mass)
        expected = [[listed_pages.top_p(row.double().cpu(), mass) for row in x] for x in weights]
        torch.testing.assert_close(found[..., 0].cpu().double(), torch.tensor(expected).double())
        assert (weights.where(weights >= found, 0).sum(-1) >= mass - 1e-5).all()


def test_golden_numbers_of_heads() -> None:
    ours = torch.tensor([[5.0, 1, 4, 0, 3]])
    theirs = torch.tensor([[4.0, 0, 5, 1, 2], [0, 5, 1, 4, 2]])
    assert [beside.jaccard(ours[0], x, 3) for x in theirs] == [1.0, 0.2]
    assert head_map(ours, theirs, 3).tolist() == [0]


@pytest.mark.parametrize(("renormalise", "expected"), [(False, 2.287883), (True, 2.057200)])
def test_golden_numbers_of_values(renormalise: bool, expected: float) -> None:
    """Entries 0 and 2 critical, 4 marginal, and nothing newest: what all give is 2.077046."""
    p = torch.tensor([2.0, 1.0]).softmax(0)
    values, small = torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([0.35, 0.05, 0.40, 0.05, 0.15])
    out = (p @ values[[0, 2]]).view(1, 1)
    read = SmallKV(small="small", renormalise=renormalise)
    found = read.mixed(out, small[4].view(1, 1), values[4].view(1, 1, 1))
    assert float(found) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("length", [1, 2, 7, 100, 1001])
def test_entries_have_their_shares(share: float, length: int) -> None:
    torch.manual_seed(0)
    read = SmallKV(small="small", share=share)
    critical, recent, marginal = read.counts(length)
    assert critical + recent + marginal <= length and recent >= 1
    sums = torch.rand(6, length)
    attended, by_values = read.entries(sums, 2)
    assert attended.shape == (2, critical + recent) and by_values.shape == (2, marginal)
    for h in range(2):
        order = sums[3 * h : 3 * h + 3, : length - recent].sum(0).argsort(descending=True)
        assert attended[h, :critical].tolist() == order[:critical].tolist()
        assert attended[h, critical:].tolist() == [*range(length - recent, length)]
        assert by_values[h].tolist() == order[critical : critical + marginal].tolist()


@pytest.mark.parametrize("mass", [0.3, 0.8, 0.97])
@pytest.mark.parametrize("columns", [1, 3, 20])
def test_pages_are_those_with_entries_that_the_draft_looks_at(mass: float, columns: int) -> None:
    torch.manual_seed(0)
    seen, lengths = 300, [300, 170, 90, 5]
    weights = (4 * torch.randn(1, columns, seen)).softmax(-1)
    positions = torch.zeros(1, 4, 20, 16, dtype=torch.int32)
    for row, length in enumerate(lengths):
        positions[0, row].view(-1)[:length] = torch.randperm(seen)[:length].sort().values
    read = SpecAttn(small="draft", mass=mass, least=0)
    pages, counts = read.pages(weights, positions, torch.tensor([lengths], dtype=torch.int32))
    for row, length in enumerate(lengths):
        where = positions[0, row].flatten()[:length].tolist()
        expected = beside.draft_pages(weights[0].double(), where, page_size=16, mass=mass)
        assert pages[0, row, : counts[0, row]].tolist() == expected


def test_reads_are_written_down_and_read_again() -> None:
    for read in (
        SpecAttn(small="a/draft", mass=0.9, layers=(0, 0, 1)),
        SmallKV(small="a/small", share=0.4, renormalise=False),
    ):
        assert get_read(str(read)) == read


def test_a_model_is_written_down_by_its_kind() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert str(SpecAttn(small=model, mass=0.9)) == "SpecAttn(small=<Sequential>, mass=0.9)"


@pytest.mark.parametrize(
    ("part", "settings", "reason"),
    [
        (SpecAttn, {"mass": 0}, "mass must be above 0"),
        (SpecAttn, {"layers": (1, -1)}, "layers must be numbers of layers"),
        (SpecAttn, {"layers": "all"}, "layers must be numbers of layers"),
        (SpecAttn, {"share": 1.5}, "share must be above 0 and at most 1"),
        (SmallKV, {"share": 0}, "share must be above 0 and at most 1"),
        (SmallKV, {"map_tokens": 2}, "map_tokens must be"),
    ],
)
def test_settings_are_checked(part: Any, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        part(small="small", **settings)
