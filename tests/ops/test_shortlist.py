"""shortlist: the pages of the definition, listed row by row (arXiv 2406.10774; 2510.27641)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adakv.shortlist import shortlist
from listed_pages import listed_pages

NAN = math.nan


@dataclass(frozen=True)
class Case:
    share: float = 0.25
    mass: float = 1.0
    least: int = 0
    newest: int = 1
    tokens: int = 1
    group: int = 3
    dim: int = 16
    page_size: int = 8
    pages: int = 21
    scale: float | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        changed = [
            f"{name}={value}" for name, value in vars(self).items() if value != getattr(Case, name)
        ]
        return ",".join(changed) or "plain"


CASES = [
    Case(),
    Case(share=0.3, least=3, newest=2, tokens=3),
    Case(share=0.5, mass=0.6, tokens=9),
    Case(share=1.0, mass=0.3),
    Case(share=0.01, tokens=3),
    Case(share=1.0),
    Case(share=0.1, least=100),
    Case(scale=0.5, softcap=3.0, tokens=3),
    Case(group=1, dim=64, dtype=torch.bfloat16),
    Case(group=4, dim=128, dtype=torch.bfloat16),
    Case(group=16, dim=8, dtype=torch.float16),
    Case(group=5, dim=80, dtype=torch.float16, tokens=2),
    Case(group=2, dim=256, dtype=torch.bfloat16),
    Case(group=2, dim=136),
    Case(share=0.125, dim=64, pages=700, page_size=2, dtype=torch.bfloat16),
    Case(share=0.3, mass=0.5, dim=8, pages=1300, page_size=1),
    Case(share=0.2, mass=0.5, dim=8, pages=2200, page_size=1, tokens=3, group=2),
    Case(share=0.125, dim=64, pages=2200, page_size=2, dtype=torch.bfloat16),
]


@dataclass
class Rows:
    """Rows of any length over pages in any order; bounds that are not to be read are no numbers."""

    case: Case
    device: torch.device

    def __post_init__(self) -> None:
        c = self.case
        most = c.pages * c.page_size
        lengths = [[most - 3, 9], [1, 12 * c.page_size], [2 * c.page_size + 1, most - c.page_size]]
        self.num_new = [c.tokens, min(c.tokens, 1), c.tokens]
        self.lengths = torch.tensor(
            [[max(n, new) for n in row] for row, new in zip(lengths, self.num_new, strict=True)],
            dtype=torch.int32,
        )
        self.keys = torch.randn(3, 2, most, c.dim).to(c.dtype)
        self.queries = torch.randn(3, 2 * c.group, c.tokens, c.dim).to(c.dtype)
        self.table = torch.randperm(6 * c.pages).view(3, 2, -1).int()
        self.bounds = torch.full((6 * c.pages, 2 * c.dim), NAN, dtype=c.dtype)
        for b in range(3):
            for h in range(2):
                whole = int(self.lengths[b, h]) // c.page_size
                pages = self.keys[b, h, : whole * c.page_size].view(whole, c.page_size, c.dim)
                of_pages = torch.cat([pages.amax(1), pages.amin(1)], -1)
                self.bounds[self.table[b, h, :whole].long()] = of_pages
                self.table[b, h, -(-int(self.lengths[b, h]) // c.page_size) :] = -1

    def listed(self, **changed: Any) -> tuple[Tensor, Tensor]:
        c = self.case
        given = {
            "queries": self.queries, "bounds": self.bounds, "lengths": self.lengths,
            "block_table": self.table, "num_new": torch.tensor(self.num_new, dtype=torch.int32),
        }  # fmt: skip
        given = {name: x.to(self.device) for name, x in given.items()}
        options = {
            "page_size": c.page_size, "share": c.share, "mass": c.mass, "least": c.least,
            "newest": c.newest, "scale": c.scale, "softcap": c.softcap,
        }  # fmt: skip
        table, lengths = shortlist(**{**given, **options, **changed})
        assert table.dtype == lengths.dtype == torch.int32
        return table.cpu(), lengths.cpu()

    def expected(self, b: int, h: int) -> list[int]:
        """Numbers of the pages in their row."""
        c, new = self.case, self.num_new[b]
        asked = self.queries[b, c.group * h : c.group * (h + 1), c.tokens - new :]
        # Pages at the end are those of all columns, padding or not.
        padding = asked[:, :1].expand(-1, c.tokens - new, -1)
        return listed_pages(
            torch.cat([padding, asked], 1), self.keys[b, h, : int(self.lengths[b, h])],
            page_size=c.page_size, share=c.share, mass=c.mass, least=c.least, newest=c.newest,
            scale=c.scale, softcap=c.softcap,
        )  # fmt: skip

    def check(self, b: int, h: int, listed: Tensor, length: Tensor) -> None:
        """``listed`` ``[X]`` are the pages of the definition, and ``length`` entries are theirs."""
        wanted = self.expected(b, h)
        held, size = int(self.lengths[b, h]), self.case.page_size
        pages = self.table[b, h, wanted].tolist()
        assert listed[: len(pages)].tolist() == pages
        assert (listed[len(pages) :] == -1).all()
        assert int(length) == sum(min(held, (p + 1) * size) - p * size for p in wanted)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shortlist_equals_the_definition(case: Case, device: torch.device) -> None:
    rows = Rows(case, device)
    listed, lengths = rows.listed()
    for b in range(3):
        for h in range(2):
            rows.check(b, h, listed[b, h], lengths[b, h])


def test_shortlist_of_a_choice_computed_by_hand(device: torch.device) -> None:
    """Two numbers a key that aren't 0, q = (1, -2). Bounds: 3 - 2 * -1 = 5, 1 - 2 * 2 = -3 and
    0 - 2 * -4 = 8: of four pages half is read, the newest and that of 8."""
    pages = torch.zeros(4, 2, 8, device=device)
    pages[:, :, :2] = torch.tensor([
        [(3, -1), (-9, 5)], [(1, 2), (0, 3)], [(0, -4), (-1, 9)], [(7, -7), (7, -7)]
    ])  # fmt: skip
    bounds = torch.cat([pages.amax(1), pages.amin(1)], -1)
    queries = torch.zeros(1, 1, 1, 8, device=device)
    queries[..., :2] = torch.tensor([1.0, -2.0])
    lengths = torch.tensor([[7]], dtype=torch.int32, device=device)
    table = torch.tensor([[[3, 0, 2, 1]]], dtype=torch.int32, device=device)
    bounds = bounds[[1, 3, 2, 0]]  # pages 3, 0, 2, 1 of the pool are the row's, in this order
    how = {"page_size": 2, "share": 0.5, "least": 0, "scale": 0.1}
    listed, held = shortlist(queries, bounds, lengths, table, **how)  # type: ignore[arg-type]
    assert listed.flatten().tolist() == [2, 1] and held.tolist() == [[3]]


def test_shortlist_top_p_of_the_worked_example(device: torch.device) -> None:
    """SpecAttn: of weights .5 .3 .1 .06 .04 three hold .85, from .099609 on."""
    weights = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04], device=device)
    bounds = torch.zeros(6, 16, device=device)
    bounds[:5, 0] = bounds[:5, 8] = weights.log()
    queries = torch.zeros(1, 1, 1, 8, device=device)
    queries[..., 0] = 1
    lengths = torch.tensor([[6]], dtype=torch.int32, device=device)
    table = torch.arange(6, dtype=torch.int32, device=device).view(1, 1, 6)
    for mass, count in ((0.85, 3), (0.79, 2), (0.4, 1)):
        listed, _ = shortlist(
            queries, bounds, lengths, table,
            page_size=1, share=1.0, least=0, mass=mass, scale=1.0,
        )  # fmt: skip
        assert listed.flatten().tolist() == [*range(count), 5] + [-1] * (5 - count)


def test_shortlist_takes_the_first_of_equal_pages(device: torch.device) -> None:
    rows = Rows(Case(share=0.5), device)
    rows.bounds = torch.ones_like(rows.bounds)
    listed, _ = rows.listed()
    assert listed[0, 0].tolist() == [*rows.table[0, 0, :10].tolist(), int(rows.table[0, 0, 20])]


@pytest.mark.parametrize("bad", [NAN, -math.inf])
def test_shortlist_takes_bounds_that_are_no_numbers_for_the_lowest(
    device: torch.device, bad: float
) -> None:
    """One page is spoilt: it is listed by no row, and the others as if it weren't there."""
    rows = Rows(Case(share=0.5), device)
    rows.bounds[rows.table[0, 0, 3].long()] = bad
    listed, lengths = rows.listed()
    assert (
        int(rows.table[0, 0, 3]) not in listed[0, 0].tolist() and int(lengths[0, 0]) == 11 * 8 - 3
    )
    rows.check(0, 1, listed[0, 1], lengths[0, 1])


def test_shortlist_of_a_resting_sequence_lists_the_newest_pages(device: torch.device) -> None:
    rows = Rows(Case(newest=2), device)
    none = torch.zeros(3, dtype=torch.int32, device=device)
    listed, lengths = rows.listed(num_new=none)
    assert listed[0, 0, :2].tolist() == rows.table[0, 0, 19:].tolist()
    assert (listed[0, 0, 2:] == -1).all() and int(lengths[0, 0]) == 8 + 5


@pytest.mark.parametrize(("batch", "pages"), [(0, 21), (3, 0)])
def test_shortlist_of_nothing(device: torch.device, batch: int, pages: int) -> None:
    rows = Rows(Case(), device)
    listed, lengths = rows.listed(
        queries=rows.queries[:batch].to(device),
        lengths=torch.zeros(batch, 2, dtype=torch.int32, device=device),
        block_table=rows.table[:batch, :, :pages].to(device),
        num_new=None,
    )
    assert listed.shape[:2] == (batch, 2) and (listed == -1).all() and not lengths.any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"share": 0.0}, "share must be above 0 and at most 1, got 0"),
        ({"share": 1.5}, "share must be above 0"),
        ({"mass": 0.0}, "mass must be above 0 and at most 1"),
        ({"newest": 0}, "newest must be at least 1, got 0"),
        ({"least": -1}, "least must not be negative, got -1"),
        ({"page_size": 257}, "page_size must be 1 to 256, got 257"),
        ({"page_size": 0}, "page_size must be 1 to 256|division"),
        ({"scale": NAN}, "scale must be finite"),
        ({"bounds": torch.zeros(4, 31)}, r"bounds must be contiguous \[N, 2 D\] with D = 16"),
        ({"bounds": torch.zeros(4, 64)[:, :32]}, "bounds must be contiguous"),
        ({"bounds": torch.zeros(4, 32).half()}, "bounds"),
        ({"lengths": torch.zeros(3, 2)}, "lengths"),
        (
            {"block_table": torch.full((3, 2, 21), 126, dtype=torch.int32)},
            r"block_table must name pages 0 \.\. 125, got 126 for sequence 0, kv head 0",
        ),
        ({"block_table": torch.zeros(3, 5, 9, dtype=torch.int32)}, "block_table"),
        ({"queries": torch.zeros(3, 5, 1, 16)}, "q heads must be 1 to 16 times"),
        ({"queries": None}, "queries"),
    ],
)
def test_shortlist_names_wrong_arguments(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rows(Case(), torch.device("cpu")).listed(**changed)


def test_shortlist_is_an_operator(device: torch.device) -> None:
    """As the function, under opcheck and in a compiled graph."""
    rows = Rows(replace(Case(), tokens=2), device)
    given = [x.to(device) for x in (rows.queries, rows.bounds, rows.lengths, rows.table)]
    how = {"page_size": 8, "share": 0.25, "least": 2}
    torch.library.opcheck(torch.ops.adakv.shortlist.default, given, how)
    expected = shortlist(*given, **how)  # type: ignore[arg-type]
    compiled = torch.compile(lambda *x: shortlist(*x, **how), fullgraph=True)(*given)
    for a, b in zip(compiled, expected, strict=True):
        assert torch.equal(a, b)
