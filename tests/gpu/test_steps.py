"""A thousand random steps of compact, append, attend and remove: the same on GPU and CPU."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import lockstep
from adakv import Error, ops
from adakv.cache import KVCache
from lockstep import GROUP, KV_HEADS, LAYERS, SEQUENCES, Lockstep, entries
from tolerance import assert_close

pytestmark = pytest.mark.gpu


def decode(both: Lockstep, live: set[int], fused: bool) -> None:
    """Up to 20 new tokens of each live sequence, right-aligned, in as many pieces as it takes."""
    columns = random.choice([1, 1, 1, 2, 4, 20])
    num_new = [random.randint(0, columns) if b in live else 0 for b in range(SEQUENCES)]
    while columns:
        now = both.grow(num_new, columns)
        left = [min(n, columns - now) for n in num_new]
        append([n - later for n, later in zip(num_new, left, strict=True)], now, both, fused)
        num_new, columns = left, columns - now


def append(num_new: list[int], columns: int, both: Lockstep, fused: bool) -> None:
    """A step of some new tokens, and what they attend to."""
    counts = torch.tensor(num_new, dtype=torch.int32)

    def run(cache: KVCache, layer: int, *given: Tensor) -> Tensor:
        keys, values, queries, counts = given
        view = cache.layer(layer)
        schedule = ops.plan(*cache.plan_inputs, new_tokens=columns, num_new=counts)[layer]
        new = {"keys": keys, "values": values} if fused else {}
        if not fused:
            ops.append(keys, values, view, num_new=counts)
        return ops.attend(queries, view, schedule, num_new=counts, **new)[0]

    for layer in range(LAYERS):
        queries = entries(SEQUENCES, columns, KV_HEADS * GROUP)
        given = entries(SEQUENCES, columns), entries(SEQUENCES, columns), queries, counts
        out, cuda_out = both.each(run, layer, *given)
        assert_close(cuda_out, out, out)  # but for the rounding of bfloat16


@pytest.mark.parametrize("seed", [0, 1])
def test_random_steps_equal_the_cpu(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    both, live = Lockstep(), set[int]()
    for step in range(500):
        sequence = random.randrange(SEQUENCES)
        if sequence not in live:
            both.prefill(sequence, length=random.choice([1, 30, 200]), most=150)
            live.add(sequence)
        elif random.random() < 0.05:
            both.remove(sequence)
            live.remove(sequence)
        else:
            try:
                decode(both, live, fused=random.random() < 0.5)
            except Error:  # the pool or a row is full, on both
                both.remove(sequence)
                live.remove(sequence)
        if step % 10 == 0:
            both.check()
    for sequence in live:
        both.remove(sequence)
    both.check()
    assert all(cache.pages_used == 0 for cache in both.caches)


def test_lockstep_sees_a_difference() -> None:
    both = Lockstep()
    both.prefill(0, length=100, most=90)
    both.check()
    both.cuda.all_layers.lengths[0, 0, 0] += 1
    with pytest.raises(AssertionError):
        both.check()
    assert lockstep.held_pages(both.caches[0].all_layers)
