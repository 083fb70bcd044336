"""plan: the schedule against its definition, field by field, and the promises it makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import reference
from adakv import _C, ops
from adakv.shortlist import shortlist


@dataclass(frozen=True)
class Case:
    layers: int = 2
    batch: int = 2
    heads: int = 4
    most: int = 1000
    workers: int = 64
    new_tokens: int = 1
    page_size: int = 16
    has_num_new: bool = False
    skewed: bool = False
    even: bool = False
    listing: tuple[float, int, int] | None = None  # share, least, newest

    def __str__(self) -> str:
        text = f"{self.layers}x{self.batch}x{self.heads}-len{self.most}-workers{self.workers}"
        text += f"-S{self.new_tokens}-P{self.page_size}"
        text += "-num_new" * self.has_num_new + "-skewed" * self.skewed + "-even" * self.even
        return text if self.listing is None else f"{text}-listing{self.listing}"

    def listed(self) -> dict[str, Any]:
        """As arguments."""
        names = ("share", "least", "newest")
        return {} if self.listing is None else dict(zip(names, self.listing, strict=True))

    def lengths(self) -> Tensor:
        lengths = torch.randint(self.most + 1, (self.layers, self.batch, self.heads))
        if self.skewed:  # one row holds nearly everything
            lengths //= 20
            lengths[:, 0, 0] = self.most
        if self.even:
            lengths[:] = self.most - self.new_tokens
        return lengths.int()


CASES = [
    Case(),
    Case(skewed=True),
    Case(most=4000, workers=132),
    Case(most=30),
    Case(most=0),
    Case(most=0, new_tokens=0),
    Case(new_tokens=0, most=300),
    Case(new_tokens=40, has_num_new=True, page_size=8),
    Case(workers=1),
    Case(workers=7, skewed=True),
    Case(batch=16, heads=8, workers=16),
    Case(batch=40, heads=2, most=20, workers=132),
    Case(batch=1, heads=1, most=5000, page_size=32),
    Case(layers=0),
    Case(batch=0),
    Case(batch=32, heads=8, most=1024, workers=132, even=True),
    Case(batch=67, heads=3, most=333, workers=100, even=True),
    Case(batch=16, heads=16, most=8192, workers=132, even=True),
]
LISTED = [
    Case(most=4000, workers=132, listing=(0.125, 8, 1)),
    Case(most=4000, new_tokens=0, listing=(0.25, 0, 2)),
    Case(most=300, new_tokens=40, has_num_new=True, page_size=8, listing=(0.3, 2, 1)),
    Case(batch=6, new_tokens=1, has_num_new=True, listing=(0.01, 3, 4)),
    Case(most=200, new_tokens=1, has_num_new=True, listing=(1.0, 0, 1)),
    Case(batch=0, listing=(0.5, 0, 1)),
]


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Lengths, block table, fresh pages and num_new; all page ids differ."""
    lengths = case.lengths()
    columns = -(-case.most // case.page_size) + 1
    fresh = -(-case.new_tokens // case.page_size) + 1
    ids = torch.randperm(lengths.numel() * (columns + fresh)).int()
    ids = ids.view(*lengths.shape, columns + fresh)
    table = ids[..., :columns].clone()
    used = -(-lengths // case.page_size)
    table[torch.arange(columns) >= used[..., None]] = -1
    num_new = torch.randint(case.new_tokens + 1, (case.batch,)).int() if case.has_num_new else None
    return lengths, table, ids[..., columns:], num_new


def plan(case: Case, device: torch.device, given: tuple[Tensor | None, ...]) -> Tensor:
    """The schedule for any number of workers, on a device."""
    lengths, table, fresh, num_new = (x if x is None else x.to(device) for x in given)
    size = _C.schedule_size(case.batch * case.heads, case.workers)
    schedule = torch.full((case.layers, size), -5, dtype=torch.int32, device=device)
    table, fresh = cases.noncontiguous(table), cases.noncontiguous(fresh)
    _C.plan(
        cases.noncontiguous(lengths),
        table,
        fresh,
        num_new,
        case.new_tokens,
        case.page_size,
        case.workers,
        *(case.listing or (0.0, 0, 0)),
        schedule,
    )
    return schedule


@pytest.mark.parametrize("case", [*CASES, *LISTED], ids=str)
def test_plan_equals_the_definition(case: Case, device: torch.device) -> None:
    given = inputs(case)
    expected = reference.plan(
        *given[:3],
        num_workers=case.workers,
        new_tokens=case.new_tokens,
        num_new=given[3],
        page_size=case.page_size,
        listing=case.listed(),
    )
    assert torch.equal(plan(case, device, given).cpu(), expected)


@pytest.mark.parametrize(
    "case", [*CASES, *[Case(most=m, workers=24) for m in (100, 200, 400)]], ids=str
)
def test_plan_covers_every_unit_once_and_evenly(case: Case, device: torch.device) -> None:
    lengths, table, fresh, num_new = given = inputs(case)
    new = torch.full((case.batch,), case.new_tokens) if num_new is None else num_new
    for layer, schedule in enumerate(plan(case, device, given).cpu()):
        workers = schedule[: case.workers * 64].view(-1, 64).tolist()
        rows = schedule[case.workers * 64 :].view(-1, 8).tolist()
        busy = [w for w in workers if w[0] < w[1]]
        assert all(not any(w) for w in workers[len(busy) :])
        borders = [0, *(w[1] for w in busy)]
        assert [w[0] for w in busy] == borders[:-1]
        units = rows[-1][1] if rows else 0
        assert borders[-1] == units
        if busy:
            count = min(max(units // 8, 1), case.workers)
            cost = min(256 // case.page_size, units // (4 * count))  # of a row's end
            even = (units + cost * sum(row[0] < row[1] for row in rows)) / count
            assert max(w[1] - w[0] for w in busy) <= 1.4 * even + 1

        partials: list[int] = []
        for r, (begin, end, length, first, count, worker, *unused) in enumerate(rows):
            b, h = divmod(r, case.heads)
            held = int(lengths[layer, b, h])
            assert length == held + int(new[b]) and end - begin == -(-length // case.page_size)
            used = -(-held // case.page_size)
            ids = [*table[layer, b, h, :used].tolist(), *fresh[layer, b, h].tolist()]
            sharing = [w for w in busy if max(w[0], begin) < min(w[1], end)]
            assert count == len(sharing) and unused == [0, 0]
            assert sharing == busy[worker : worker + count]
            partials += range(first, first + count) if count > 1 else []
            for w in sharing:
                for unit in range(max(begin, w[0]), min(end, w[1], w[0] + 52)):
                    assert w[12 + unit - w[0]] == ids[unit - begin]
        for w in busy:
            assert rows[w[2]][0] <= w[0] < rows[w[2]][1]
            assert w[3] == 0 and w[4:12] == rows[w[2]]
            assert w[12 + w[1] - w[0] :] == [0] * (52 - (w[1] - w[0])) or w[1] - w[0] > 52
        assert partials == list(range(len(partials))) and len(partials) <= 2 * case.workers


def test_plan_is_the_same_before_and_after_append(device: torch.device) -> None:
    layer = cases.paged_layer([[3, 16], [40, 7]], new_tokens=33, device=device)
    before = ops.plan(
        layer.lengths[None], layer.block_table[None], layer.fresh_pages[None], new_tokens=33
    )
    keys = torch.randn(2, 2, 33, 64, device=device)
    ops.append(keys, keys, layer)
    after = ops.plan(
        layer.lengths[None], layer.block_table[None], layer.fresh_pages[None], new_tokens=0
    )
    assert torch.equal(before, after)


@pytest.mark.parametrize("num_new", [None, [1, 0], [3, 2]], ids=str)
def test_plan_of_what_will_be_listed_is_that_of_what_is(
    device: torch.device, num_new: list[int] | None
) -> None:
    """Before the step's tokens are there, and of a layer with the listed pages."""
    tokens, how = 3 if num_new == [3, 2] else 1, {"share": 0.25, "least": 2, "newest": 1}
    layer = cases.paged_layer([[3, 800], [40, 530]], new_tokens=tokens, device=device)
    counts = None if num_new is None else torch.tensor(num_new, dtype=torch.int32, device=device)
    tables = layer.lengths, layer.block_table, layer.fresh_pages
    before = ops.plan(*(x[None] for x in tables), new_tokens=tokens, num_new=counts, **how)
    keys = torch.randn(2, 2, tokens, 64, device=device)
    ops.append(keys, keys, layer, num_new=counts)
    table, lengths = shortlist(
        torch.randn(2, 6, tokens, 64, device=device),
        torch.randn(len(layer.pages), 128, device=device),
        layer.lengths, layer.block_table, num_new=counts, **how,
    )  # fmt: skip
    after = ops.plan(lengths[None], table[None], layer.fresh_pages[None], new_tokens=0)
    workers = (after.shape[1] - 4 * 8) // 64
    of_workers = after[0, : workers * 64].view(workers, 64)
    of_workers[:, 3] = of_workers[:, 0] < of_workers[:, 1]
    of_workers[:, 12:] = 0
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"share": -0.5}, "share must be above 0 and at most 1, got -0.5"),
        ({"share": 1.5}, "share must be above 0"),
        ({"least": -1}, "least must not be negative, got -1"),
        ({"newest": 0}, "newest must be at least 1, got 0"),
    ],
)
def test_plan_names_wrong_listings(changed: dict[str, Any], message: str) -> None:
    lengths, table, fresh, _ = inputs(Case())
    with pytest.raises(ValueError, match=f"plan: {message}"):
        ops.plan(lengths, table, fresh, **{"share": 0.5, **changed})


def test_plan_keeps_rows_whole_where_that_is_even() -> None:
    assert reference.plan_borders([10, 10, 10, 10], 132) == [0, 10, 20, 30, 40]
    assert reference.plan_borders([64] * 8, 16) == list(range(0, 513, 32))


def test_plan_gives_whole_rows_where_all_are_as_long() -> None:
    """With an end of 16 a row: two of 64 take 160, and an equal range 256 * 80 / 132 = 156 and 16
    more if it cuts a row. Two of 512 take 1,056, and an equal range 1,024 and 16."""
    assert reference.plan_borders([64] * 256, 132) == list(range(0, 64 * 256 + 1, 128))
    assert reference.plan_borders([64] * 199, 100) == [*range(0, 64 * 199, 128), 64 * 199]
    assert reference.plan_borders([512] * 256, 132)[:3] == [0, 1024, 2000]


def test_plan_counts_the_ends_of_rows() -> None:
    """A row's end takes a worker as long as 256 slots, or a quarter of its even share."""
    # 600 pages and 5 ends of 16 make 4 ranges of 170. The first border lies in the fourth row's 16.
    assert reference.plan_borders([30, 30, 30, 30, 480], 4) == [0, 120, 276, 446, 600]
    # 153 pages and 4 ends of 9: 47, 94 and 141 are the borders; the last is a page behind an end.
    assert reference.plan_borders([10, 100, 3, 0, 40], 4) == [0, 38, 85, 113, 153]
