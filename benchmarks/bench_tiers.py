"""A step over rows of two tiers, against each of the two alone: the entries that matter most in 16
bits or int8, the others as codes or with some of their dimensions; attend takes both in one call.
In several layers in turn, on a GPU in a graph of all of them, and there beside copies that move as
many bytes as the tiers have.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
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
    dims: tuple[int, int] | None = None  # of the three quarters' keys and values

    def __str__(self) -> str:
        second = self.kv_dtype + ("" if self.dims is None else "/{}/{}".format(*self.dims))
        return f"{self.batch}x{self.held}-{self.first}+{second}-G{self.group}"

    @property
    def second(self) -> Case:
        """The tier of three quarters of the entries."""
        return replace(self, held=3 * self.held // 4)


def planned(kv: KVCache) -> list[Tensor]:
    plan_inputs = kv.plan_inputs
    return list(ops.plan(*plan_inputs, new_tokens=0, page_size=kv.page_size).unbind())


def held_bytes(kv: KVCache) -> int:
    """Bytes of a layer that attend reads, of rows that fill their pages."""
    layer = kv.layers[0]
    num_pages = int(layer.lengths.sum()) // kv.page_size
    parts = layer.pages, layer.value_pages, layer.key_scales, layer.value_scales
    return num_pages * sum(x[0].numel() * x.itemsize for x in parts if x is not None)


def copies(num_bytes: int, layers: int) -> list[Callable[[], object]]:
    """A copy for each layer, which reads and writes so many bytes in all."""
    both = torch.zeros(layers, 2, num_bytes // 2, dtype=torch.uint8, device="cuda")
    return [functools.partial(to.copy_, from_) for to, from_ in both]


def run(case: Case, options: argparse.Namespace) -> None:
    first_case = replace(case, held=case.held // 4, kv_dtype=case.first, dims=None)
    first, second = filled(first_case, options.device), filled(case.second, options.device)
    plans = planned(first), planned(second)
    shape = case.layers, case.batch, case.kv_heads * case.group, 1, case.head_dim
    queries = torch.randn(shape, device=options.device).to(getattr(torch, case.dtype))
    key, value = case.dims or (case.head_dim, case.head_dim)
    asked, column = queries[..., :key], case.head_dim if value < case.head_dim else 0

    def of_first(layer: int) -> tuple[Tensor, Tensor]:
        return ops.attend(queries[layer], first.layers[layer], plans[0][layer])

    def of_second(layer: int) -> tuple[Tensor, Tensor]:
        return ops.attend(asked[layer], second.layers[layer], plans[1][layer])

    def of_both(layer: int) -> tuple[Tensor, Tensor]:
        tier = ops.Tier(second.layers[layer], plans[1][layer], asked[layer], column)
        return ops.attend(queries[layer], first.layers[layer], plans[0][layer], [tier])

    variants = {"first": of_first, "second": of_second, "both": of_both}
    if options.device == "cuda":
        layers = range(case.layers)
        calls = {name: [functools.partial(f, i) for i in layers] for name, f in variants.items()}
        num_bytes = held_bytes(first) + held_bytes(second)
        timings = graph_times({**calls, "copy": copies(num_bytes, case.layers)})
    else:
        timings = harness.measure(
            {name: lambda i, f=f: f(i % case.layers) for name, f in variants.items()},
            rounds=options.rounds,
        )
    apart = timings["first"].median_us + timings["second"].median_us
    sizes = {name: getattr(case, name) for name in case.__dataclass_fields__}
    derived = {"time of both apart": timings["both"].median_us / apart}
    if "copy" in timings:
        derived["time of a copy"] = timings["both"].median_us / timings["copy"].median_us
    harness.report("tiers", sizes, timings, derived, options.save)


CPU_CASES = [Case(), Case(kv_dtype="int8"), Case(kv_dtype="auto", dims=(32, 32))]
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
    Case(batch=32, held=4096, layers=16, kv_dtype="fp8"),
    Case(batch=32, held=4096, layers=16, kv_dtype="auto", dims=(64, 64)),
    Case(batch=32, held=4096, layers=16, kv_dtype="auto", dims=(32, 32)),
    Case(batch=32, held=4096, layers=16, kv_dtype="auto", head_dim=64, dims=(16, 16)),
    Case(batch=8, held=1024, layers=32, kv_dtype="auto", dims=(32, 32)),
    Case(batch=32, held=4096, layers=16, kv_dtype="auto", dims=(80, 128)),  # a launch for each tier
]


if __name__ == "__main__":
    harness.run_cases(harness.parser(__doc__), cpu=[(CPU_CASES, run)], cuda=[(CUDA_CASES, run)])
