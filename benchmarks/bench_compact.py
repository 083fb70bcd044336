"""compact of one layer into pages, against gathering the same entries in plain torch.

On a GPU the sizes are those of Llama-3.1-8B's layers, with unequal budgets. It is timed launch by
launch with the L2 cache flushed, and in a graph of many calls.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass

import torch

import harness
from adakv import ops
from adakv.cache import KVCache
from adakv.formats import KV_DTYPES, page_size_for
from cuda_timing import graph_times, launch_times

GPU_HEADS, GPU_HEAD_DIM = 8, 128
GPU_PROMPTS = 8  # in turn, more than the L2 cache holds


@dataclass(frozen=True)
class Case:
    kv_heads: int = 3
    head_dim: int = 64
    length: int = 7000
    budget: int = 700
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class GpuCase:
    length: int
    budget: int


def run(case: Case, options: argparse.Namespace) -> None:
    dtype = getattr(torch, case.dtype)
    shape = (1, case.kv_heads, case.length, case.head_dim)
    keys, values = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    budgets = torch.full((1, case.kv_heads), case.budget, dtype=torch.int32)
    kept = ops.select(torch.rand(shape[:3]), budgets, window=32)
    row_pages = case.length // page_size_for(options.kv_dtype, None) + 1
    cache = KVCache(
        num_layers=1,
        num_sequences=1,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        num_pages=case.kv_heads * row_pages * 2,
        max_row_pages=row_pages,
        dtype=dtype,
        device=options.device,
        kv_dtype=options.kv_dtype,
    )
    pages = cache.begin(0, [case.kv_heads * case.budget], [case.length])
    index = kept.positions.view(1, case.kv_heads, -1, 1).long().expand(-1, -1, -1, case.head_dim)
    variants = {
        "adakv": lambda _: ops.compact(keys, values, kept, cache.layer(0), *pages),
        "torch": lambda _: (keys.gather(2, index), values.gather(2, index)),
    }
    timings = harness.measure(variants, rounds=options.rounds)
    num_bytes = 2 * case.kv_heads * case.budget * case.head_dim * keys.element_size()
    written = case.kv_heads * case.budget * cache.page_bytes // cache.page_size
    median = timings["adakv"].median_us
    derived = {
        "speedup": timings["torch"].median_us / median,
        "copied_GB_per_s": (num_bytes + written) / median / 1e3,
    }
    about = vars(case) | {"kv_dtype": options.kv_dtype}
    harness.report("compact", about, timings, derived, options.save)


def random_kept(length: int, budget: int) -> ops.Kept:
    """Random positions in rows of unequal budgets, as Ada-KV gives them."""
    floor, rest = budget // 5, (budget - budget // 5) * GPU_HEADS
    share = torch.distributions.Dirichlet(torch.full((GPU_HEADS,), 2.0)).sample()
    counts = (floor + share * rest).int().clamp(max=length)
    counts[0] += GPU_HEADS * budget - counts.sum()
    rows = [torch.randperm(length)[:n].sort().values for n in counts.tolist()]
    indptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return ops.Kept(torch.cat(rows).int(), indptr.int())


def run_on_gpu(case: GpuCase, options: argparse.Namespace) -> None:
    kept = ops.Kept(*(x.to(options.device) for x in random_kept(case.length, case.budget)))
    row_pages = case.length // page_size_for(options.kv_dtype, None) + 40
    cache = KVCache(
        num_layers=1,
        num_sequences=1,
        num_kv_heads=GPU_HEADS,
        head_dim=GPU_HEAD_DIM,
        num_pages=GPU_HEADS * row_pages,
        max_row_pages=4 * row_pages,
        device=options.device,
        kv_dtype=options.kv_dtype,
    )
    pages = cache.begin(0, [GPU_HEADS * case.budget], [case.length])
    layer = cache.layer(0)
    shape = (2, 1, GPU_HEADS, case.length, GPU_HEAD_DIM)  # keys and values
    prompts = [
        torch.randn(shape, device=options.device).bfloat16().unbind() for _ in range(GPU_PROMPTS)
    ]
    heads = torch.arange(GPU_HEADS, device=options.device)
    rows, positions = heads.repeat_interleave(kept.indptr.diff().long()), kept.positions.long()

    def compact(i: int) -> None:
        keys, values = prompts[i % GPU_PROMPTS]
        ops.compact(keys, values, kept, layer, *pages)

    def gather(i: int) -> None:
        for x in prompts[i % GPU_PROMPTS]:
            x[0][rows, positions]

    timings = launch_times({"adakv_launch": compact, "torch_launch": gather})
    calls = [functools.partial(compact, i) for i in range(GPU_PROMPTS)]
    timings |= graph_times({"adakv_graph": calls})
    written = cache.page_bytes / cache.page_size  # of an entry
    moved = GPU_HEADS * case.budget * (2 * GPU_HEAD_DIM * 2 + written)
    derived = {"graph_TB_per_s": moved / timings["adakv_graph"].median_us / 1e6}
    about = vars(case) | {"kv_dtype": options.kv_dtype}
    harness.report("compact", about, timings, derived, options.save)


CASES = [Case(), Case(kv_heads=8, head_dim=128, length=32768, budget=4096)]
GPU_CASES = [GpuCase(32768, 3277), GpuCase(32768, 6554), GpuCase(131072, 13107)]

if __name__ == "__main__":
    parser = harness.parser(__doc__)
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, default="auto", help="format of pages")
    harness.run_cases(parser, cpu=[(CASES, run)], cuda=[(GPU_CASES, run_on_gpu)])
