"""attend over rows whose entries lie in several tiers: one call, and on a GPU one launch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from adakv import ops
from cases import copied, int32, mapped, noncontiguous, paged_layer, row_entries, with_biases
from tolerance import assert_close


@dataclass(frozen=True)
class Part:
    """One tier: entries of the same rows in pages of a format."""

    kv_dtype: str = "auto"
    lengths: tuple[tuple[int, ...], ...] = ((40, 300, 3), (17, 0, 33))  # [B][Hkv]
    page_size: int = 16
    dims: tuple[int, int] | None = None  # of keys and values, where they are its own
    column: int = 0

    def layer(self, case: Case, dtype: torch.dtype, device: torch.device, **more: Any) -> ops.Layer:
        key, value = self.dims or (case.head_dim, case.head_dim)
        lengths = [list(row) for row in self.lengths]
        sizes = {"page_size": self.page_size, "head_dim": key}
        sizes |= {"value_dim": value} if value != key else {}
        return paged_layer(
            lengths, **sizes, dtype=dtype, kv_dtype=self.kv_dtype, device=device, **more
        )

    def tier(self, case: Case, dtype: torch.dtype, device: torch.device) -> ops.Tier:
        layer, queries = self.layer(case, dtype, device), None
        if self.dims is not None:
            queries = case.queries(dtype, device, self.dims[0])
        return ops.Tier(layer, schedule_of(layer), queries, self.column)


@dataclass(frozen=True)
class Case:
    first: Part = Part(lengths=((21, 5, 64), (40, 31, 1)))
    others: tuple[Part, ...] = (Part("int4"),)
    group: int = 4
    tokens: int = 1
    head_dim: int = 64
    num_new: tuple[int, ...] | None = None
    has_sinks: bool = False

    def __str__(self) -> str:
        formats = "+".join(part.kv_dtype for part in (self.first, *self.others))
        shape = f"{formats}-G{self.group}-S{self.tokens}-D{self.head_dim}"
        return shape + ("-num_new" if self.num_new else "") + ("-sinks" if self.has_sinks else "")

    def queries(self, dtype: torch.dtype, device: torch.device, dim: int | None = None) -> Tensor:
        heads = len(self.first.lengths[0]) * self.group
        shape = len(self.first.lengths), heads, self.tokens, dim or self.head_dim
        return noncontiguous(torch.randn(shape).to(device, dtype))


LONG = ((700, 40), (0, 513))
LARGE = ((900, 400), (1200, 77))
CASES = [
    *[Case(others=(Part(kv_dtype, page_size=32),))
      for kv_dtype in ("int4", "int8", "fp8", "int2", "auto")],
    *[Case(others=(Part(kv_dtype, page_size=32),), head_dim=128, group=8, has_sinks=True)
      for kv_dtype in ("int4", "int8")],
    Case(Part("int8", LONG, 32), (Part("int4", LARGE),), head_dim=128),
    Case(Part("auto", LONG), (Part("int4", LARGE),), head_dim=128, group=2),
    Case(Part("auto", LONG), (Part("int8", LARGE, 32),), group=16),
    Case(Part("int4", LONG), (Part("auto", LARGE),), group=1),
    Case(Part("auto", LONG), (Part("int8", LARGE, 64), Part("int4", LONG), Part("fp8", LARGE, 32))),
    Case(Part("mixed"), (Part("int4"), Part("mixed"), Part("int2"))),
    Case(others=(Part("int4"),), head_dim=256, group=3),
    Case(others=(Part("auto", page_size=8), Part("int8")), head_dim=120, group=5),
    Case(others=(Part("int4"), Part("int8", page_size=32)), tokens=5, num_new=(3, 5)),
    Case(Part("auto", ((70, 300), (9, 80))), (Part("int4", ((0, 90), (33, 7))),), tokens=70,
         group=3, num_new=(70, 9)),
    Case(Part("auto", ((0, 3), (0, 1))), (Part("auto", ((0, 0), (30, 0))),)),
    # Channels of keys alone; coordinates of keys and values, of which one tier has fewer.
    Case(others=(Part("auto", dims=(40, 64)), Part("int8", dims=(24, 64), page_size=32))),
    Case(others=(Part("auto", dims=(32, 16), column=64), Part("auto", dims=(16, 8), column=64))),
    Case(others=(Part("int8", dims=(32, 32), column=128), Part("int4")), head_dim=128, tokens=3),
    # A half and a quarter of the dimensions: a row's workers have different columns of out.
    Case(Part("auto", LONG), (Part("auto", LARGE, dims=(64, 64), column=128),), head_dim=128),
    Case(Part("auto", LARGE), (Part("auto", LONG, dims=(32, 32), column=128),), head_dim=128,
         group=8, has_sinks=True),
    Case(Part("auto", LONG), (Part("auto", LARGE, 32, dims=(64, 64), column=128),
                              Part("auto", LONG, dims=(32, 32), column=128)), head_dim=128),
    Case(Part("auto", LONG), (Part("auto", LARGE, dims=(32, 32), column=64),
                              Part("auto", LONG, 32, dims=(16, 16), column=64)),
         has_sinks=True, group=5),
    Case(Part("auto", LARGE), (Part("auto", LONG), Part("auto", LONG, dims=(32, 32), column=96))),
    Case(Part("auto", ((3, 700), (70, 2))), (Part("auto", ((0, 0), (900, 0)), dims=(16, 16),
                                                  column=64),), group=2, tokens=2),
    Case(Part("int8", LONG, 32), (Part("fp8", LARGE, 32), Part("auto", LONG)), head_dim=128),
]  # fmt: skip


def schedule_of(layer: ops.Layer, new_tokens: int = 0, num_new: Tensor | None = None) -> Tensor:
    rows = layer.lengths[None], layer.block_table[None], layer.fresh_pages[None]
    page_size = layer.pages.shape[2]
    return ops.plan(*rows, new_tokens=new_tokens, num_new=num_new, page_size=page_size)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attend_over_tiers_is_as_defined(
    case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    """Twice: of tokens that are there, and of the same number more, which the call appends."""
    formats = {part.kv_dtype for part in (case.first, *case.others)}
    if dtype == torch.float32 and formats != {"auto"}:
        pytest.skip("codes stand for 16 bits")
    layer = case.first.layer(case, dtype, device, new_tokens=case.tokens)
    others = [part.tier(case, dtype, device) for part in case.others]
    queries = case.queries(dtype, device)
    num_new = None if case.num_new is None else int32(case.num_new, device)
    options: dict[str, Any] = {"num_new": num_new, "softcap": 3.0, "scale": 0.3}
    if case.has_sinks:
        options["sink_logits"] = torch.randn(queries.shape[1], device=device)

    def check(result: tuple[Tensor, Tensor], **more: Any) -> None:
        expected = reference.attend(queries, by_hand, others, **options, **more)
        baseline = reference.attend(queries, by_hand, others, **options, **more, dtype=dtype)
        for x, y, z, name in zip(result, expected, baseline, ("out", "lse"), strict=True):
            assert_close(x, y, z, name)

    by_hand = layer
    if min(map(min, case.first.lengths)) >= case.tokens:
        check(ops.attend(queries, layer, schedule_of(layer), others, **options))
    shape = (*layer.lengths.shape, case.tokens, case.head_dim)
    keys, values = (torch.randn(shape).to(device, dtype) for _ in "kv")
    by_hand = copied(layer)
    reference.append(keys, values, by_hand, num_new=num_new)
    schedule = schedule_of(layer, case.tokens, num_new)
    before = [copied(tier.layer) for tier in others]
    given = {"keys": keys, "values": values}
    for _ in range(2):  # what was counted in is as it was
        again = mapped(layer, torch.clone)
        result = ops.attend(queries, again, schedule, others, **given, **options, prefetch=False)
        check(result, appends=True)
    assert torch.equal(again.lengths.cpu(), by_hand.lengths)
    for tier, was in zip(others, before, strict=True):
        assert torch.equal(tier.layer.lengths.cpu(), was.lengths)


def test_attend_takes_tiers_of_which_some_have_biases(device: torch.device) -> None:
    case, dtype = Case(), torch.bfloat16
    first = with_biases(case.first.layer(case, dtype, device))
    layer = with_biases(Part().layer(case, dtype, device))
    others = [ops.Tier(layer, schedule_of(layer)), Part("int8").tier(case, dtype, device)]
    queries = case.queries(dtype, device)
    result = ops.attend(queries, first, schedule_of(first), others)
    expected = reference.attend(queries, first, others)
    baseline = reference.attend(queries, first, others, dtype=dtype)
    for x, y, z in zip(result, expected, baseline, strict=True):
        assert_close(x, y, z)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tiers_meet_in_more_than_16_bits(
    dtype: torch.dtype, tokens: int, device: torch.device
) -> None:
    """Seven tiers are as exact as the same entries in one: no result is rounded between them, which
    would make the error half as large again."""
    case = Case(first=Part(lengths=((160, 96),)), tokens=tokens, group=8)
    whole = case.first.layer(case, dtype, device)
    parts = []
    for begin, end in (*((i, i + 1) for i in range(6)), (6, 10)):
        table = noncontiguous(whole.block_table[..., begin:end])
        lengths = (whole.lengths - 16 * begin).clamp(0, 16 * (end - begin))
        parts.append(whole._replace(block_table=table, lengths=lengths))
    nothing = whole._replace(lengths=torch.zeros_like(whole.lengths))
    queries = case.queries(dtype, device)
    expected = reference.attend(queries, nothing, [ops.Tier(whole, schedule_of(whole))])[0]

    def error(layers: list[ops.Layer]) -> Tensor:
        tiers = [ops.Tier(layer, schedule_of(layer)) for layer in layers]
        out, _ = ops.attend(queries, nothing, schedule_of(nothing), tiers)
        return (out.double().cpu() - expected).square().mean().sqrt()

    assert error(parts) < 1.2 * error([whole])


@pytest.mark.parametrize("part", [Part("int4"), Part(dims=(32, 32), column=64)], ids=str)
def test_attend_over_tiers_of_nothing_gives_nothing(part: Part, device: torch.device) -> None:
    case = Case(first=Part(lengths=((0, 0), (0, 0))))
    part = replace(part, lengths=((0, 0), (0, 0)))
    for dtype in (torch.float16, torch.bfloat16):
        layer = case.first.layer(case, dtype, device)
        others = [part.tier(case, dtype, device)]
        queries = case.queries(dtype, device)
        out, lse = ops.attend(queries, layer, schedule_of(layer), others)
        assert not out.any()
        assert lse.isneginf().all()


def test_attend_does_not_append_to_other_tiers(device: torch.device) -> None:
    case = Case(first=Part(lengths=((20, 3),)), others=(Part(lengths=((15, 31),)),))
    layer = case.first.layer(case, torch.bfloat16, device, new_tokens=1)
    (tier,) = others = [case.others[0].tier(case, torch.bfloat16, device)]
    before = [x.clone() for x in row_entries(tier.layer, 0, 1)]
    keys = torch.randn(1, 2, 1, 64).to(device, torch.bfloat16)
    queries = case.queries(torch.bfloat16, device)
    ops.attend(queries, layer, schedule_of(layer, 1), others, keys=keys, values=keys)
    assert layer.lengths.tolist() == [[21, 4]]
    assert tier.layer.lengths.tolist() == [[15, 31]]
    for x, y in zip(row_entries(tier.layer, 0, 1), before, strict=True):
        assert torch.equal(x, y)


def test_attend_names_what_is_wrong_with_tiers(device: torch.device) -> None:
    case = Case(first=Part(lengths=((40, 7),)))
    dtype = torch.bfloat16
    layer, queries = case.first.layer(case, dtype, device), case.queries(dtype, device)
    tier = Part("int4", lengths=((40, 7),)).tier(case, dtype, device)
    schedule = schedule_of(layer)

    def fails(match: str, *others: ops.Tier, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            ops.attend(queries, layer, schedule, others, **options)

    fails("others must be at most 7, got 8", *[tier] * 8)
    fails(r"others\[0\]: column must not be negative, got -8", tier._replace(column=-8))
    fails(r"others\[1\]: schedule must be", tier, tier._replace(schedule=schedule[:-8]))
    fails(r"others\[0\]: queries must be", tier._replace(queries=queries[:, :-1]))
    fails(r"others\[0\]: .*must be", tier._replace(queries=queries.half()))
    rows = Part("int4", lengths=((40, 7, 1),)).tier(case, dtype, device)
    fails(r"others\[0\]: .* must be", rows)
    fails("at most 512", tier._replace(column=512))
    room = torch.zeros(1, 2, 4096, device=device)
    fails("accumulated must be left out with others", tier, accumulated=room)
    with pytest.raises(ValueError, match=r"others must be a sequence of adakv.ops.Tier"):
        ops.attend(queries, layer, schedule, [layer])
    with pytest.raises(ValueError, match=r"others must be a sequence of adakv.ops.Tier"):
        ops.attend(queries, layer, schedule, "tiers")
