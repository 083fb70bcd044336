"""score of one layer, against the same in plain torch as other libraries write it.

With as many queries as keys: all of a prompt's attention, the maximum of each column.

On a GPU the sizes are those of Llama-3.1-8B's layers. It is timed in a graph of many calls over
rotating buffers, and launch by launch with the L2 cache flushed. "sm_80 path" is what
runs on older GPUs: a negative scale selects it. "prefill attention" is torch's over the same
prompt, whose columns are scored.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import harness
from adakv import ops
from cuda_timing import call_times

GPU_HEADS, GPU_GROUP, GPU_HEAD_DIM, GPU_WINDOW = 8, 4, 128, 32


@dataclass(frozen=True)
class Case:
    batch: int = 1
    kv_heads: int = 3
    group: int = 3
    head_dim: int = 64
    length: int = 7000
    window: int = 32
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class GpuCase:
    length: int


@dataclass(frozen=True)
class GpuColumns:
    length: int


def plain_torch(queries: Tensor, keys: Tensor) -> Tensor:
    """SnapKV's score with the whole ``[Hq, W, T]`` matrix in memory."""
    batch, kv_heads, length, head_dim = keys.shape
    window = queries.shape[2]
    group = queries.shape[1] // kv_heads
    logits = queries @ keys.repeat_interleave(group, 1).mT * head_dim**-0.5
    ones = torch.ones(window, length, dtype=torch.bool, device=keys.device)
    hidden = ones.triu(length - window + 1)
    weights = logits.float().masked_fill(hidden, -torch.inf).softmax(-1)
    means = weights[..., : length - window].mean(2).view(batch, kv_heads, group, -1).mean(2)
    return F.max_pool1d(means, 7, 1, 3)


def plain_torch_columns(queries: Tensor, keys: Tensor) -> Tensor:
    """Column maxima of a prompt's attention, 64 rows at a time and up to the diagonal."""
    batch, kv_heads, length, head_dim = keys.shape
    columns = torch.zeros(batch, kv_heads, length, device=keys.device)
    for first in range(0, length, 64):
        rows = queries[:, :, first : first + 64]
        end = first + rows.shape[2]
        grouped = rows.reshape(batch, kv_heads, -1, head_dim)
        logits = (grouped @ keys[:, :, :end].mT).float() * head_dim**-0.5
        hidden = torch.ones(end - first, end, dtype=torch.bool, device=keys.device).triu(first + 1)
        logits = logits.view(batch, kv_heads, -1, end - first, end).masked_fill(hidden, -torch.inf)
        part = columns[..., :end]
        part.copy_(part.maximum(logits.softmax(-1).amax((2, 3))))
    return columns


def run(case: Case, options: argparse.Namespace) -> None:
    dtype = getattr(torch, case.dtype)
    heads = case.kv_heads * case.group
    queries = torch.randn(case.batch, heads, case.window, case.head_dim, dtype=dtype)
    keys = torch.randn(case.batch, case.kv_heads, case.length, case.head_dim, dtype=dtype)
    lse = torch.full(queries.shape[:3], 9.0)
    is_prompt = case.window == case.length
    settings: dict[str, Any] = {"window_reduce": "max", "window": 0} if is_prompt else {}
    peer = plain_torch_columns if is_prompt else plain_torch
    variants = {
        "adakv": lambda _: ops.score(queries, keys, **settings),
        "adakv, lse given": lambda _: ops.score(queries, keys, lse=lse, **settings),
        "torch": lambda _: peer(queries, keys),
    }
    timings = harness.measure(variants, rounds=options.rounds)
    median = timings["adakv"].median_us
    flops = 4 * case.batch * heads * case.window * case.length * case.head_dim  # two passes
    flops //= 2 if is_prompt else 1  # causality
    derived = {"speedup": timings["torch"].median_us / median, "GFLOP_per_s": flops / median / 1e3}
    harness.report("score", vars(case), timings, derived, options.save)


def random(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def run_on_gpu(case: GpuCase, options: argparse.Namespace) -> None:
    """The window's queries."""
    copies = 3 if case.length > 40000 else 4 if case.length > 8000 else 10
    heads = GPU_HEADS * GPU_GROUP
    with torch.device(options.device):
        queries = [2 * random(1, heads, GPU_WINDOW, GPU_HEAD_DIM) for _ in range(copies)]
        keys = [random(1, GPU_HEADS, case.length, GPU_HEAD_DIM) for _ in range(copies)]
        lse = torch.full(queries[0].shape[:3], 12.0)

    def call(**settings: Any) -> Callable[[int], Tensor]:
        return lambda i: ops.score(queries[i % copies], keys[i % copies], **settings)

    ours = {
        "adakv": call(),
        "adakv, lse given": call(lse=lse),
        "adakv, sm_80 path": call(scale=-(GPU_HEAD_DIM**-0.5)),
        "adakv, maxima over the window": call(window_reduce="max"),
    }
    peers = {"torch": lambda i: plain_torch(queries[i % copies], keys[i % copies])}
    harness.report("score", vars(case), call_times(ours, peers), {}, options.save)


def run_columns_on_gpu(case: GpuColumns, options: argparse.Namespace) -> None:
    """All of a prompt's queries."""
    heads = GPU_HEADS * GPU_GROUP
    with torch.device(options.device):
        queries = [2 * random(1, heads, case.length, GPU_HEAD_DIM) for _ in range(2)]
        keys = [random(1, GPU_HEADS, case.length, GPU_HEAD_DIM) for _ in range(2)]
        lse = torch.full(queries[0].shape[:3], 12.0)

    def call(stride: int = 1, **settings: Any) -> Callable[[int], Tensor]:
        maxima: dict[str, Any] = {"window_reduce": "max", "group_reduce": "max", "pool": "none"}
        settings = maxima | {"window": GPU_WINDOW, "stride": stride, "distance": 16} | settings

        def score(i: int) -> Tensor:
            rows = queries[i % 2][:, :, (case.length - 1) % stride :: stride]
            return ops.score(rows, keys[i % 2], **settings)

        return score

    def prefill_attention(i: int) -> Tensor:
        return F.scaled_dot_product_attention(
            queries[i % 2], keys[i % 2], keys[i % 2], is_causal=True, enable_gqa=True
        )

    ours = {
        "column maxima": call(),
        "column maxima, lse given": call(lse=lse),
        "column maxima, every 4th query": call(stride=4),
        "column sums": call(window_reduce="sum", group_reduce="mean"),
    }
    peers: dict[str, Callable[[int], Tensor]] = {"prefill attention": prefill_attention}
    if case.length < 10000:
        peers["torch, in pieces"] = lambda i: plain_torch_columns(queries[i % 2], keys[i % 2])
    harness.report("columns", vars(case), call_times(ours, peers), {}, options.save)


CASES = [
    Case(),
    Case(dtype="float32"),
    Case(kv_heads=8, group=4, head_dim=128, length=8192),
    Case(length=2000, window=2000),
]
GPU_CASES = [GpuCase(4096), GpuCase(32768), GpuCase(131072)]
GPU_COLUMNS = [GpuColumns(4096), GpuColumns(32768)]

if __name__ == "__main__":
    harness.run_cases(
        harness.parser(__doc__),
        cpu=[(CASES, run)],
        cuda=[(GPU_CASES, run_on_gpu), (GPU_COLUMNS, run_columns_on_gpu)],
    )
