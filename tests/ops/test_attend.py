"""attend against its definition, over pages as hostile as the cache may make them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from adakv import ops
from cases import (
    DTYPES,
    FORMATS,
    TAILED,
    copied,
    int32,
    noncontiguous,
    paged_layer,
    with_biases,
)
from tolerance import assert_close


@dataclass(frozen=True)
class Case:
    lengths: tuple[tuple[int, ...], ...] = ((40, 300, 3), (17, 16, 33))  # [B][Hkv]
    group: int = 4
    new_tokens: int = 1
    head_dim: int = 64
    page_size: int = 16
    num_new: tuple[int, ...] | None = None
    softcap: float | None = None
    scale: float | None = None
    with_sinks: bool = False
    value_dim: int | None = None

    def __str__(self) -> str:
        longest = max(map(max, self.lengths))
        shape = f"n{longest}-G{self.group}-S{self.new_tokens}-D{self.head_dim}-P{self.page_size}"
        flags = [
            name for name in ("num_new", "softcap", "scale", "with_sinks") if getattr(self, name)
        ]
        if self.value_dim is not None:
            flags.append(f"Dv{self.value_dim}")
        return "-".join([shape, *flags])


CASES = [
    Case(),
    Case(head_dim=128, group=8),
    Case(head_dim=80, group=1),
    Case(head_dim=96, group=3),
    Case(head_dim=256, group=2),
    Case(head_dim=256, group=16),
    Case(head_dim=8, group=16),
    Case(head_dim=120, group=5, page_size=8),
    Case(page_size=256, lengths=((700, 256, 1),)),
    Case(page_size=256, lengths=((5000, 40),), group=8, head_dim=128),
    Case(lengths=((2000, 5, 70), (0, 0, 0), (1, 900, 0))),
    Case(lengths=((3000,),), group=2),
    Case(with_sinks=True, softcap=3.0, scale=0.3),
    Case(new_tokens=5, lengths=((40, 300, 5), (17, 16, 33))),
    Case(new_tokens=5, lengths=((40, 300, 6), (17, 16, 33)), num_new=(3, 5), with_sinks=True),
    Case(new_tokens=70, lengths=((70, 300), (200, 111)), group=3),
    Case(new_tokens=70, lengths=((70, 300), (200, 111)), num_new=(70, 9), softcap=2.0),
    Case(new_tokens=40, lengths=((900,),), group=1, head_dim=128, page_size=32),
]
#: Values narrower and wider than keys, which int4 doesn't hold.
UNEVEN = [
    Case(value_dim=32),
    Case(head_dim=128, value_dim=64, group=8, page_size=32),
    Case(head_dim=192, value_dim=128, group=2, lengths=((2000, 5, 70), (0, 0, 0), (1, 900, 0))),
    Case(head_dim=64, value_dim=256, group=16, softcap=3.0, with_sinks=True),
    Case(head_dim=8, value_dim=120, group=5, page_size=8),
    Case(head_dim=256, value_dim=8, page_size=256, lengths=((700, 256, 1),)),
    Case(
        head_dim=192,
        value_dim=128,
        new_tokens=5,
        lengths=((40, 300, 6), (9, 16, 33)),
        num_new=(3, 5),
    ),
    Case(value_dim=32, new_tokens=70, lengths=((70, 300), (200, 111)), group=3, scale=0.3),
]
#: With the formats of pages.
FORMATTED = [
    *((case, *of) for case in CASES for of in FORMATS + TAILED),
    *((case, *of) for case in UNEVEN for of in FORMATS),
]


def schedule_of(layer: ops.Layer, **options: Any) -> Tensor:
    return ops.plan(
        layer.lengths[None],
        layer.block_table[None],
        layer.fresh_pages[None],
        page_size=layer.pages.shape[2],
        **options,
    )[0]


def layer_of(case: Case, dtype: torch.dtype, kv_dtype: str, device: torch.device) -> ops.Layer:
    return paged_layer(
        [list(row) for row in case.lengths],
        page_size=case.page_size,
        head_dim=case.head_dim,
        value_dim=case.value_dim,
        dtype=dtype,
        kv_dtype=kv_dtype,
        device=device,
    )


def random_queries(case: Case, dtype: torch.dtype, device: torch.device) -> Tensor:
    heads = len(case.lengths[0]) * case.group
    shape = (len(case.lengths), heads, case.new_tokens, case.head_dim)
    return noncontiguous(torch.randn(shape).to(device, dtype))


def options_of(case: Case, device: torch.device) -> dict[str, Any]:
    heads = len(case.lengths[0]) * case.group
    return {
        "num_new": None if case.num_new is None else int32(case.num_new, device),
        "sink_logits": torch.randn(heads, device=device) if case.with_sinks else None,
        "scale": case.scale,
        "softcap": case.softcap,
    }


@pytest.mark.parametrize(("case", "dtype", "kv_dtype"), FORMATTED, ids=str)
def test_attend_equals_definition(
    case: Case, dtype: torch.dtype, kv_dtype: str, device: torch.device
) -> None:
    layer = layer_of(case, dtype, kv_dtype, device)
    queries, options = random_queries(case, dtype, device), options_of(case, device)
    schedule = schedule_of(layer, new_tokens=0)
    out, lse = ops.attend(queries, layer, schedule, **options)
    expected_out, expected_lse = reference.attend(queries, layer, **options)
    baseline_out, baseline_lse = reference.attend(queries, layer, dtype=dtype, **options)
    assert_close(out, expected_out, baseline_out, "out")
    assert_close(lse, expected_lse, baseline_lse, "lse")


def test_attend_adds_biases_by_hand(device: torch.device) -> None:
    """Logits 0, 0 and log 2 with biases log 3, 0 and -40: weights 3 / 4, 1 / 4 and nearly 0."""
    layer = with_biases(paged_layer([[3]], head_dim=8, device=device))
    page = int(layer.block_table[0, 0, 0])
    layer.pages[page, :, :3] = 0
    layer.pages[page, 0, 2, 0] = math.log(2) * math.sqrt(8)
    layer.pages[page, 1, :3, 0] = torch.tensor([4.0, 8.0, 100.0])
    assert layer.page_biases is not None
    layer.page_biases[page, :3] = torch.tensor([math.log(3), 0, -40]).half()
    queries = torch.tensor([1.0] + [0.0] * 7, device=device).view(1, 1, 1, 8)
    out, lse = ops.attend(queries, layer, schedule_of(layer, new_tokens=0))
    assert out[0, 0, 0, 0].item() == pytest.approx(5, abs=2e-3)
    assert lse.item() == pytest.approx(math.log(4), abs=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + UNEVEN, ids=str)
def test_attend_with_biases_equals_definition(
    case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    layer = with_biases(layer_of(case, dtype, "auto", device))
    queries, options = random_queries(case, dtype, device), options_of(case, device)
    out, lse = ops.attend(queries, layer, schedule_of(layer, new_tokens=0), **options)
    expected_out, expected_lse = reference.attend(queries, layer, **options)
    baseline_out, baseline_lse = reference.attend(queries, layer, dtype=dtype, **options)
    assert_close(out, expected_out, baseline_out, "out")
    assert_close(lse, expected_lse, baseline_lse, "lse")


@pytest.mark.parametrize("group", [1, 12])
def test_attend_keeps_infinite_values_in_their_dimension(group: int, device: torch.device) -> None:
    case, dtype = Case(lengths=((300, 37),), group=group, page_size=16), torch.bfloat16
    layer = paged_layer([[300, 37]], page_size=16, dtype=dtype, device=device)
    page = layer.block_table[0, 0, 2]
    layer.pages[page, 1, 3, 5] = float("inf")
    layer.pages[page, 1, 7, 9] = float("-inf")
    queries = random_queries(case, dtype, device)
    out, lse = ops.attend(queries, layer, schedule_of(layer, new_tokens=0))
    expected_out, expected_lse = reference.attend(queries, layer)
    baseline_out, baseline_lse = reference.attend(queries, layer, dtype=dtype)
    assert expected_out.isinf().sum() == 2 * group
    assert_close(out, expected_out, baseline_out, "out")
    assert_close(lse, expected_lse, baseline_lse, "lse")


@pytest.mark.parametrize("value_dim", [64, 32], ids=lambda dim: f"Dv{dim}")
@pytest.mark.parametrize("num_new", [None, (3, 1)], ids=str)
def test_attend_appends_first(
    num_new: tuple[int, ...] | None, value_dim: int, device: torch.device
) -> None:
    sizes = {"new_tokens": 3, "value_dim": value_dim}
    layer = paged_layer([[40, 15], [16, 100]], dtype=torch.bfloat16, device=device, **sizes)
    by_hand = copied(layer)
    keys, values = (
        noncontiguous(torch.randn(2, 2, 3, dim).to(device, torch.bfloat16))
        for dim in (64, value_dim)
    )
    queries = torch.randn(2, 8, 3, 64).to(device, torch.bfloat16)
    counts = None if num_new is None else int32(num_new, device)
    schedule = schedule_of(layer, new_tokens=3, num_new=counts)
    out, lse = ops.attend(queries, layer, schedule, keys=keys, values=values, num_new=counts)
    reference.append(keys, values, by_hand, num_new=counts)
    assert torch.equal(layer.lengths.cpu(), by_hand.lengths)
    assert torch.equal(layer.block_table.cpu(), by_hand.block_table)
    expected = reference.attend(queries, by_hand, num_new=counts)
    baseline = reference.attend(queries, by_hand, num_new=counts, dtype=torch.bfloat16)
    assert_close(out, expected[0], baseline[0], "out")
    assert_close(lse, expected[1], baseline[1], "lse")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attend_over_everything_is_full_attention(dtype: torch.dtype, device: torch.device) -> None:
    layer = paged_layer([[333, 333]], dtype=dtype, device=device)
    queries = torch.randn(1, 6, 50, 64).to(device, dtype)
    out, _ = ops.attend(queries, layer, schedule_of(layer, new_tokens=0))
    pages = layer.block_table[0, :, :21].long()
    held = layer.pages[pages].transpose(1, 2).reshape(2, 2, -1, 64)[:, :, :333]  # [Hkv, 2, T, D]
    keys, values = (x.repeat_interleave(3, 0)[None] for x in held.unbind(1))
    mask = torch.ones(50, 333, dtype=torch.bool, device=device).tril(283)
    full = torch.nn.functional.scaled_dot_product_attention
    expected = full(queries.double(), keys.double(), values.double(), mask)
    assert_close(out, expected, full(queries, keys, values, mask))


@pytest.mark.parametrize("slope", [0.05, 0.3, 0.9, -0.3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attend_follows_logits_that_climb(
    dtype: torch.dtype, slope: float, device: torch.device
) -> None:
    """By less than a power of 256 in 16 slots, and by more, and fall: a maximum may come late."""
    layer = paged_layer([[600]], dtype=dtype, device=device)
    pages = layer.block_table[0, 0, :38].long()
    climb = slope * (torch.arange(608, device=device) % 90).view(38, 16)
    layer.pages[pages, 0, :, 0] = climb.to(dtype)
    queries = torch.randn(1, 4, 1, 64, device=device).to(dtype)
    queries[..., 0] = 8  # the square root of the head dim
    out, lse = ops.attend(queries, layer, schedule_of(layer, new_tokens=0))
    held = layer.pages[pages].transpose(0, 1).reshape(2, 1, 1, 608, 64)[..., :600, :]
    keys, values = held.expand(2, 1, 4, 600, 64)
    full = torch.nn.functional.scaled_dot_product_attention
    expected = full(queries.double(), keys.double(), values.double())
    assert_close(out, expected, full(queries, keys, values))
    logits = queries.double() @ keys.double().transpose(-1, -2) / 8
    baseline = (queries.float() @ keys.float().transpose(-1, -2) / 8).logsumexp(-1)
    assert_close(lse, logits.logsumexp(-1), baseline)


def test_attend_merges_lse_as_one_softmax(device: torch.device) -> None:
    """Two caches that split the entries, joined through lse, are one cache."""
    layer = paged_layer([[96]], device=device)
    queries = torch.randn(1, 4, 1, 64, device=device)
    expected, expected_lse = reference.attend(queries, layer)
    baseline, baseline_lse = reference.attend(queries, layer, dtype=torch.float32)
    parts = []
    for begin, end in ((0, 3), (3, 6)):
        part = layer._replace(
            block_table=layer.block_table[..., begin:end].contiguous(),
            lengths=torch.full_like(layer.lengths, 48).contiguous(),
        )
        parts.append(ops.attend(queries, part, schedule_of(part, new_tokens=0)))
    (out_a, lse_a), (out_b, lse_b) = parts
    lse = torch.logaddexp(lse_a, lse_b)
    merged = out_a * (lse_a - lse)[..., None].exp() + out_b * (lse_b - lse)[..., None].exp()
    assert_close(merged, expected, baseline)
    assert_close(lse, expected_lse, baseline_lse)


@pytest.mark.parametrize("case", [CASES[8], CASES[9], CASES[12], CASES[14]], ids=str)
def test_attend_gives_the_same_bits_for_any_number_of_threads(case: Case) -> None:
    device = torch.device("cpu")
    layer = paged_layer([list(row) for row in case.lengths], head_dim=case.head_dim)
    queries, options = random_queries(case, torch.float32, device), options_of(case, device)
    schedule = schedule_of(layer, new_tokens=0)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.attend(queries, layer, schedule, **options))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        assert torch.equal(results[0][1], other[1])


def test_attend_gives_the_same_bits_when_it_prefetches(device: torch.device) -> None:
    layer = paged_layer([[40, 700], [9, 300]], device=device)
    queries, schedule = torch.randn(2, 4, 1, 64, device=device), schedule_of(layer, new_tokens=0)
    expected = ops.attend(queries, layer, schedule)
    for out, lse in [ops.attend(queries, layer, schedule, prefetch=True) for _ in range(5)]:
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])


def test_attend_ignores_the_order_of_sequences(device: torch.device) -> None:
    layer = paged_layer([[40, 700], [9, 300]], device=device)
    queries = torch.randn(2, 4, 1, 64, device=device)
    swapped = layer._replace(
        block_table=layer.block_table.flip(0),
        lengths=layer.lengths.flip(0),
        seen=layer.seen.flip(0),
    )
    other, _ = ops.attend(queries.flip(0), swapped, schedule_of(swapped, new_tokens=0))
    expected, _ = reference.attend(queries, layer)
    baseline, _ = reference.attend(queries, layer, dtype=torch.float32)
    assert_close(other.flip(0), expected, baseline)


def test_attend_names_what_is_wrong(device: torch.device) -> None:
    layer = paged_layer([[40, 7]], device=device)
    queries = torch.randn(1, 4, 1, 64, device=device)
    schedule = schedule_of(layer, new_tokens=0)
    with pytest.raises(ValueError, match="q heads"):
        ops.attend(queries[:, :3], layer, schedule)
    with pytest.raises(ValueError, match="float32"):
        ops.attend(queries.half(), layer, schedule)
    with pytest.raises(ValueError, match="schedule"):
        ops.attend(queries, layer, schedule[:-1])
