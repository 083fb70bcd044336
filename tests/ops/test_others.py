"""attend that goes on from attention over other entries: one launch for each part of them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import reference
from adakv import ops
from cases import FORMATS, TAILED, copied, int32, noncontiguous, paged_layer, with_biases
from tolerance import assert_close


@dataclass(frozen=True)
class Case:
    lengths: tuple[tuple[int, ...], ...] = ((40, 300, 3), (17, 0, 33))  # [B][Hkv]
    group: int = 4
    tokens: int = 1
    head_dim: int = 64
    page_size: int = 16
    num_new: tuple[int, ...] | None = None

    def __str__(self) -> str:
        shape = f"n{max(map(max, self.lengths))}-G{self.group}-S{self.tokens}-D{self.head_dim}"
        return f"{shape}-P{self.page_size}" + ("-num_new" if self.num_new else "")

    def layer(self, dtype: torch.dtype, kv_dtype: str, device: torch.device) -> ops.Layer:
        lengths = [list(row) for row in self.lengths]
        sizes = {"page_size": self.page_size, "head_dim": self.head_dim}
        return paged_layer(lengths, **sizes, dtype=dtype, kv_dtype=kv_dtype, device=device)

    def queries(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        heads = len(self.lengths[0]) * self.group
        shape = len(self.lengths), heads, self.tokens, self.head_dim
        return noncontiguous(torch.randn(shape).to(device, dtype))


CASES = [
    Case(),
    Case(head_dim=128, group=8, page_size=32),
    Case(head_dim=256, group=16),
    Case(head_dim=80, group=1),
    Case(head_dim=120, group=5, page_size=8),
    Case(lengths=((5000, 40),), group=2, page_size=256),
    Case(tokens=5, num_new=(3, 5)),
    Case(tokens=5, lengths=((0, 2, 1),)),
    Case(tokens=70, lengths=((70, 300), (0, 11)), group=3, num_new=(70, 9)),
]


def schedule_of(layer: ops.Layer) -> Tensor:
    rows = layer.lengths[None], layer.block_table[None], layer.fresh_pages[None]
    return ops.plan(*rows, new_tokens=0, page_size=layer.pages.shape[2])[0]


def others_of(queries: Tensor) -> tuple[Tensor, Tensor]:
    """What other entries might have given: lse of all sizes, and nothing to some queries."""
    out = noncontiguous(torch.randn_like(queries))
    lse = noncontiguous(6 * torch.randn(queries.shape[:3], device=queries.device))
    nothing = torch.rand(lse.shape, device=queries.device) < 0.2
    lse[nothing], out[nothing] = float("-inf"), 0
    return out, lse


@pytest.mark.parametrize(("dtype", "kv_dtype"), FORMATS + TAILED, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attend_goes_on_from_others_as_defined(
    case: Case, dtype: torch.dtype, kv_dtype: str, device: torch.device
) -> None:
    layer, queries = case.layer(dtype, kv_dtype, device), case.queries(dtype, device)
    others = others_of(queries)
    num_new = None if case.num_new is None else int32(case.num_new, device)
    options = {"num_new": num_new, "softcap": 3.0, "scale": 0.3}
    given = {"others_out": others[0], "others_lse": others[1]}
    out, lse = ops.attend(queries, layer, schedule_of(layer), **options, **given)
    expected = reference.attend(queries, layer, **options, others=others)
    baseline = reference.attend(queries, layer, **options, others=others, dtype=dtype)
    assert_close(out, expected[0], baseline[0], "out")
    assert_close(lse, expected[1], baseline[1], "lse")


def test_attend_goes_on_over_entries_with_biases(device: torch.device) -> None:
    layer = with_biases(Case().layer(torch.bfloat16, "auto", device))
    queries = Case().queries(torch.bfloat16, device)
    out, lse = others = others_of(queries)
    result = ops.attend(queries, layer, schedule_of(layer), others_out=out, others_lse=lse)
    expected = reference.attend(queries, layer, others=others)
    baseline = reference.attend(queries, layer, others=others, dtype=torch.bfloat16)
    for x, y, z in zip(result, expected, baseline, strict=True):
        assert_close(x, y, z)


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_of_entries_are_attended_to_as_the_whole(
    dtype: torch.dtype, tokens: int, device: torch.device
) -> None:
    """One launch appends the new tokens, with the sinks; two others go on over older entries."""
    sizes = {"dtype": dtype, "device": device}
    whole = paged_layer([[96, 80]], **sizes, new_tokens=tokens)
    sinks = torch.randn(4, device=device)
    keys, values = (torch.randn(1, 2, tokens, 64, device=device).to(dtype) for _ in "kv")
    queries = torch.randn(1, 4, tokens, 64, device=device).to(dtype)
    parts = []
    for begin, end, lengths in ((4, 6, (32, 16)), (0, 2, (32, 32)), (2, 4, (32, 32))):
        table = torch.full_like(whole.block_table, -1)
        table[..., : end - begin] = whole.block_table[..., begin:end]
        parts.append(whole._replace(block_table=table, lengths=int32([lengths], device)))
    by_hand = copied(whole)
    newest, *older = parts
    rows = newest.lengths[None], newest.block_table[None], newest.fresh_pages[None]
    schedule = ops.plan(*rows, new_tokens=tokens)[0]
    out, lse = ops.attend(queries, newest, schedule, keys=keys, values=values, sink_logits=sinks)
    for part in older:
        before = out.clone(), lse.clone()
        given = {"others_out": out, "others_lse": lse}
        out, lse = ops.attend(queries, part, schedule_of(part), **given, prefetch=True)
        assert torch.equal(before[0], given["others_out"])
        assert torch.equal(before[1], given["others_lse"])
    reference.append(keys, values, by_hand)
    expected = reference.attend(queries, by_hand, sink_logits=sinks)
    baseline = reference.attend(queries, newest, sink_logits=sinks, dtype=dtype)
    for part in older:  # plain torch rounds between them, too
        baseline = reference.attend(queries, part, others=baseline, dtype=dtype)
    assert_close(out, expected[0], baseline[0], "out")
    assert_close(lse, expected[1], baseline[1], "lse")


def test_attend_passes_others_on_where_rows_hold_nothing(device: torch.device) -> None:
    case = Case(lengths=((0, 0), (0, 0)))
    layer, queries = (
        case.layer(torch.bfloat16, "auto", device),
        case.queries(torch.bfloat16, device),
    )
    out, lse = others_of(queries)
    result = ops.attend(queries, layer, schedule_of(layer), others_out=out, others_lse=lse)
    assert torch.equal(result[0], out)
    assert torch.equal(result[1], lse)


def test_attend_names_what_is_wrong_with_others(device: torch.device) -> None:
    case = Case(lengths=((40, 7),))
    layer, queries = case.layer(torch.float32, "auto", device), case.queries(torch.float32, device)
    out, lse = others_of(queries)
    schedule = schedule_of(layer)
    with pytest.raises(ValueError, match="others_out and others_lse must be given together"):
        ops.attend(queries, layer, schedule, others_out=out)
    with pytest.raises(ValueError, match="others_lse must be"):
        ops.attend(queries, layer, schedule, others_out=out, others_lse=lse[:, :-1])
    with pytest.raises(ValueError, match="others_out"):
        ops.attend(queries, layer, schedule, others_out=out.half(), others_lse=lse)
    keys = torch.randn(1, 2, 1, 64, device=device)
    sinks, room = torch.zeros(8, device=device), torch.zeros(1, 2, 4096, device=device)
    for more in ({"keys": keys, "values": keys}, {"sink_logits": sinks}, {"accumulated": room}):
        with pytest.raises(ValueError, match="must be left out with others_out"):
            ops.attend(queries, layer, schedule, others_out=out, others_lse=lse, **more)
