"""A step over rows of two formats, against each of the two alone: the entries that matter most in
16 bits or int8, the others as codes; attend takes both in one call. In several layers in turn, on a
GPU in a graph of all of them.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import harness
from adakv import ops
from adakv.cache import KVCache
from cuda_timing import graph_times
from filled_rows import filled


@dataclass(frozen=True)
class Case:
    batch: int = 1
    held: int = 8192
    kv_dtype: str = "int4"  # of three quarters of the entries
    first: str = "auto"  # of the others
    layers: int = 4
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.batch}x{self.held}-{self.first}+{self.kv_dtype}-G{self.group}"


def planned(kv: KVCache) -> list[Tensor]:
    plan_inputs = kv.plan_inputs
    return list(ops.plan(*plan_inputs, new_tokens=0, page_size=kv.page_size).unbind())


def run(case: Case, options: argparse.Namespace) -> None:
    first = filled(replace(case, held=case.held // 4, kv_dtype=case.first), options.device)
    second = filled(replace(case, held=3 * case.held // 4), options.device)
    plans = planned(first), planned(second)
    shape = case.layers, case.batch, case.kv_heads * case.group, 1, case.head_dim
    queries = torch.randn(shape, device=options.device).to(getattr(torch, case.dtype))

    def of_first(layer: int) -> tuple[Tensor, Tensor]:
        return ops.attend(queries[layer], first.layers[layer], plans[0][layer])

    def of_second(layer: int) -> tuple[Tensor, Tensor]:
        return ops.attend(queries[layer], second.layers[layer], plans[1][layer])

    def of_both(layer: int) -> tuple[Tensor, Tensor]:
        tier = ops.Tier(second.layers[layer], plans[1][layer])
        return ops.attend(queries[layer], first.layers[layer], plans[0][layer], [tier])

    variants = {"first": of_first, "second": of_second, "both": of_both}
    if options.device == "cuda":
        layers = range(case.layers)
        timings = graph_times(
            {name: [functools.partial(f, i) for i in layers] for name, f in variants.items()}
        )
    else:
        timings = harness.measure(
            {name: lambda i, f=f: f(i % case.layers) for name, f in variants.items()},
            rounds=options.rounds,
        )
    apart = timings["first"].median_us + timings["second"].median_us
    sizes = {name: getattr(case, name) for name in case.__dataclass_fields__}
    derived = {"time of both apart": timings["both"].median_us / apart}
    harness.report("tiers", sizes, timings, derived, options.save)


CPU_CASES = [Case(), Case(kv_dtype="int8")]
CUDA_CASES = [
    Case(batch=32, held=4096, layers=16),
    Case(batch=32, held=4096, layers=16, group=8),
    Case(batch=32, held=4096, layers=16, kv_dtype="int8"),
    Case(batch=32, held=4096, layers=16, kv_dtype="int2"),
    Case(batch=32, held=4096, layers=16, first="int8"),
    Case(batch=32, held=4096, layers=16, head_dim=64),
    Case(batch=8, held=8192, layers=16),
    Case(batch=8, held=1024, layers=32),
    Case(batch=1, held=8192, layers=32),
    Case(batch=32, held=4096, layers=16, kv_dtype="fp8"),  # a launch for each tier
]


if __name__ == "__main__":
    harness.run_cases(harness.parser(__doc__), cpu=[(CPU_CASES, run)], cuda=[(CUDA_CASES, run)])
