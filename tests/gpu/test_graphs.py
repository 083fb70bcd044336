"""A decode step recorded once in a CUDA graph and replayed while rows grow over page boundaries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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
