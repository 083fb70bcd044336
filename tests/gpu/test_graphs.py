"""A decode step recorded once in a CUDA graph and replayed while rows grow over page boundaries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accumulated import accumulate
from adakv import ops
from adakv.cache import KVCache
from lockstep import GROUP, KV_HEADS, LAYERS, SEQUENCES, Lockstep, entries
from tolerance import assert_close

pytestmark = pytest.mark.gpu


def step(cache: KVCache, keys: Tensor, values: Tensor, queries: Tensor) -> list[Tensor]:
    """One token of every sequence through all layers."""
    schedule = ops.plan(*cache.plan_inputs)
    results = []
    for i in range(LAYERS):
        new = {"keys": keys[i], "values": values[i]}
        settled = i > 0  # nothing but layer 0's attend stands between this one and the plan
        out, _ = ops.attend(queries[i], cache.layer(i), schedule[i], prefetch=settled, **new)
        results.append(out)
    return results


def inputs() -> list[Tensor]:
    """Keys, values and queries, ``[L, B, H, 1, D]``."""
    heads = (KV_HEADS, KV_HEADS, KV_HEADS * GROUP)
    return [torch.stack([entries(SEQUENCES, 1, h) for _ in range(LAYERS)]) for h in heads]


def test_replay_with_growing_rows_equals_the_cpu() -> None:
    both = Lockstep()
    cpu, cuda = both.caches
    for sequence, length in enumerate((5, 150, 33)):
        both.prefill(sequence, length, most=length)
    static = [x.cuda() for x in inputs()]
    assert both.grow([1] * SEQUENCES, 1) == 1
    given = inputs()
    step(cpu, *given)  # the warm-up below is the same step
    for buffer, x in zip(static, given, strict=True):
        buffer.copy_(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(cuda, *static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(cuda, *static)
    for i in range(40):
        assert both.grow([1] * SEQUENCES, 1) == 1
        given = inputs()
        expected = step(cpu, *given)
        for buffer, x in zip(static, given, strict=True):
            buffer.copy_(x)
        graph.replay()
        for got, wanted in zip(captured, expected, strict=True):
            assert_close(got, wanted, wanted)  # but for the rounding of bfloat16
        if i % 8 == 0:
            both.check()
    both.check()


def test_prefetching_gives_the_same_bits() -> None:
    both = Lockstep()
    for sequence, length in enumerate((600, 150, 33)):
        both.prefill(sequence, length, most=length)
    cache, queries = both.cuda, entries(SEQUENCES, 1, KV_HEADS * GROUP).cuda()
    schedule = ops.plan(*cache.plan_inputs, new_tokens=0)
    expected = [ops.attend(queries, cache.layer(i), schedule[i])[0] for i in range(LAYERS)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [
            ops.attend(queries, cache.layer(i % LAYERS), schedule[i % LAYERS], prefetch=True)[0]
            for i in range(20 * LAYERS)
        ]
    for _ in range(10):
        graph.replay()
        for i, out in enumerate(results):
            assert torch.equal(out, expected[i % LAYERS])
            out.fill_(float("nan"))


def test_a_graph_accumulates() -> None:
    """Launches overlap, and share their scratch memory: none may see another one's logits."""
    both = Lockstep()
    for sequence, length in enumerate((600, 150, 33)):
        both.prefill(sequence, length, most=length)
    cache, times = both.cuda, 12
    queries = [entries(SEQUENCES, 1, KV_HEADS * GROUP).cuda() for _ in range(LAYERS)]
    schedule = ops.plan(*cache.plan_inputs, new_tokens=0)
    length = cache.all_layers.block_table.shape[-1] * cache.page_size
    sums = torch.zeros(LAYERS, SEQUENCES, KV_HEADS, length, device="cuda")
    expected = [
        ops.attend(queries[i], cache.layer(i), schedule[i], accumulated=sums[i])[0]
        for i in range(LAYERS)
    ]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [
            ops.attend(queries[i], cache.layer(i), schedule[i], prefetch=True, accumulated=sums[i])
            for _ in range(times)
            for i in range(LAYERS)
        ]
    graph.replay()
    graph.replay()
    for i, (out, _) in enumerate(results):
        assert torch.equal(out, expected[i % LAYERS])
    for i in range(LAYERS):
        both_dtypes = []
        for dtype in (torch.float64, torch.bfloat16):
            wanted = torch.zeros(SEQUENCES, KV_HEADS, length)
            for _ in range(1 + 2 * times):
                wanted = accumulate(queries[i], cache.layer(i), wanted.double(), dtype=dtype)
            both_dtypes.append(wanted)
        assert_close(sums[i], *both_dtypes)


def test_the_same_inputs_give_the_same_bits() -> None:
    both = Lockstep()
    for sequence, length in enumerate((600, 150, 33)):
        both.prefill(sequence, length, most=length)
    queries = entries(SEQUENCES, 1, KV_HEADS * GROUP).cuda()
    schedule = ops.plan(*both.cuda.plan_inputs, new_tokens=0)
    results = []
    for _ in range(20):
        results.append(ops.attend(queries, both.cuda.layer(0), schedule[0]))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])
