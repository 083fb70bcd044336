"""attend over ragged pages, against torch SDPA on the same entries padded to the longest row.

Lengths are as Ada-KV gives them: a floor of 0.2 of the mean budget, the rest by a Dirichlet draw
over the heads of a sequence. Several layers in turn, more than the last-level cache holds. For
torch the q heads of a group are queries of their kv head, on a CPU several times as fast as
enable_gqa.

With --accumulate it is also timed where it keeps what each slot is given (``_accumulated``).

On a GPU a call also appends the new token. It is timed in a graph of many layers, and launch by
launch with the L2 cache flushed, and so are FlashInfer and torch (--peers).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import harness
from adakv import ops
from adakv.cache import KVCache
from adakv.eval.speed import uneven_lengths
from cuda_timing import graph_times, launch_times
from peers.ragged_decode import FlashInfer, peers_of
from ragged_layers import GpuCase, Layers


@dataclass(frozen=True)
class Case:
    batch: int = 4
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    mean_length: int = 2048
    new_tokens: int = 1
    page_size: int = 16
    layers: int = 8
    dtype: str = "bfloat16"


def ragged_lengths(case: Case) -> Tensor:
    """``[L, B, Hkv]`` int32."""
    shape = case.layers, case.batch, case.kv_heads
    return uneven_lengths(case.mean_length, shape).clamp(min=case.new_tokens)


class Paged:
    """The layers' pages in one shuffled pool, as a cache lays them out, and their schedule."""

    def __init__(self, case: Case, lengths: Tensor, kv_dtype: str = "auto") -> None:
        dtype = getattr(torch, case.dtype)
        page_size = 32 if kv_dtype == "int4" else case.page_size
        pages = -(-lengths // page_size)
        num_pages = int(pages.sum())
        cache = KVCache(
            num_layers=1,
            num_sequences=1,
            num_kv_heads=1,
            head_dim=case.head_dim,
            num_pages=num_pages,
            max_row_pages=1,
            page_size=page_size,
            dtype=dtype,
            kv_dtype=kv_dtype,
        )
        pool = cache.layer(0)
        if kv_dtype == "auto":
            pool.pages.normal_()
        elif kv_dtype == "int4":
            pool.pages.random_(0, 256)
        else:
            pool.pages.copy_(torch.randn(pool.pages.shape, dtype=dtype).abs() * 50)
        for scales in (pool.key_scales, pool.value_scales):
            if scales is not None:
                scales.fill_(1 / 64)
        pool.page_positions.zero_()
        table = torch.full((*lengths.shape, int(pages.max())), -1, dtype=torch.int32)
        used = torch.arange(table.shape[-1]) < pages[..., None]
        table[used] = torch.randperm(num_pages).int()
        fresh = torch.full((*lengths.shape, 1), -1, dtype=torch.int32)
        seen = lengths[0].amax(-1)
        self.layers = [
            pool._replace(block_table=table[i], lengths=lengths[i], seen=seen, fresh_pages=fresh[i])
            for i in range(case.layers)
        ]
        if kv_dtype == "int4":
            shape = (*lengths.shape[1:], 2 * page_size, case.head_dim)
            self.layers = [x._replace(tails=torch.randn(shape, dtype=dtype)) for x in self.layers]
        self.schedule = ops.plan(lengths, table, fresh, new_tokens=0, page_size=page_size)
        entry_bytes = cache.page_bytes / page_size - 4  # without its position
        self.num_bytes = int(lengths.sum()) * entry_bytes / case.layers


class Padded:
    """Dense keys and values of some layers, padded to the longest row, and the mask they need."""

    def __init__(self, case: Case, lengths: Tensor, layers: int) -> None:
        longest = int(lengths.max())
        shape = (case.batch, case.kv_heads, longest, case.head_dim)
        dtype = getattr(torch, case.dtype)
        self.keys = [torch.randn(shape, dtype=dtype) for _ in range(layers)]
        self.values = [torch.randn(shape, dtype=dtype) for _ in range(layers)]
        first = lengths[:layers, :, :, None, None] - case.new_tokens  # [L, B, Hkv, 1, 1]
        visible = first + torch.arange(case.new_tokens)[:, None]
        masks = torch.arange(longest) <= visible  # [L, B, Hkv, S, T]
        if case.new_tokens > 1:
            masks = masks.repeat(1, 1, 1, case.group, 1)  # [L, B, Hkv, G * S, T]
        self.masks = masks


def accumulated(layer: ops.Layer) -> Tensor:
    """``[B, Hkv, T]``, nothing yet."""
    length = layer.block_table.shape[2] * layer.page_positions.shape[1]
    return layer.lengths.new_zeros((*layer.lengths.shape, length), dtype=torch.float32)


def run(case: Case, options: argparse.Namespace) -> None:
    lengths = ragged_lengths(case)
    paged = Paged(case, lengths)
    padded = Padded(case, lengths, min(case.layers, 3))
    heads = case.kv_heads * case.group
    queries = torch.randn(case.batch, heads, case.new_tokens, case.head_dim)
    queries = queries.to(getattr(torch, case.dtype))

    def attend(paged: Paged, i: int) -> None:
        i %= case.layers
        ops.attend(queries, paged.layers[i], paged.schedule[i])

    grouped = queries.reshape(case.batch, case.kv_heads, -1, case.head_dim)  # [B, Hkv, G * S, D]

    def sdpa(i: int) -> None:
        i %= len(padded.keys)
        F.scaled_dot_product_attention(grouped, padded.keys[i], padded.values[i], padded.masks[i])

    reader = harness.Reader()
    variants: dict[str, Callable[[int], object]] = {"adakv": functools.partial(attend, paged)}
    for kv_dtype in ("int8", "fp8", "int4") if case.dtype != "float32" else ():
        variants[kv_dtype] = functools.partial(attend, Paged(case, lengths, kv_dtype))
    if options.accumulate:
        kept = accumulated(paged.layers[0])

        def attend_and_accumulate(i: int) -> None:
            layer, schedule = paged.layers[i % case.layers], paged.schedule[i % case.layers]
            how = options.accumulate
            ops.attend(queries, layer, schedule, accumulated=kept, accumulate=how)

        variants["adakv_accumulated"] = attend_and_accumulate
    variants |= {"sdpa": sdpa, "read": reader}
    timings = harness.measure(variants, rounds=options.rounds)
    rate = reader.num_bytes / timings["read"].median_us * 1e6
    reached = paged.num_bytes / timings["adakv"].median_us * 1e6
    derived = {
        "speedup": timings["sdpa"].median_us / timings["adakv"].median_us,
        "read_GB_per_s": reached / 1e9,
        "machine_read_GB_per_s": rate / 1e9,
        "share_of_read_rate": reached / rate,
        "longest_over_mean": float(lengths.max()) / case.mean_length,
    }
    if options.accumulate:
        plain = timings["adakv"].median_us
        derived["accumulating_costs"] = timings["adakv_accumulated"].median_us / plain - 1
    for kv_dtype in variants.keys() & {"int8", "fp8", "int4"}:
        derived[f"{kv_dtype}_speedup"] = timings["adakv"].median_us / timings[kv_dtype].median_us
    harness.report("attend", vars(case), timings, derived, options.save)


def run_on_gpu(case: GpuCase, options: argparse.Namespace) -> None:
    layers = Layers(case, options.device)
    count = len(layers.layers)
    error = layers.error(layers.attend(0), 0)
    peers = peers_of(layers) if options.peers else {}
    calls: dict[str, Callable[[int], object]] = {
        "adakv": layers.attend,
        "adakv_no_append": functools.partial(layers.attend, appends=False),
        **{name: peer.run for name, peer in peers.items()},
    }
    if options.accumulate:
        kept = [accumulated(layer) for layer in layers.layers]
        how = {"accumulated": kept, "accumulate": options.accumulate}
        calls["adakv_accumulated"] = functools.partial(layers.attend, **how)
    timings = {f"{n}_launch": t for n, t in launch_times(calls).items()}
    in_graph = {
        name: [functools.partial(call, i) for i in range(count)] for name, call in calls.items()
    }
    timings |= {f"{n}_graph": t for n, t in graph_times(in_graph).items()}
    derived = {"error": error, "layers": count, "MB": layers.num_bytes / 1e6}
    derived["graph_TB_per_s"] = layers.num_bytes / timings["adakv_graph"].median_us / 1e6
    for way in ("launch", "graph") if options.accumulate else ():
        plain = timings[f"adakv_{way}"].median_us
        costs = timings[f"adakv_accumulated_{way}"].median_us / plain - 1
        derived[f"accumulating_costs_{way}"] = costs
    for name, peer in peers.items():
        if case.kv_dtype == "auto":  # FlashInfer's fp8 has other scales
            derived[f"{name}_error"] = layers.error(peer.run(0), 0, appended=False)
        if isinstance(peer, FlashInfer):
            derived[f"{name}_plan_us"] = peer.plan_us()
    harness.report("attend", vars(case), timings, derived, options.save)


CASES = [
    Case(),
    Case(group=1),
    Case(dtype="float32"),
    Case(batch=1, kv_heads=3, group=3, head_dim=64, mean_length=700, layers=30),
    Case(batch=1, kv_heads=3, group=3, head_dim=64, mean_length=7000, new_tokens=512),
]
GPU_BARS = [
    GpuCase(batch=batch, mean_length=mean)
    for batch, mean in ((1, 1024), (1, 4096), (4, 1024), (8, 1024), (16, 1024), (32, 1024),
                        (64, 1024), (8, 8192), (32, 4096), (256, 512))
]  # fmt: skip
GPU_SHAPES = [
    *(GpuCase(batch=8, group=g, kv_heads=8) for g in (1, 2, 8, 16)),
    *(GpuCase(batch=8, head_dim=d) for d in (64, 80, 96, 256)),
    *(GpuCase(batch=1, head_dim=d) for d in (64, 256)),
    GpuCase(batch=8, group=16, head_dim=256),
    GpuCase(batch=8, dtype="float16"),
    GpuCase(batch=8, skew=0.1),
    GpuCase(batch=1, mean_length=4096, skew=0.05),
]

# The same entries in 8 and 4 bits.
GPU_FORMATS = [
    GpuCase(batch=batch, mean_length=mean, head_dim=d, group=g, page_size=p, kv_dtype=kv_dtype)
    for batch, mean, d, g in (
        (8, 1024, 128, 4), (8, 8192, 128, 4), (32, 1024, 128, 4), (32, 4096, 128, 4),
        (32, 4096, 64, 4), (32, 4096, 256, 4), (8, 8192, 128, 1), (8, 8192, 128, 16),
    )
    for kv_dtype, p in (("auto", 16), ("int8", 32), ("fp8", 32), ("int4", 32))
]  # fmt: skip

if __name__ == "__main__":
    parser = harness.parser(__doc__)
    parser.add_argument("--peers", action="store_true", help="on a GPU FlashInfer and torch, too")
    parser.add_argument("--accumulate", choices=("sum", "max", "last"), help="with this, too")
    gpu_cases = [*GPU_BARS, *GPU_SHAPES, *GPU_FORMATS]
    harness.run_cases(parser, cpu=[(CASES, run)], cuda=[(gpu_cases, run_on_gpu)])
