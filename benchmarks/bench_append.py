"""append of one token to every row of a layer, and plan for all layers of a step."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

import harness
from adakv import ops
from adakv.cache import KVCache


@dataclass(frozen=True)
class Case:
    layers: int = 30
    batch: int = 1
    kv_heads: int = 3
    head_dim: int = 64
    dtype: str = "bfloat16"


def run(case: Case, options: argparse.Namespace) -> None:
    dtype = getattr(torch, case.dtype)
    steps = options.rounds + 3  # the harness's warm-up, too
    cache = KVCache(
        num_layers=case.layers,
        num_sequences=case.batch,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        num_pages=case.layers * case.batch * case.kv_heads * (steps // 16 + 3),
        max_row_pages=steps // 16 + 3,
        dtype=dtype,
        device=options.device,
    )
    shape = (case.batch, case.kv_heads, 1, case.head_dim)
    keys, values = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    rows = case.batch * case.kv_heads
    prompt = ops.Kept(torch.zeros(rows).int(), torch.arange(rows + 1).int())  # of one token
    for layer in range(case.layers):
        pages = cache.begin(layer, [case.kv_heads] * case.batch, [1] * case.batch)
        ops.compact(keys, values, prompt, cache.layer(layer), *pages)

    def append(_: int) -> None:
        cache.grow([1] * case.batch, 1)
        for layer in range(case.layers):
            ops.append(keys, values, cache.layer(layer))

    variants = {"append": append, "plan": lambda _: ops.plan(*cache.plan_inputs)}
    timings = harness.measure(variants, rounds=options.rounds)
    derived = {"append_us_per_layer": timings["append"].median_us / case.layers}
    harness.report("append", vars(case), timings, derived, options.save)


CASES = [Case(), Case(layers=32, batch=8, kv_heads=8, head_dim=128)]

if __name__ == "__main__":
    harness.run_cases(__doc__, CASES, run)
