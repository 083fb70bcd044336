"""value_norm of one layer, against the same in plain torch as other libraries write it.

On a GPU the sizes are those of Llama-3.1-8B's layers. It is timed in a graph of many calls over
rotating buffers, and launch by launch with the L2 cache flushed. "sm_80 path" is what
runs on older GPUs: a head dim of 120, which it pads to 128, selects it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

import harness
from adakv import ops
from cuda_timing import call_times

GPU_HEADS, GPU_GROUP, GPU_HEAD_DIM, GPU_WIDTH = 8, 4, 128, 4096


@dataclass(frozen=True)
class Case:
    batch: int = 1
    kv_heads: int = 3
    group: int = 3
    head_dim: int = 64
    length: int = 7000
    width: int = 576
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class GpuCase:
    length: int


def plain_torch(values: Tensor, w_o: Tensor) -> Tensor:
    """One q head at a time: the products of all at once would not fit for long prompts."""
    kv_heads, head_dim = values.shape[1], values.shape[3]
    heads = w_o.view(w_o.shape[0], kv_heads, -1, head_dim).permute(2, 1, 3, 0)  # [G, Hkv, D, E]
    norms = [(values @ head).abs().sum(-1, dtype=torch.float32) for head in heads]
    return torch.stack(norms).mean(0)


def run(case: Case, options: argparse.Namespace) -> None:
    dtype = getattr(torch, case.dtype)
    heads = case.kv_heads * case.group
    values = torch.randn(case.batch, case.kv_heads, case.length, case.head_dim, dtype=dtype)
    w_o = torch.randn(case.width, heads * case.head_dim, dtype=dtype)
    variants = {
        "adakv l1": lambda _: ops.value_norm(values, w_o),
        "adakv l2_gram": lambda _: ops.value_norm(values, w_o, norm="l2_gram"),
        "torch l1": lambda _: plain_torch(values, w_o),
    }
    timings = harness.measure(variants, rounds=options.rounds)
    median = timings["adakv l1"].median_us
    flops = 2 * case.batch * heads * case.length * case.head_dim * case.width
    derived = {
        "speedup": timings["torch l1"].median_us / median,
        "GFLOP_per_s": flops / median / 1e3,
    }
    harness.report("value_norm", vars(case), timings, derived, options.save)


def run_on_gpu(case: GpuCase, options: argparse.Namespace) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=options.device).bfloat16()

    values = [random(1, GPU_HEADS, case.length, GPU_HEAD_DIM) for _ in range(3)]
    w_o = 0.02 * random(GPU_WIDTH, GPU_HEADS * GPU_GROUP * GPU_HEAD_DIM)
    narrow = [v[..., :120].contiguous() for v in values]
    narrow_w_o = w_o[:, : GPU_HEADS * GPU_GROUP * 120].contiguous()
    ours = {
        "adakv l1": lambda i: ops.value_norm(values[i % 3], w_o),
        "adakv l1, sm_80 path": lambda i: ops.value_norm(narrow[i % 3], narrow_w_o),
        "adakv l2_gram": lambda i: ops.value_norm(values[i % 3], w_o, norm="l2_gram"),
    }
    peers = {"torch l1": lambda i: plain_torch(values[i % 3], w_o)}
    harness.report("value_norm", vars(case), call_times(ours, peers), {}, options.save)


CASES = [
    Case(),
    Case(dtype="float32"),
    Case(kv_heads=8, group=4, head_dim=128, length=2048, width=4096),
]
GPU_CASES = [GpuCase(4096), GpuCase(32768)]

if __name__ == "__main__":
    harness.run_cases(harness.parser(__doc__), cpu=[(CASES, run)], cuda=[(GPU_CASES, run_on_gpu)])
