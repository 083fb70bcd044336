"""append: new entries at the end of every row, against the definition; and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

import cases
import reference
from adakv import ops


@dataclass(frozen=True)
class Case:
    lengths: tuple[tuple[int, ...], ...] = ((5, 16, 0), (31, 1, 47))
    columns: int = 1
    num_new: tuple[int, ...] | None = None
    page_size: int = 16
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    kv_dtype: str = "auto"
    value_dim: int | None = None

    def __str__(self) -> str:
        text = f"S{self.columns}-P{self.page_size}-D{self.head_dim}-{str(self.dtype)[6:]}"
        text += f"-{self.kv_dtype}-{self.lengths}"
        text += "" if self.value_dim is None else f"-Dv{self.value_dim}"
        return text + (f"-new{self.num_new}" if self.num_new else "")


CASES = [
    Case(),
    Case(dtype=torch.float16, head_dim=80),
    Case(dtype=torch.bfloat16, head_dim=128, columns=3, page_size=8),
    Case(columns=16),
    Case(columns=100, num_new=(100, 37)),
    Case(columns=5, num_new=(0, 5)),
    Case(columns=2, num_new=(0, 0)),
    Case(columns=0),
    Case(lengths=((), ()), columns=2),
    Case(lengths=((3,),) * 3, columns=512, page_size=32, head_dim=256),
    *(
        replace(case, dtype=dtype, kv_dtype=kv_dtype)
        for dtype, kv_dtype in cases.FORMATS[3:]
        for case in (
            Case(columns=3, page_size=8, head_dim=80),
            Case(columns=40, num_new=(40, 0), head_dim=128),
            Case(lengths=((), ()), columns=2),
        )
    ),
    *(
        replace(case, dtype=dtype, kv_dtype=kv_dtype, page_size=32)
        for dtype, kv_dtype in cases.TAILED
        for case in (
            Case(columns=1, head_dim=80),
            Case(columns=3, head_dim=8),
            Case(columns=100, num_new=(100, 37), head_dim=128),
            Case(lengths=((3,),) * 3, columns=512, head_dim=256),
            Case(lengths=((), ()), columns=2),
        )
    ),
    Case(lengths=((3,),) * 3, columns=512, head_dim=256, dtype=torch.bfloat16, kv_dtype="int8"),
    *(
        replace(case, dtype=dtype, kv_dtype=kv_dtype)
        for dtype, kv_dtype in cases.FORMATS
        for case in (
            Case(value_dim=32),
            Case(head_dim=192, value_dim=128, columns=40, num_new=(40, 0)),
            Case(head_dim=8, value_dim=256, columns=3, page_size=8),
        )
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_append_equals_the_definition(case: Case, device: torch.device) -> None:
    layer = cases.paged_layer(
        [list(row) for row in case.lengths],
        page_size=case.page_size,
        head_dim=case.head_dim,
        value_dim=case.value_dim,
        dtype=case.dtype,
        kv_dtype=case.kv_dtype,
        new_tokens=case.columns,
        device=device,
    )
    batch, heads = layer.lengths.shape
    shape = (batch, heads, case.columns)
    keys, values = (
        cases.noncontiguous(torch.randn(*shape, dim).to(device, case.dtype))
        for dim in (case.head_dim, case.value_dim or case.head_dim)
    )
    for b, count in enumerate(case.num_new or ()):  # left padding
        keys[b, :, : case.columns - count] = values[b, :, : case.columns - count] = float("nan")
    num_new = None if case.num_new is None else cases.int32(case.num_new, device)
    expected = cases.copied(layer)
    reference.append(keys.cpu(), values.cpu(), expected, num_new=num_new)
    ops.append(keys, values, layer, num_new=num_new)
    cases.assert_same_layer(layer, expected)


def test_append_one_by_one_equals_all_at_once(device: torch.device) -> None:
    together = cases.paged_layer([[3, 16], [40, 7]], new_tokens=40, device=device)
    single = cases.mapped(together, torch.clone)
    keys, values = (torch.randn(2, 2, 40, 64, device=device) for _ in range(2))
    ops.append(keys, values, together)
    taken = torch.zeros(2, 2, dtype=torch.int32, device=device)
    for i in range(40):  # the caller hands out what is left of the fresh pages
        boundary = single.lengths % 16 == 0
        ops.append(keys[:, :, i : i + 1], values[:, :, i : i + 1], single)
        taken += boundary
        index = taken.clamp(max=together.fresh_pages.shape[2] - 1).long()
        single.fresh_pages[..., 0] = together.fresh_pages.gather(2, index[..., None])[..., 0]
    single.fresh_pages.copy_(together.fresh_pages)
    cases.assert_same_layer(single, cases.copied(together))


def test_append_refuses_rows_without_room_and_changes_nothing() -> None:
    keys = torch.randn(2, 2, 1, 64)
    for spoil, message in [
        (lambda layer: layer.fresh_pages[1, 1].fill_(-1), "sequence 1 has no fresh page"),
        (lambda layer: layer.fresh_pages[1, 1].fill_(10**6), "sequence 1 has no fresh page"),
    ]:
        layer = cases.paged_layer([[3, 5], [7, 16]])
        spoil(layer)
        before = cases.copied(layer)
        with pytest.raises(ValueError, match=message):
            ops.append(keys, keys, layer)
        cases.assert_same_layer(layer, before)
    layer = cases.paged_layer([[64, 64]])
    layer = layer._replace(block_table=layer.block_table[..., :4])
    with pytest.raises(ValueError, match="needs 5 pages; the block table has room for 4"):
        ops.append(keys[:1], keys[:1], layer)
