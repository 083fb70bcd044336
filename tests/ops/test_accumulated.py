"""What attend accumulates, against its definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from accumulated import accumulate
from adakv import ops
from cases import FORMATS, TAILED, copied, int32, noncontiguous, paged_layer
from ops.test_attend import Case, layer_of, options_of, random_queries, schedule_of
from tolerance import assert_close

CASES = [
    Case(),
    Case(head_dim=128, group=8),
    Case(head_dim=128, group=16),
    Case(head_dim=80, group=1),
    Case(head_dim=96, group=3),
    Case(head_dim=256, group=2),
    Case(head_dim=256, group=16),
    Case(head_dim=8, group=16),
    Case(head_dim=120, group=5, page_size=8),
    Case(page_size=256, lengths=((700, 256, 1),)),
    Case(page_size=256, lengths=((5000, 40),), group=8, head_dim=128),
    Case(lengths=((2000, 5, 70), (0, 0, 0), (1, 900, 0))),
    Case(lengths=((3000,),), group=2, head_dim=128),
    Case(with_sinks=True, softcap=3.0),
    Case(new_tokens=5, lengths=((40, 300, 6), (17, 16, 33)), num_new=(3, 5), with_sinks=True),
    Case(new_tokens=3, lengths=((40, 300, 6), (17, 16, 33)), group=2, head_dim=128),
    Case(new_tokens=70, lengths=((70, 300), (200, 111)), num_new=(70, 9), softcap=2.0, group=3),
]
WAYS: list[dict[str, Any]] = [
    {"accumulate": "sum"},
    {"accumulate": "sum", "decay": 0.9, "group_reduce": "max"},
    {"accumulate": "max", "group_reduce": "sum"},
]


def some_accumulated(layer: ops.Layer) -> Tensor:
    """What was there before, and NaN where no row has an entry."""
    most = layer.block_table.shape[2] * layer.page_positions.shape[1]
    before = torch.rand(*layer.lengths.shape, most + 5)
    behind = torch.arange(most + 5) >= layer.lengths.cpu()[..., None]
    before[behind] = torch.nan
    return noncontiguous(before.to(layer.lengths.device))


def expected_of(before: Tensor, way: dict[str, Any], *args: Any, **options: Any) -> Tensor:
    renamed = {("how" if name == "accumulate" else name): value for name, value in way.items()}
    return accumulate(*args, before, **renamed, **options)


def assert_last(actual: Tensor, *args: Any, threshold: float, **options: Any) -> None:
    """The last time is that of the definition, but for probabilities as large as the threshold."""
    low, high = (
        accumulate(*args, how="last", threshold=threshold * factor, **options)
        for factor in (0.98, 1.02)
    )
    actual = actual.cpu().double()
    assert torch.equal(actual.isnan(), low.isnan())
    held = ~low.isnan()
    assert bool(((high <= actual) & (actual <= low))[held].all())
    assert int((high != low)[held].sum()) <= held.sum() * 0.1  # the test says something


@pytest.mark.parametrize(("dtype", "kv_dtype"), FORMATS + TAILED, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_accumulated_equals_definition(
    case: Case, dtype: torch.dtype, kv_dtype: str, device: torch.device
) -> None:
    layer = layer_of(case, dtype, kv_dtype, device)
    queries, options = random_queries(case, dtype, device), options_of(case, device)
    before, schedule = some_accumulated(layer), schedule_of(layer, new_tokens=0)
    attended = [
        reference.attend(queries, layer, dtype=x, **options) for x in (torch.float64, dtype)
    ]
    for way in WAYS:
        after = before.clone()
        results = ops.attend(queries, layer, schedule, accumulated=after, **way, **options)
        for got, wanted, plain in zip(results, *attended, strict=True):
            assert_close(got, wanted, plain)
        (_, exact), (_, plain) = attended
        expected = expected_of(before, way, queries, layer, lse=exact, **options)
        baseline = expected_of(before, way, queries, layer, lse=plain, dtype=dtype, **options)
        assert_close(after, expected, baseline, str(way))


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 1, 10, 13, 15)], ids=str)
@pytest.mark.parametrize("group_reduce", ["mean", "max"])
def test_the_last_time_equals_definition(
    case: Case, group_reduce: str, device: torch.device
) -> None:
    layer = layer_of(case, torch.float32, "auto", device)
    queries, options = random_queries(case, torch.float32, device), options_of(case, device)
    before, schedule = some_accumulated(layer), schedule_of(layer, new_tokens=0)
    options["group_reduce"] = group_reduce
    for threshold in (0.02, 0.3):
        after = before.clone()
        way = {"accumulate": "last", "threshold": threshold}
        ops.attend(queries, layer, schedule, accumulated=after, **way, **options)
        assert_last(after, queries, layer, before, threshold=threshold, **options)


def test_without_a_threshold_it_is_what_equal_attention_would_give(device: torch.device) -> None:
    """A token that looks at one entry far more than at the others: 1 / n lies between them."""
    layer = paged_layer([[40, 20]], seen=[90], device=device)
    layer.pages.nan_to_num_(0.0)
    layer.pages[:, 0] = 0
    first = layer.block_table[0, :, 0].long()
    layer.pages[first, 0, 3] = 1.0  # [Hkv, D]: the key of slot 3 of both rows
    queries = torch.ones(1, 4, 1, 64, device=device)
    accumulated = torch.zeros(1, 2, layer.block_table.shape[2] * 16, device=device)
    schedule = schedule_of(layer, new_tokens=0)
    ops.attend(queries, layer, schedule, accumulated=accumulated, accumulate="last")
    expected = torch.zeros_like(accumulated)
    expected[..., 3] = 90
    assert torch.equal(accumulated, expected)


@pytest.mark.parametrize(("dtype", "kv_dtype"), FORMATS + TAILED, ids=str)
@pytest.mark.parametrize("new_tokens", [1, 3])
def test_accumulated_over_many_steps(
    dtype: torch.dtype, kv_dtype: str, new_tokens: int, device: torch.device
) -> None:
    """Tokens are appended along, pages begin and end, and whatever a new slot held is forgotten."""
    case = Case(lengths=((62, 15, 31), (0, 28, 100)), head_dim=128)
    steps = 5
    layer = paged_layer(
        [list(row) for row in case.lengths],
        head_dim=128,
        dtype=dtype,
        kv_dtype=kv_dtype,
        new_tokens=new_tokens * steps,
        device=device,
    )
    by_hand = copied(layer)
    after = some_accumulated(layer)
    expected, baseline = after.double(), after.double()
    way = {"accumulate": "sum", "decay": 0.9}
    for step in range(steps):
        keys, values = (torch.randn(2, 3, new_tokens, 128).to(device, dtype) for _ in "kv")
        queries = random_queries(replace(case, new_tokens=new_tokens), dtype, device)
        counts = int32((new_tokens, new_tokens - step % 2), device)
        schedule = schedule_of(layer, new_tokens=new_tokens, num_new=counts)
        ops.attend(
            queries, layer, schedule, keys=keys, values=values, num_new=counts,
            accumulated=after, **way,
        )  # fmt: skip
        reference.append(keys, values, by_hand, num_new=counts)
        options = {"num_new": counts, "appends": True}
        expected = expected_of(expected, way, queries, by_hand, **options)
        baseline = expected_of(baseline, way, queries, by_hand, dtype=dtype, **options)
    assert_close(after, expected, baseline)


def test_accumulated_gives_the_same_bits_for_any_number_of_threads() -> None:
    """And attention has those that it has without."""
    cpu = torch.device("cpu")
    for case in (CASES[10], CASES[15]):
        layer = layer_of(case, torch.float32, "auto", cpu)
        queries, options = random_queries(case, torch.float32, cpu), options_of(case, cpu)
        before, schedule = some_accumulated(layer), schedule_of(layer, new_tokens=0)
        threads, results = torch.get_num_threads(), []
        plain, _ = ops.attend(queries, layer, schedule, **options)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(before.clone())
            out, _ = ops.attend(queries, layer, schedule, accumulated=results[-1], **options)
            assert torch.equal(out, plain)
        torch.set_num_threads(threads)
        for other in results[1:]:
            assert torch.equal(results[0].nan_to_num(-1), other.nan_to_num(-1))


def test_what_is_wrong_is_named(device: torch.device) -> None:
    layer = paged_layer([[40, 7]], device=device)
    queries = torch.randn(1, 4, 1, 64, device=device)
    schedule = schedule_of(layer, new_tokens=0)
    room = layer.block_table.shape[2] * 16
    right = torch.zeros(1, 2, room, device=device)
    for options, message in [
        ({"accumulated": right[..., :-1]}, rf"T at least M \* P = {room}"),
        ({"accumulated": right[:, :1]}, "accumulated must be"),
        ({"accumulated": right.double()}, "float32"),
        ({"accumulated": right, "decay": 1.5}, "decay must lie in 0 .. 1, got 1.5"),
        ({"accumulated": right, "threshold": -1.0}, "threshold must be 0"),
        ({"accumulated": right, "accumulate": "mean"}, "accumulate must be one of 'sum', 'max'"),
        ({"accumulated": right, "group_reduce": "min"}, "group_reduce must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.attend(queries, layer, schedule, **options)
    assert not right.any()
