"""compact of one layer into pages, against gathering the same entries in plain torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

import harness
from adakv import ops
from adakv.cache import KVCache


@dataclass(frozen=True)
class Case:
    kv_heads: int = 3
    head_dim: int = 64
    length: int = 7000
    budget: int = 700
    dtype: str = "bfloat16"


def run(case: Case, options: argparse.Namespace) -> None:
    dtype = getattr(torch, case.dtype)
    shape = (1, case.kv_heads, case.length, case.head_dim)
    keys, values = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    budgets = torch.full((1, case.kv_heads), case.budget, dtype=torch.int32)
    kept = ops.select(torch.rand(shape[:3]), budgets, window=32)
    row_pages = case.length // 16 + 1
    cache = KVCache(
        num_layers=1,
        num_sequences=1,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        num_pages=case.kv_heads * row_pages * 2,
        max_row_pages=row_pages,
        dtype=dtype,
        device=options.device,
    )
    pages = cache.begin(0, [case.kv_heads * case.budget], [case.length])
    index = kept.positions.view(1, case.kv_heads, -1, 1).long().expand(-1, -1, -1, case.head_dim)
    variants = {
        "adakv": lambda _: ops.compact(keys, values, kept, cache.layer(0), *pages),
        "torch": lambda _: (keys.gather(2, index), values.gather(2, index)),
    }
    timings = harness.measure(variants, rounds=options.rounds)
    num_bytes = 2 * case.kv_heads * case.budget * case.head_dim * keys.element_size()
    median = timings["adakv"].median_us
    derived = {
        "speedup": timings["torch"].median_us / median,
        "copied_GB_per_s": 2 * num_bytes / median / 1e3,
    }
    harness.report("compact", vars(case), timings, derived, options.save)


CASES = [Case(), Case(kv_heads=8, head_dim=128, length=32768, budget=4096)]

if __name__ == "__main__":
    harness.run_cases(__doc__, CASES, run)
