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

    def __str__(self) -> str:
        text = f"{self.batch}x{self.heads}-T{self.length}-b{self.most}-P{self.page_size}"
        text += f"-D{self.head_dim}-{str(self.dtype)[6:]}-{self.kv_dtype}"
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
        replace(case, dtype=dtype, kv_dtype="int4", page_size=32)
        for dtype, _ in cases.INT4
        for case in (
            Case(),
            Case(head_dim=96, seq_lens=(100, 17)),
            Case(length=32, most=32, head_dim=8),
            Case(length=300, most=250, head_dim=256),
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


@pytest.mark.parametrize("full_pages", [False, True], ids=["ragged", "full_pages"])
@pytest.mark.parametrize("case", CASES + CORNERS, ids=str)
def test_compact_equals_the_definition(case: Case, full_pages: bool, device: torch.device) -> None:
    prompt = cases.Prompt(
        batch=case.batch,
        kv_heads=case.heads,
        length=case.length,
        head_dim=case.head_dim,
        dtype=case.dtype,
        seq_lens=case.seq_lens,
    )
    keys, values = prompt.entries(device), prompt.entries(device)
    kept = kept_of(case, device, full_pages)
    ids, indptr, num_pages = pages_of(case, kept, device)
    layer = cases.empty_layer(
        case.batch,
        case.heads,
        num_pages=num_pages,
        columns=-(-case.length // case.page_size) + 1,
        page_size=case.page_size,
        head_dim=case.head_dim,
        dtype=case.dtype,
        kv_dtype=case.kv_dtype,
        device=device,
    )
    expected = cases.copied(layer)
    seq_lens = prompt.lengths(device)
    reference.compact(keys.cpu(), values.cpu(), kept, expected, ids, indptr, seq_lens=seq_lens)
    ops.compact(keys, values, kept, layer, ids, indptr, seq_lens=seq_lens)
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
