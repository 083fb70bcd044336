"""compact: pages, tables and counts after a prompt, against the definition; and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

import cases
import reference
from adakv import ops


@dataclass(frozen=True)
class Case:
    batch: int = 2
    heads: int = 3
    length: int = 100
    most: int = 60
    page_size: int = 16
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    seq_lens: tuple[int, ...] | None = None
    kv_dtype: str = "auto"
    value_dim: int | None = None

    def __str__(self) -> str:
        text = f"{self.batch}x{self.heads}-T{self.length}-b{self.most}-P{self.page_size}"
        text += f"-D{self.head_dim}-{str(self.dtype)[6:]}-{self.kv_dtype}"
        text += "" if self.value_dim is None else f"-Dv{self.value_dim}"
        return text + ("-ragged" if self.seq_lens else "")


CASES = [
    Case(),
    Case(dtype=torch.float16, head_dim=80, page_size=8),
    Case(dtype=torch.bfloat16, head_dim=128, page_size=32),
    Case(batch=3, seq_lens=(100, 17, 64)),
    Case(heads=8, length=1000, most=500),
    *(
        replace(case, dtype=dtype, kv_dtype=kv_dtype)
        for dtype, kv_dtype in cases.FORMATS[3:]
        for case in (Case(), Case(head_dim=96, page_size=8, seq_lens=(100, 17)))
    ),
    Case(length=32, most=32, head_dim=256, dtype=torch.float16, kv_dtype="int8"),
    *(
        replace(case, dtype=dtype, kv_dtype=kv_dtype, page_size=32)
        for dtype, kv_dtype in cases.TAILED
        for case in (
            Case(),
            Case(head_dim=96, seq_lens=(100, 17)),
            Case(length=32, most=32, head_dim=8),
            Case(length=300, most=250, head_dim=256),
        )
    ),
    *(
        replace(case, dtype=dtype, kv_dtype=kv_dtype)
        for dtype, kv_dtype in cases.FORMATS
        for case in (
            Case(value_dim=32),
            Case(head_dim=192, value_dim=128, page_size=32, seq_lens=(100, 17)),
            Case(head_dim=8, value_dim=256, page_size=8),
        )
    ),
]
CORNERS = [
    Case(batch=0),
    Case(length=1, most=1, head_dim=8),
    Case(most=0),  # nothing is kept
    Case(seq_lens=(0, 100)),
    Case(length=32, most=32, page_size=8, head_dim=256),
]


def kept_of(case: Case, device: torch.device, full_pages: bool = False) -> ops.Kept:
    """Random positions, ascending in each row; with ``full_pages`` rows fill their last page."""
    rows = []
    for r in range(case.batch * case.heads):
        seq_len = (case.seq_lens or (case.length,) * case.batch)[r // case.heads]
        count = min(int(torch.randint(case.most + 1, ())), seq_len)
        count -= count % case.page_size if full_pages else 0
        rows.append(torch.randperm(seq_len)[:count].sort().values)
    ends = torch.tensor([0] + [len(row) for row in rows]).cumsum(0)
    positions = torch.cat([*rows, torch.full((5,), -1)])  # longer than needed
    return ops.Kept(positions.int().to(device), ends.int().to(device))


def pages_of(
    case: Case, kept: ops.Kept, device: torch.device, spare: int = 3
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Shuffled page ids for each sequence, their indptr and the size of the pool."""
    counts = -(-kept.indptr.cpu().diff().view(case.batch, case.heads) // case.page_size)
    needed = counts.sum(1) + case.heads + spare
    indptr = torch.cat([torch.zeros(1), needed.cumsum(0)]).int()
    ids = torch.randperm(2 * int(indptr[-1]) + 1)[: int(indptr[-1])].int()
    return ids.to(device), indptr.to(device), 2 * int(indptr[-1]) + 1


def some_of(
    entries: torch.Tensor, kept: ops.Kept, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is kept of ``[B, Hkv, T, D]``, in some order, as ``[B, Hkv, K, D]``, and its places."""
    heads, count = entries.shape[1], len(order)
    rows = kept.rows(entries.shape[0] * heads)[order]
    flat = entries[rows // heads, rows % heads, kept.positions[order].long()]
    places = torch.full_like(kept.positions, -1)
    places[order] = torch.arange(count, dtype=torch.int32, device=places.device)
    return flat.expand(*entries.shape[:2], count, -1), places


@pytest.mark.parametrize("given", ["ragged", "full_pages", "places"])
@pytest.mark.parametrize("case", CASES + CORNERS, ids=str)
def test_compact_equals_the_definition(case: Case, given: str, device: torch.device) -> None:
    prompt = cases.Prompt(
        batch=case.batch,
        kv_heads=case.heads,
        length=case.length,
        head_dim=case.head_dim,
        dtype=case.dtype,
        seq_lens=case.seq_lens,
    )
    keys = prompt.entries(device)
    values = replace(prompt, head_dim=case.value_dim or case.head_dim).entries(device)
    kept = kept_of(case, device, given == "full_pages")
    ids, indptr, num_pages = pages_of(case, kept, device)
    layer = cases.empty_layer(
        case.batch,
        case.heads,
        num_pages=num_pages,
        columns=-(-case.length // case.page_size) + 1,
        page_size=case.page_size,
        head_dim=case.head_dim,
        value_dim=case.value_dim,
        dtype=case.dtype,
        kv_dtype=case.kv_dtype,
        device=device,
    )
    expected = cases.copied(layer)
    seq_lens, places = prompt.lengths(device), None
    if given == "places" and seq_lens is None:
        seq_lens = torch.full((case.batch,), case.length, dtype=torch.int32, device=device)
    reference.compact(keys.cpu(), values.cpu(), kept, expected, ids, indptr, seq_lens=seq_lens)
    if given == "places":
        order = torch.randperm(int(kept.indptr[-1])).to(device)
        (keys, places), (values, _) = (some_of(x, kept, order) for x in (keys, values))
    ops.compact(keys, values, kept, layer, ids, indptr, places=places, seq_lens=seq_lens)
    cases.assert_same_layer(layer, expected)


def test_compact_leaves_the_pages_of_others_alone(device: torch.device) -> None:
    case = Case(batch=1)
    kept = kept_of(case, device)
    ids, indptr, num_pages = pages_of(case, kept, device)
    layer = cases.empty_layer(1, case.heads, num_pages=num_pages, columns=8, device=device)
    prompt = cases.Prompt(batch=1, kv_heads=case.heads)
    ops.compact(prompt.entries(device), prompt.entries(device), kept, layer, ids, indptr)
    others = torch.ones(num_pages, dtype=torch.bool)
    others[ids.cpu().long()] = False
    assert layer.pages.cpu()[others].isnan().all()
    assert (layer.page_positions.cpu()[others] == -7).all()


def test_compact_names_what_does_not_fit_and_changes_nothing() -> None:
    case = Case(batch=1, heads=2)
    prompt = cases.Prompt(batch=1, kv_heads=2)
    keys = prompt.entries(torch.device("cpu"))
    good = ops.Kept(cases.int32(range(40)), cases.int32([0, 30, 40]))
    pages, ends = cases.int32(range(5)), cases.int32([0, 5])
    broken = [
        (good, pages[:4], cases.int32([0, 4]), "sequence 0 needs 5 pages, got 4"),
        (good, cases.int32([0, 1, 2, 3, 99]), ends, "page_ids must lie in 0 .. 5, got 99"),
        (good, pages, cases.int32([0, 6]), "page_indptr must lie in 0 .. 5"),
        (ops.Kept(good.positions + 70, good.indptr), pages, ends, "positions must lie in 0 .. 99"),
        (ops.Kept(good.positions, cases.int32([0, 30, 41])), pages, ends, "at most 40"),
        (ops.Kept(good.positions, cases.int32([0, 30, 20])), pages, ends, "indptr must ascend"),
        (ops.Kept(good.positions, cases.int32([0, 0, 40])), pages, ends, "has room for 2"),
    ]
    for kept, ids, indptr, message in broken:
        layer = cases.empty_layer(1, case.heads, num_pages=6, columns=2)
        before = cases.copied(layer)
        with pytest.raises(ValueError, match=message):
            ops.compact(keys, keys, kept, layer, ids, indptr)
        for a, b in zip(layer[:6], before[:6], strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_compact_names_what_is_wrong_with_places() -> None:
    keys = cases.Prompt(batch=1, kv_heads=2).entries(torch.device("cpu"))
    kept = ops.Kept(cases.int32(range(40)), cases.int32([0, 30, 40]))
    layer = cases.empty_layer(1, 2, num_pages=6, columns=2)
    entries, pages = (keys, keys, kept, layer), (cases.int32(range(5)), cases.int32([0, 5]))
    seen = cases.int32([1000])
    for places, message in (
        (kept.positions[1:], r"places must be \[K = 40\], got \[39\]"),
        (kept.positions + 61, "places must lie in 0 .. 99, got 100"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.compact(*entries, *pages, places=places, seq_lens=seen)
    with pytest.raises(ValueError, match="seq_lens must be given with places"):
        ops.compact(*entries, *pages, places=kept.positions)
    below = ops.Kept(kept.positions - 1, kept.indptr)
    with pytest.raises(ValueError, match="positions must not be negative, got -1"):
        ops.compact(keys, keys, below, layer, *pages, places=kept.positions, seq_lens=seen)


IN_PLACE = [
    *((dtype, kv_dtype, 16, (64, 64)) for dtype, kv_dtype in cases.FORMATS),
    (torch.bfloat16, "auto", 8, (128, 128)),
    (torch.float16, "auto", 256, (80, 80)),
    (torch.float32, "auto", 16, (256, 256)),
    (torch.bfloat16, "int8", 32, (24, 24)),
    (torch.float16, "fp8", 16, (256, 256)),
    *((dtype, kv_dtype, 16, (192, 128)) for dtype, kv_dtype in cases.FORMATS),
    (torch.bfloat16, "auto", 8, (24, 256)),
]


@pytest.mark.parametrize("dtype, kv_dtype, page_size, widths", IN_PLACE, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.97, 1.0])
def test_compact_in_place_equals_the_definition(
    share: float,
    dtype: torch.dtype,
    kv_dtype: str,
    page_size: int,
    widths: tuple[int, int],
    device: torch.device,
) -> None:
    lengths = [[100, 1, 700, 16], [0, 64, 333, 2049], [5, 5, 5, 40]]
    layer = cases.paged_layer(
        lengths,
        page_size=page_size,
        head_dim=widths[0],
        value_dim=widths[1],
        dtype=dtype,
        kv_dtype=kv_dtype,
        device=device,
    )
    rows = [torch.nonzero(torch.rand(n) <= share)[:, 0] for row in lengths for n in row]
    if share == 1:
        rows[2] = torch.cat([torch.arange(600), torch.arange(601, 700)])  # one leaves
    ends = torch.tensor([0] + [len(row) for row in rows]).cumsum(0)
    kept = ops.Kept(
        torch.cat([*rows, torch.full((5,), -1)]).int().to(device), ends.int().to(device)
    )
    # Which pages stay: of each sequence some of its own, in any order, and strange ones.
    used = layer.block_table.cpu(), layer.fresh_pages.cpu()
    free = torch.randperm(len(layer.pages))
    free = free[~torch.isin(free, torch.cat([x.flatten() for x in used]))].int()
    ids, indptr = [], [0]
    for b in range(3):
        needed = 4 + sum(-(-len(row) // page_size) for row in rows[4 * b : 4 * b + 4])
        own = torch.cat([x[b].flatten() for x in used])
        own = own[own >= 0].int()
        own = own[torch.randperm(len(own))][: needed + 2]
        strangers = max(needed - len(own), 0)
        ids += [own, free[:strangers]]
        free = free[strangers:]
        indptr.append(indptr[-1] + len(own) + strangers)
    page_ids, page_indptr = torch.cat(ids).to(device), cases.int32(indptr, device)
    expected = cases.copied(layer)
    reference.compact(
        None, None, (kept.positions.cpu(), ends), expected, page_ids.cpu(), page_indptr.cpu()
    )
    ops.compact(None, None, kept, layer, page_ids, page_indptr)
    cases.assert_same_layer(layer, expected)


def test_compact_in_place_refuses_what_is_wrong() -> None:
    layer = cases.paged_layer([[20, 30]], dtype=torch.bfloat16)
    before = cases.copied(layer)
    pages = torch.cat([layer.block_table.flatten(), layer.fresh_pages.flatten()])
    pages = pages[pages >= 0].int()
    kept = ops.Kept(cases.int32([0, 3, 5, 7]), cases.int32([0, 2, 4]))
    both = cases.int32([0, len(pages)])
    x = torch.randn(1, 2, 40, 64).bfloat16()
    for message, change in (
        ("keys and values must be given together", {"values": x}),
        (r"must ascend within a row and lie in 0 \.\. 19, got 20", {"positions": [0, 20, 5, 7]}),
        (r"must ascend within a row and lie in 0 \.\. 29, got 5", {"positions": [0, 3, 5, 5]}),
        ("sequence 0 needs 4 pages, got 3", {"page_indptr": [0, 3]}),
        (r"page_ids must lie in 0 \.\. ", {"page_ids": [-1, *pages.tolist()[1:]]}),
        ("indptr must ascend", {"indptr": [0, 3, 2]}),
    ):
        given = {"positions": kept.positions, "indptr": kept.indptr, "page_ids": pages}
        given |= {"page_indptr": both, "values": None}
        given |= {
            k: v if isinstance(v, torch.Tensor) else cases.int32(v) for k, v in change.items()
        }
        with pytest.raises(ValueError, match=message):
            ops.compact(
                None,
                given["values"],
                ops.Kept(given["positions"], given["indptr"]),
                layer,
                given["page_ids"],
                given["page_indptr"],
            )
        cases.assert_same_layer(layer, before)
    for kind in ("int4", "int2"):
        tailed = cases.paged_layer([[20, 30]], dtype=torch.bfloat16, kv_dtype=kind)
        with pytest.raises(ValueError, match=f"must be given for a layer of {kind}"):
            ops.compact(None, None, kept, tailed, pages, both)
