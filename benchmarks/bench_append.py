"""append of one token to every row of a layer, and plan for all layers of a step.

On a GPU append to one layer is timed launch by launch with the L2 cache flushed, and in a graph.
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


@dataclass(frozen=True)
class Case:
    layers: int = 30
    batch: int = 1
    kv_heads: int = 3
    head_dim: int = 64
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class GpuCase:
    sequences: int


def run(case: Case, options: argparse.Namespace) -> None:
    dtype = getattr(torch, case.dtype)
    steps = options.rounds + 3  # the harness's warm-up, too
    row_pages = steps // page_size_for(options.kv_dtype, None) + 3
    cache = KVCache(
        num_layers=case.layers,
        num_sequences=case.batch,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        num_pages=case.layers * case.batch * case.kv_heads * row_pages,
        max_row_pages=row_pages,
        dtype=dtype,
        device=options.device,
        kv_dtype=options.kv_dtype,
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
    about = vars(case) | {"kv_dtype": options.kv_dtype}
    harness.report("append", about, timings, derived, options.save)


def run_on_gpu(case: GpuCase, options: argparse.Namespace) -> None:
    rows, row_pages = case.sequences * GPU_HEADS, 41
    cache = KVCache(
        num_layers=1,
        num_sequences=case.sequences,
        num_kv_heads=GPU_HEADS,
        head_dim=GPU_HEAD_DIM,
        num_pages=rows * row_pages,
        max_row_pages=4 * row_pages,
        device=options.device,
        kv_dtype=options.kv_dtype,
    )
    with torch.device(options.device):
        keys, values = torch.randn(2, case.sequences, GPU_HEADS, 1, GPU_HEAD_DIM).bfloat16()
        prompt = ops.Kept(torch.zeros(rows).int(), torch.arange(rows + 1).int())  # of one token
    pages = cache.begin(0, [GPU_HEADS] * case.sequences, [1] * case.sequences)
    ops.compact(keys, values, prompt, cache.layer(0), *pages)
    room = cache.grow([256] * case.sequences, 256)
    assert room == 256  # more than is appended here
    append = functools.partial(ops.append, keys, values, cache.layer(0))
    timings = {"launch": launch_times({"append": lambda _: append()})["append"]}
    timings["graph"] = graph_times({"append": [append] * 4})["append"]
    about = vars(case) | {"kv_dtype": options.kv_dtype}
    harness.report("append", about, timings, {}, options.save)


CASES = [Case(), Case(layers=32, batch=8, kv_heads=8, head_dim=128)]
GPU_CASES = [GpuCase(1), GpuCase(64)]

if __name__ == "__main__":
    parser = harness.parser(__doc__)
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, default="auto", help="format of pages")
    harness.run_cases(parser, cpu=[(CASES, run)], cuda=[(GPU_CASES, run_on_gpu)])
