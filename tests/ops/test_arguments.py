"""Wrong arguments: each gives an error that names the argument, what was expected and what came."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import adakv
from adakv import ops
from adakv.cache import KVCache

B, HQ, HKV, T, W, D, S = 2, 4, 2, 40, 8, 16, 3


@pytest.fixture
def layer() -> ops.Layer:
    return make_cache().layer(0)


def make_cache(**changes: Any) -> KVCache:
    sizes: dict[str, Any] = {
        "num_layers": 1,
        "num_sequences": B,
        "num_kv_heads": HKV,
        "head_dim": D,
        "num_pages": 40,
        "max_row_pages": 8,
        "dtype": torch.float32,
    }
    return KVCache(**(sizes | changes))


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def score(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "queries": torch.zeros(B, HQ, W, D),
        "keys": torch.zeros(B, HKV, T, D),
    }
    ops.score(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": torch.zeros(B, HQ, W)}, "queries must be [B, Hq, W, D], got [2, 4, 8]"),
        (
            {"keys": torch.zeros(B, HKV, T, 8)},
            "keys must be [B = 2, Hkv, T, D = 16], got [2, 2, 40, 8]",
        ),
        (
            {"keys": torch.zeros(B, 3, T, D)},
            "q heads must be 1 to 16 times the kv heads, got Hq = 4 and Hkv = 3",
        ),
        (
            {"keys": torch.zeros(B, HKV, T, D, dtype=torch.bfloat16)},
            "keys must be float32 like queries, got bfloat16",
        ),
        (
            {"keys": torch.zeros(B, HKV, D, T).mT},
            "keys must be contiguous in its last dimension, got a stride of 40",
        ),
        (
            {"queries": torch.zeros(B, HQ, W, D, dtype=torch.float64)},
            "queries must be float32, float16, bfloat16 or int32",
        ),
        ({"queries": [1.0]}, "queries must be a torch.Tensor, got <class 'list'>"),
        (
            {"queries": torch.zeros(B, HQ, W, 20), "keys": torch.zeros(B, HKV, T, 20)},
            "head dim D must be a multiple of 8",
        ),
        (
            {"queries": torch.zeros(B, HQ, W, 264), "keys": torch.zeros(B, HKV, T, 264)},
            "at most 256, got 264",
        ),
        ({"seq_lens": ints(40, 41)}, "seq_lens must lie in 0 .. 40, got 41 for sequence 1"),
        ({"seq_lens": ints(-1, 40)}, "seq_lens must lie in 0 .. 40, got -1 for sequence 0"),
        ({"seq_lens": ints(40)}, "seq_lens must be [B = 2], got [1]"),
        (
            {"seq_lens": torch.tensor([40, 40])},
            "seq_lens must be float32, float16, bfloat16 or int32, got torch.int64",
        ),
        ({"sink_logits": torch.zeros(3)}, "sink_logits must be [Hq = 4], got [3]"),
        ({"lse": torch.zeros(B, HQ, 3)}, "lse must be [B = 2, Hq = 4, W = 8], got [2, 4, 3]"),
        ({"scale": float("nan")}, "scale must be finite, got nan"),
        ({"softcap": -1.0}, "softcap must be 0 (none) or more, got -1"),
        ({"pool_width": 4}, "pool_width must be odd"),
        ({"pool": "median"}, "pool must be one of 'max', 'avg', 'none', got 'median'"),
        ({"order": "both"}, "order must be one of 'group_first', 'pool_first', got 'both'"),
        ({"group_reduce": "min"}, "group_reduce must be one of 'mean', 'max', 'sum', got 'min'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_score_names_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        score(**changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.value_norm(torch.zeros(B, HKV, T, D), torch.zeros(10, 40)),
            "w_o must be [E, Hq * D]",
        ),
        (
            lambda: ops.value_norm(torch.zeros(B, HKV, T, D), torch.zeros(10, 64), norm="l3"),
            "norm must be one of",
        ),
        (
            lambda: ops.allocate(torch.zeros(B, HKV, T), 4, window=8),
            "budget must be at least the window, got budget = 4 and window = 8",
        ),
        (
            lambda: ops.allocate(torch.zeros(B, HKV, T), 4, window=-1),
            "window must not be negative, got -1",
        ),
        (
            lambda: ops.allocate(torch.zeros(B, HKV, T), 9, window=8, floor=1.5),
            "floor must lie in 0 .. 1, got 1.5",
        ),
        (
            lambda: ops.allocate(torch.zeros(B, HKV, T), 9, window=8, safeguard="hope"),
            "safeguard must be one of",
        ),
        (
            lambda: ops.allocate(torch.zeros(B, HKV, T).half(), 9, window=8),
            "scores must be float32, got float16",
        ),
        (
            lambda: ops.select(torch.zeros(B, HKV, T), torch.zeros(B, 3).int(), window=8),
            "budgets must be [B = 2, Hkv = 2], got [2, 3]",
        ),
        (
            lambda: ops.select(
                torch.zeros(B, HKV, T), torch.ones(B, HKV).int(), window=8, first=2.0
            ),
            "first must lie in 0 .. 1, got 2",
        ),
        (
            lambda: ops.select(
                torch.zeros(B, HKV, T), torch.ones(B, HKV).int(), window=8, eps=-1.0
            ),
            "eps must be 0 or more, got -1",
        ),
        (
            lambda: ops.plan(
                torch.zeros(1, B, HKV).int(),
                torch.zeros(1, B, HKV, 4).int(),
                torch.zeros(1, B, HKV, 1).int(),
                page_size=12,
            ),
            "page_size must be a power of two",
        ),
        (
            lambda: ops.plan(
                torch.zeros(1, B, HKV).int(),
                torch.zeros(1, B, HKV, 4).int(),
                torch.zeros(1, B, HKV, 1).int(),
                num_new=ints(0, 2),
            ),
            "num_new must lie in 0 .. 1, got 2",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_prefill_verbs_name_what_is_wrong(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_append_names_what_is_wrong(layer: ops.Layer) -> None:
    new = torch.zeros(B, HKV, S, D)
    for call, message in [
        (
            lambda: ops.append(new, new[:, :1], layer),
            "values must be [B = 2, Hkv = 2, S = 3, D = 16]",
        ),
        (
            lambda: ops.append(new.half(), new.half(), layer),
            "pages must be float16 like keys, got float32",
        ),
        (
            lambda: ops.append(new, new, layer, num_new=ints(1, 4)),
            "num_new must lie in 0 .. 3, got 4",
        ),
        (
            lambda: ops.append(new[:1], new[:1], layer),
            "block_table must be [B = 1, Hkv = 2, M], got [2, 2, 8]",
        ),
        (
            lambda: ops.append(new.repeat(1, 1, 200, 1), new.repeat(1, 1, 200, 1), layer),
            "at most F * P = 512 tokens",
        ),
    ]:
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)
    assert layer.lengths.sum() == 0


def test_attend_names_what_is_wrong(layer: ops.Layer) -> None:
    queries, new = torch.zeros(B, HQ, S, D), torch.zeros(B, HKV, S, D)
    schedule = ops.plan(layer.lengths[None], layer.block_table[None], layer.fresh_pages[None])[0]
    for call, message in [
        (lambda: ops.attend(queries, layer, schedule[1:]), "schedule must be ["),
        (
            lambda: ops.attend(queries, layer, schedule, keys=new),
            "keys and values must be given together",
        ),
        (
            lambda: ops.attend(queries[:, :3], layer, schedule),
            "q heads must be 1 to 16 times the kv heads",
        ),
        (
            lambda: ops.attend(queries.bfloat16(), layer, schedule),
            "pages must be bfloat16 like queries, got float32",
        ),
        (
            lambda: ops.attend(queries, layer, schedule, sink_logits=torch.zeros(HQ).double()),
            "sink_logits must be float32",
        ),
    ]:
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)


def test_compact_names_what_is_wrong(layer: ops.Layer) -> None:
    keys = torch.zeros(B, HKV, T, D)
    kept = ops.Kept(torch.zeros(8, dtype=torch.int32), torch.zeros(B * HKV, dtype=torch.int32))
    with pytest.raises(ValueError, match="indptr must have 5 elements, got 4"):
        ops.compact(keys, keys, kept, layer, ints(0), ints(0, 1, 1))
    kept = ops.Kept(kept.positions, torch.zeros(B * HKV + 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="page_indptr must have 3 elements, got 2"):
        ops.compact(keys, keys, kept, layer, ints(0), ints(0, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 12}, "head_dim must be a multiple of 8, at most 256, got 12"),
        ({"page_size": 10}, "page_size must be a power of two from 8 to 256, got 10"),
        ({"num_pages": 0}, "num_pages must be at least 1, got 0"),
        ({"num_sequences": 0}, "num_sequences must be at least 1, got 0"),
        ({"dtype": torch.float64}, "dtype must be float32, float16 or bfloat16, got float64"),
        ({"device": "meta"}, "device must be cpu or cuda, got meta"),
    ],
)
def test_cache_names_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        make_cache(**changes)
    assert message in str(error.value)


def test_a_pool_too_small_says_what_is_missing_and_goes_on() -> None:
    cache = make_cache()
    with pytest.raises(adakv.Error, match="not enough pages: 58 needed, 40 free of 40"):
        cache.begin(0, [400, 400], [T, T])
    assert cache.num_free == 40
    cache.begin(0, [40, 40], [T, T])
    assert cache.num_free == 28
    for _ in range(7 * 16 + 1):
        try:
            cache.grow([1, 1], 1)
        except adakv.Error as error:
            assert "pages" in str(error)
            break
    else:
        pytest.fail("the cache grew beyond its pages")
    cache.remove(0)
    cache.remove(1)
    assert cache.num_free == 40


@pytest.mark.parametrize("what", ["lengths", "block_table"])
def test_append_follows_no_page_that_is_not_there(what: str) -> None:
    """Numbers that somebody wrote by hand."""
    cache = make_cache()
    layer, new = cache.layer(0), torch.randn(2, HKV, 1, D)
    page_ids, page_indptr = cache.begin(0, [HKV * 5, HKV * 5], [5, 5])
    entries = torch.randn(2, HKV, 5, D)
    positions = torch.arange(5, dtype=torch.int32).repeat(2 * HKV)
    kept = ops.Kept(positions, torch.arange(2 * HKV + 1, dtype=torch.int32) * 5)
    ops.compact(entries, entries, kept, layer, page_ids, page_indptr)
    if what == "lengths":
        layer.lengths[0, 0] = 1000
    else:
        layer.block_table[0, 0, 0] = 10**8
    before = layer.lengths.clone()
    with pytest.raises(ValueError, match="append: "):
        ops.append(new, new, layer)
    assert torch.equal(layer.lengths, before)


def test_a_child_after_fork_has_threads_of_its_own() -> None:
    """The core's threads are the parent's; the child makes its own instead of waiting for them."""
    code = (
        "import os, torch\n"
        "from adakv import ops\n"
        "torch.set_num_threads(2)\n"
        "x = torch.randn(4, 8, 2048, 64)\n"
        "ops.score(x[:, :, :32], x)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    ops.score(x[:, :, :32], x)\n"
        "    os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


def test_memory_that_is_not_there_is_an_error() -> None:
    with pytest.raises(adakv.Error, match="memory"):
        make_cache(num_pages=2**31 - 1, head_dim=256, page_size=256)


def test_cuda_says_why_it_is_missing() -> None:
    if "cuda" in adakv.backends():
        assert adakv.cuda_unavailable_reason() is None
    else:
        assert adakv.cuda_unavailable_reason()
        assert adakv.backends() == ("cpu",)
