"""Values of wrong types given to the verbs and to the cache: refused by the argument's name, and
nothing is changed."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import cases
from adakv import ops
from adakv.cache import KVCache

ENTRIES = torch.zeros(1, 2, 8, 8)
SCORES = torch.zeros(1, 2, 8)
BUDGETS = torch.full((1, 2), 3, dtype=torch.int32)
SIZES: dict[str, Any] = {
    "num_layers": 1,
    "num_sequences": 1,
    "num_kv_heads": 2,
    "head_dim": 8,
    "page_size": 16,
    "num_pages": 8,
    "max_row_pages": 4,
}

NO_INTEGERS = ["3", b"3", 2.5, 3.0, 1j, [3], 2**31, -(2**40), 2**70, np.float32(3), torch.ones(2)]
NO_NUMBERS = ["0.5", b"1", 1j, [0.5], torch.ones(2)]
NO_TENSORS = ["x", 3, 0.5, [1.0], np.zeros((1, 2, 8, 8), np.float32), (ENTRIES, ENTRIES)]
ODD_TENSORS = [
    ENTRIES.to("meta"),
    ENTRIES.to_sparse(),
    ENTRIES.bool(),
    ENTRIES.to(torch.complex64),
    torch.zeros(3),
    torch.zeros(()),
    torch.zeros(1, 2, 8, 8, 1),
]


def with_layer(call: Callable[[ops.Layer, torch.Tensor], Any]) -> Any:
    cache = KVCache(**SIZES, dtype=torch.float32)
    schedule = ops.plan(*cache.plan_inputs, new_tokens=0)[0]
    return call(cache.layer(0), schedule)


def plan(**options: Any) -> Any:
    cache = KVCache(**SIZES)
    return ops.plan(*cache.plan_inputs, **options)


INTEGERS: dict[str, Callable[[Any], Any]] = {
    "pool_width": lambda x: ops.score(ENTRIES, ENTRIES, pool_width=x),
    "stride": lambda x: ops.score(ENTRIES, ENTRIES, stride=x),
    "distance": lambda x: ops.score(ENTRIES, ENTRIES, distance=x),
    "budget": lambda x: ops.allocate(SCORES, x, window=2),
    "window": lambda x: ops.allocate(SCORES, 5, window=x),
    "select.window": lambda x: ops.select(SCORES, BUDGETS, window=x),
    "total": lambda x: ops.select(SCORES, BUDGETS, window=2, total=x),
    "new_tokens": lambda x: plan(new_tokens=x),
    "plan.page_size": lambda x: plan(page_size=x),
    **{name: lambda x, name=name: KVCache(**(SIZES | {name: x})) for name in SIZES},
    "layer": lambda x: KVCache(**SIZES).begin(x, [2], [2]),
    "first_sequence": lambda x: KVCache(**SIZES).begin(0, [2], [2], first_sequence=x),
    "reserve.num_pages": lambda x: KVCache(**SIZES).reserve(num_pages=x),
    "reserve.max_row_pages": lambda x: KVCache(**SIZES).reserve(max_row_pages=x),
    "num_new": lambda x: KVCache(**SIZES).grow([x], 1),
    "columns": lambda x: KVCache(**SIZES).grow([0], x),
    "pages_to_grow.num_new": lambda x: KVCache(**SIZES).pages_to_grow([x]),
    "sequence": lambda x: KVCache(**SIZES).remove(x),
    "num_kv_heads_of": lambda x: KVCache.pages_for(3, 1, num_kv_heads=x),
    "pages_for.page_size": lambda x: KVCache.pages_for(3, 1, num_kv_heads=1, page_size=x),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_what_is_no_integer_of_32_bits_is_refused_by_name(name: str) -> None:
    argument = name.rpartition(".")[2].removesuffix("_of")
    for wrong in NO_INTEGERS:
        with pytest.raises(ValueError, match=rf"\b{argument} must"):
            INTEGERS[name](wrong)
    if argument not in ("total", "stride"):
        with pytest.raises(ValueError, match="must"):
            INTEGERS[name](-3)


@pytest.mark.parametrize("name", [name for name in INTEGERS if name not in ("total", "page_size")])
def test_none_is_no_integer(name: str) -> None:
    with pytest.raises(ValueError, match=name.rpartition(".")[2].removesuffix("_of")):
        INTEGERS[name](None)


@pytest.mark.parametrize("name", ["total", "new_tokens"])
def test_counts_of_64_bits_are_refused_by_name(name: str) -> None:
    counts: dict[str, Any] = {"total": 40, "new_tokens": 3, "num_kv_heads": 2}
    for wrong in ["3", b"3", 2.5, 3.0, None, [3], 2**63, -(2**70), np.float32(3), torch.ones(2)]:
        with pytest.raises(
            ValueError, match=rf"\b{name} must be (an integer|at (least|most) \d+),"
        ):
            KVCache.pages_for(**(counts | {name: wrong}))
    with pytest.raises(ValueError, match=rf"^{name} must be at least 0, got -1"):
        KVCache.pages_for(**(counts | {name: -1}))
    with pytest.raises(ValueError, match=r"^new_tokens must be at most 2147483647, got"):
        KVCache.pages_for(40, 2**62, num_kv_heads=2)
    with pytest.raises(ValueError, match=r"^num_kv_heads must be at least 1, got 0"):
        KVCache.pages_for(40, 3, num_kv_heads=0)
    assert KVCache.pages_for(np.int64(40), np.uint8(3), num_kv_heads=np.int32(2)) == 6


def test_what_is_reserved_is_told_in_pythons_integers() -> None:
    cache = KVCache(**SIZES)
    cache.reserve(num_pages=np.int64(20), max_row_pages=np.uint8(6))
    assert (cache.num_pages, cache.max_row_pages) == (20, 6)
    assert type(cache.num_pages) is type(cache.max_row_pages) is int


def test_integers_of_numpy_are_integers() -> None:
    for kind in (np.int64, np.int32, np.uint8):
        assert ops.allocate(SCORES, kind(5), window=kind(2)).sum() == 10
        assert len(ops.select(SCORES, BUDGETS, window=kind(2), total=kind(6)).positions) == 6
        cache = KVCache(**{name: kind(size) for name, size in SIZES.items()})
        cache.begin(kind(0), [kind(4)], np.array([2]))
        assert cache.grow(np.array([1]), kind(1)) == 1
    with pytest.raises(ValueError, match=r"budget must be an integer of 32 bits, got 4294967296"):
        ops.allocate(SCORES, 2**32, window=2)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("scale", lambda x: ops.score(ENTRIES, ENTRIES, scale=x)),
        ("softcap", lambda x: ops.score(ENTRIES, ENTRIES, softcap=x)),
        ("floor", lambda x: ops.allocate(SCORES, 5, window=2, floor=x)),
        ("first", lambda x: ops.select(SCORES, BUDGETS, window=2, first=x)),
        ("eps", lambda x: ops.select(SCORES, BUDGETS, window=2, eps=x)),
        ("scale", lambda x: with_layer(lambda la, s: ops.attend(ENTRIES, la, s, scale=x))),
    ],
)
def test_what_is_no_number_is_refused_by_name(name: str, call: Callable[[Any], Any]) -> None:
    for wrong in NO_NUMBERS:
        with pytest.raises(ValueError, match=rf"\b{name} must"):
            call(wrong)
    for wrong in (1e300, float("nan"), float("-inf")):
        with pytest.raises(ValueError, match=rf"\b{name} must"):
            call(wrong)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("pool", lambda x: ops.score(ENTRIES, ENTRIES, pool=x)),
        ("norm", lambda x: ops.value_norm(ENTRIES, torch.zeros(8, 16), norm=x)),
        ("safeguard", lambda x: ops.allocate(SCORES, 5, window=2, safeguard=x)),
        ("dtype", lambda x: KVCache(**SIZES, dtype=x)),
        ("device", lambda x: KVCache(**SIZES, device=x)),
        ("prefetch", lambda x: with_layer(lambda la, s: ops.attend(ENTRIES, la, s, prefetch=x))),
    ],
)
def test_words_that_are_none_are_refused_by_name(name: str, call: Callable[[Any], Any]) -> None:
    for wrong in ("x", b"max", 3.5, None, [1], "\ud800"):
        with pytest.raises(ValueError, match=rf"\b{name} must"):
            call(wrong)


TENSORS: dict[str, Callable[[Any], Any]] = {
    "queries": lambda x: ops.score(x, ENTRIES),
    "keys": lambda x: ops.score(ENTRIES, x),
    "seq_lens": lambda x: ops.score(ENTRIES, ENTRIES, seq_lens=x),
    "values": lambda x: ops.value_norm(x, torch.zeros(8, 16)),
    "w_o": lambda x: ops.value_norm(ENTRIES, x),
    "allocate.scores": lambda x: ops.allocate(x, 5, window=2),
    "select.scores": lambda x: ops.select(x, BUDGETS, window=2),
    "budgets": lambda x: ops.select(SCORES, x, window=2),
    "budgets_of": lambda x: ops.select(SCORES, x, window=2, total=4),
    "norms": lambda x: ops.select(SCORES, BUDGETS, window=2, norms=x),
    "select.seq_lens": lambda x: ops.select(SCORES, BUDGETS, window=2, seq_lens=x),
    "lengths": lambda x: ops.plan(x, x, x),
    "plan.num_new": lambda x: plan(num_new=x),
    "attend.queries": lambda x: with_layer(lambda layer, s: ops.attend(x, layer, s)),
    "schedule": lambda x: with_layer(lambda layer, s: ops.attend(ENTRIES, layer, x)),
    "append.keys": lambda x: with_layer(lambda layer, s: ops.append(x, ENTRIES, layer)),
    "pages": lambda x: with_layer(
        lambda layer, s: ops.append(ENTRIES, ENTRIES, layer._replace(pages=x))
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_what_is_no_tensor_for_us_is_refused_by_name(name: str) -> None:
    argument = name.rpartition(".")[2].removesuffix("_of")
    for wrong in [*NO_TENSORS, *ODD_TENSORS]:
        if argument == "w_o" and isinstance(wrong, torch.Tensor) and wrong.dim() == 2:
            continue
        with pytest.raises(ValueError, match=rf"\b{argument} must"):
            TENSORS[name](wrong)


def negated(x: torch.Tensor) -> torch.Tensor:
    """The same numbers in a view of their negatives (torch's negative bit)."""
    return (-x)._neg_view()


def compact(keys: torch.Tensor, values: torch.Tensor) -> None:
    cache = KVCache(**SIZES, dtype=torch.float32)
    kept = ops.Kept(torch.arange(3).repeat(2).int(), torch.tensor([0, 3, 6]).int())
    ops.compact(keys, values, kept, cache.layer(0), *cache.begin(0, [6], [3]))


NEGATED: dict[str, Callable[[Any], Any]] = {
    **{name: TENSORS[name] for name in ("queries", "keys", "values", "allocate.scores")},
    **{name: TENSORS[name] for name in ("select.scores", "norms", "budgets")},
    "w_o": lambda x: ops.value_norm(ENTRIES, x[0]),
    "sink_logits": lambda x: ops.score(ENTRIES, ENTRIES, sink_logits=x),
    "lse": lambda x: ops.score(ENTRIES[:, :, :1], ENTRIES, lse=x),
    "compact.keys": lambda x: compact(x, ENTRIES),
    "compact.values": lambda x: compact(ENTRIES, x),
}
GIVEN = {"budgets": BUDGETS, "sink_logits": torch.ones(2), "lse": torch.ones(1, 2, 1)}
GIVEN |= dict.fromkeys(("allocate.scores", "select.scores", "norms"), torch.rand(1, 2, 8))
GIVEN["w_o"] = torch.randn(1, 8, 16)


@pytest.mark.parametrize("name", NEGATED)
def test_views_with_torchs_negative_bit_are_refused(name: str) -> None:
    """The memory that DLPack hands over holds the other signs."""
    given, argument = GIVEN.get(name, torch.randn(1, 2, 8, 8)), name.rpartition(".")[2]
    NEGATED[name](given)
    message = rf"\b{argument} must not have torch's negative bit, give its resolve_neg\(\)"
    with pytest.raises(ValueError, match=message):
        NEGATED[name](negated(given))
    NEGATED[name](negated(given).resolve_neg())


def test_imaginary_parts_of_what_is_conjugated_are_refused_in_a_step() -> None:
    """A step asks no tensor for its negative bit: their strides give them away."""
    entries = torch.complex(ENTRIES, torch.ones_like(ENTRIES)).conj().imag
    assert entries.is_neg()
    for call in (
        lambda: with_layer(lambda layer, s: ops.attend(entries, layer, s)),
        lambda: with_layer(lambda layer, s: ops.append(entries, ENTRIES, layer)),
        lambda: with_layer(lambda layer, s: ops.append(ENTRIES, entries, layer)),
    ):
        with pytest.raises(ValueError, match="must be contiguous in its last dimension"):
            call()


def test_a_layer_is_a_tuple_of_its_tensors() -> None:
    for wrong in (None, "layer", ENTRIES, (ENTRIES,) * 5, [ENTRIES] * 6):
        with pytest.raises(ValueError, match=r"layer must be an adakv\.ops\.Layer"):
            ops.append(ENTRIES, ENTRIES, wrong)  # type: ignore[arg-type]


def test_refused_calls_change_nothing() -> None:
    cache = KVCache(**SIZES, dtype=torch.float32)
    ids, indptr = cache.begin(0, [6], [3])
    kept = ops.Kept(torch.arange(3, dtype=torch.int32).repeat(2), torch.tensor([0, 3, 6]).int())
    entries = torch.randn(1, 2, 8, 8)
    ops.compact(entries, entries, kept, cache.layer(0), ids, indptr)
    before = cases.copied(cache.all_layers)
    free, pages = cache.num_free, cache.num_pages
    new = torch.randn(1, 2, 1, 8)
    schedule = ops.plan(*cache.plan_inputs)[0]
    planned = schedule.clone()
    for refused in [
        lambda: ops.append(new, new.to("meta"), cache.layer(0)),
        lambda: ops.append(new, new, cache.layer(0), num_new=torch.tensor([5]).int()),
        lambda: ops.attend(new, cache.layer(0), schedule, keys=new, values=new, scale="1"),
        lambda: ops.attend(new, cache.layer(0), schedule, keys=new, values=new, prefetch=None),
        lambda: ops.compact(entries, entries, kept, cache.layer(0), ids.long(), indptr),
        lambda: cache.begin(0, [2], [2]),
        lambda: cache.begin(0, "2", [2]),
        lambda: cache.grow([1.5], 2),
        lambda: cache.grow([2**31], 2**31),
        lambda: cache.reserve(num_pages=100, max_row_pages="4"),
        lambda: cache.reserve(num_pages=2**31),
        lambda: cache.remove(1),
    ]:
        with pytest.raises(ValueError):
            refused()
        assert all(map(torch.equal, cache.all_layers[:6], before[:6]))
        assert (cache.num_free, cache.num_pages, cache.max_row_pages) == (free, pages, 4)
        assert torch.equal(schedule, planned)


def test_rows_of_any_size_take_no_memory_before_they_are_used() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cache = KVCache(**(SIZES | {"num_layers": 32, "max_row_pages": 2**26}))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
    assert cache.layer(0).block_table.shape == (1, 2, 8)
    assert cache.max_row_pages == 2**26
    cache.begin(0, [40], [40])
    cache.reserve(num_pages=100)
    assert cache.layer(0).block_table.shape == (1, 2, 100)
    assert (cache.all_layers.block_table == -1).all()
