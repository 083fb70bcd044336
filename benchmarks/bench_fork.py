"""fork of a cache: branches of what it holds, all layers at once, sharing pages or copying them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

import harness
from adakv import ops
from adakv.cache import KVCache
from adakv.formats import KV_DTYPES, page_size_for


@dataclass(frozen=True)
class Case:
    entries: int
    branches: int
    whole: bool = False
    layers: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"


def run(case: Case, options: argparse.Namespace) -> None:
    page_size = page_size_for(options.kv_dtype, None)
    rows, row_pages = case.layers * case.kv_heads, case.entries // page_size + 3
    cache = KVCache(
        num_layers=case.layers,
        num_sequences=1,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        num_pages=rows * (row_pages + case.branches * (row_pages if case.whole else 2)),
        max_row_pages=row_pages,
        dtype=getattr(torch, case.dtype),
        device=options.device,
        kv_dtype=options.kv_dtype,
    )
    shape = (1, case.kv_heads, case.entries, case.head_dim)
    keys = torch.randn(shape, dtype=cache.dtype, device=cache.device)
    positions = torch.arange(case.entries, device=cache.device).repeat(case.kv_heads).int()
    ends = torch.arange(case.kv_heads + 1, device=cache.device).int() * case.entries
    for layer in range(case.layers):
        pages = cache.begin(layer, [case.entries * case.kv_heads], [case.entries])
        ops.compact(keys, keys, ops.Kept(positions, ends), cache.layer(layer), *pages)
    variants = {"fork": lambda _: cache.fork([0] * case.branches, whole=case.whole)}
    timings = harness.measure(variants, rounds=options.rounds)
    pages = rows * case.branches * (row_pages if case.whole else 1)
    derived = {"gb_per_s": 2 * pages * cache.page_bytes / timings["fork"].median_us / 1e3}
    about = vars(case) | {"kv_dtype": options.kv_dtype}
    harness.report("fork", about, timings, derived, options.save)


CASES = [Case(3277, 1), Case(3277, 4), Case(3277, 64), Case(3277, 1, whole=True)]

if __name__ == "__main__":
    parser = harness.parser(__doc__)
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, default="auto", help="format of pages")
    harness.run_cases(parser, cpu=[(CASES, run)], cuda=[(CASES, run)])
