"""select of one layer, by score and in two stages, against top-k of every head in plain torch.

On a GPU the sizes are those of Llama-3.1-8B's layers. It is timed in a graph of many calls over
rotating buffers, and launch by launch with the L2 cache flushed. Its peer there makes
budgets and positions, as other libraries do it in torch.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

import harness
from adakv import ops
from bench_allocate import GPU_CASES, GPU_HEADS, GPU_WINDOW, GpuCase, scores_like
from cuda_timing import call_times


@dataclass(frozen=True)
class Case:
    batch: int = 1
    kv_heads: int = 3
    length: int = 7000
    budget: int = 700
    window: int = 32


def plain_torch(scores: Tensor, case: Case) -> Tensor:
    """The same number in every head, which is all that topk can do."""
    candidates = scores[..., : case.length - case.window]
    return candidates.topk(case.budget - case.window).indices.sort().values


def run(case: Case, options: argparse.Namespace) -> None:
    scores = torch.rand(case.batch, case.kv_heads, case.length)
    norms = torch.rand_like(scores)
    budgets = torch.full((case.batch, case.kv_heads), case.budget, dtype=torch.int32)
    total = case.batch * case.kv_heads * case.budget

    def select(norms: Tensor | None) -> ops.Kept:
        return ops.select(scores, budgets, window=case.window, norms=norms, total=total)

    variants = {
        "adakv": lambda _: select(None),
        "adakv, two stages": lambda _: select(norms),
        "torch": lambda _: plain_torch(scores, case),
    }
    timings = harness.measure(variants, rounds=options.rounds)
    derived = {"speedup": timings["torch"].median_us / timings["adakv"].median_us}
    harness.report("select", vars(case), timings, derived, options.save)


def torch_choice(scores: Tensor, budget: int) -> list[Tensor]:
    """Budgets by one top-k over all heads, as read on the host, then a top-k for each head."""
    candidates = scores[0, :, :-GPU_WINDOW]
    total = GPU_HEADS * (budget - GPU_WINDOW)
    best = candidates.flatten().topk(total).indices // candidates.shape[-1]
    counts = torch.bincount(best, minlength=GPU_HEADS)
    counts = (0.8 * counts + 0.2 * (budget - GPU_WINDOW)).round().int().tolist()
    return [row.topk(k).indices for row, k in zip(candidates, counts, strict=True)]


def run_on_gpu(case: GpuCase, options: argparse.Namespace) -> None:
    copies = 4
    with torch.device(options.device):
        scores = [scores_like(case.scores, case.length) for _ in range(copies)]
    norms = torch.rand_like(scores[0])
    budgets = [ops.allocate(x, case.budget, window=GPU_WINDOW) for x in scores]
    total = GPU_HEADS * case.budget

    def select(i: int, budgets: Tensor, **options: Tensor) -> ops.Kept:
        return ops.select(scores[i % copies], budgets, window=GPU_WINDOW, total=total, **options)

    def both(i: int) -> ops.Kept:
        return select(i, ops.allocate(scores[i % copies], case.budget, window=GPU_WINDOW))

    ours = {
        "select": lambda i: select(i, budgets[i % copies]),
        "select, two stages": lambda i: select(i, budgets[i % copies], norms=norms),
        "allocate + select": both,
    }
    peers = {"torch": lambda i: torch_choice(scores[i % copies], case.budget)}
    harness.report("choose", vars(case), call_times(ours, peers), {}, options.save)


CASES = [Case(), Case(kv_heads=8, length=32768, budget=4096)]

if __name__ == "__main__":
    harness.run_cases(harness.parser(__doc__), cpu=[(CASES, run)], cuda=[(GPU_CASES, run_on_gpu)])
