"""allocate of one layer, against the same top-k in plain torch.

On a GPU the sizes are those of Llama-3.1-8B's layers. It is timed in a graph of many calls over
rotating buffers, and launch by launch with the L2 cache flushed. Its peer there is that of
bench_select.py, which makes budgets and positions.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

import harness
from adakv import ops
from cuda_timing import call_times

GPU_HEADS, GPU_WINDOW = 8, 32


@dataclass(frozen=True)
class Case:
    batch: int = 1
    kv_heads: int = 3
    length: int = 7000
    budget: int = 700
    window: int = 32


@dataclass(frozen=True)
class GpuCase:
    length: int
    scores: str  # of scores_like
    budget: int


def plain_torch(scores: Tensor, case: Case) -> Tensor:
    candidates = scores[..., : case.length - case.window]
    total = case.kv_heads * (case.budget - case.window)
    best = candidates.flatten(1).topk(total).indices // candidates.shape[-1]
    return torch.stack([torch.bincount(heads, minlength=case.kv_heads) for heads in best])


def run(case: Case, options: argparse.Namespace) -> None:
    scores = torch.rand(case.batch, case.kv_heads, case.length)
    variants = {
        "adakv": lambda _: ops.allocate(scores, case.budget, window=case.window),
        "torch": lambda _: plain_torch(scores, case),
    }
    timings = harness.measure(variants, rounds=options.rounds)
    derived = {"speedup": timings["torch"].median_us / timings["adakv"].median_us}
    harness.report("allocate", vars(case), timings, derived, options.save)


def scores_like(kind: str, length: int) -> Tensor:
    """Pooled probabilities, sharper from head to head; those of bfloat16; or all equal."""
    if kind == "equal":
        return torch.full((1, GPU_HEADS, length), 0.25)
    sharpness = torch.linspace(1, 4, GPU_HEADS)[:, None]
    scores = (torch.randn(1, GPU_HEADS, length) * sharpness).softmax(-1)
    if kind == "bfloat16":
        return scores.bfloat16().float()
    return torch.nn.functional.max_pool1d(scores, 7, 1, 3)


def run_on_gpu(case: GpuCase, options: argparse.Namespace) -> None:
    with torch.device(options.device):
        scores = [scores_like(case.scores, case.length) for _ in range(4)]

    def allocate(i: int) -> Tensor:
        return ops.allocate(scores[i % 4], case.budget, window=GPU_WINDOW)

    timings = call_times({"allocate": allocate}, {})
    harness.report("choose", vars(case), timings, {}, options.save)


CASES = [Case(), Case(kv_heads=8, length=32768, budget=4096)]
GPU_CASES = [
    GpuCase(length, scores, budget)
    for length in (4096, 32768, 131072)
    for scores, budget in (
        ("float32", 1024),
        ("bfloat16", 1024),
        ("equal", 1024),
        ("float32", length // 5),
    )
]

if __name__ == "__main__":
    harness.run_cases(harness.parser(__doc__), cpu=[(CASES, run)], cuda=[(GPU_CASES, run_on_gpu)])
