"""allocate of one layer, against the same top-k in plain torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

import harness
from adakv import ops


@dataclass(frozen=True)
class Case:
    batch: int = 1
    kv_heads: int = 3
    length: int = 7000
    budget: int = 700
    window: int = 32


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


CASES = [Case(), Case(kv_heads=8, length=32768, budget=4096)]

if __name__ == "__main__":
    harness.run_cases(__doc__, CASES, run)
