"""select of one layer, by score and in two stages, against top-k of every head in plain torch."""

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


CASES = [Case(), Case(kv_heads=8, length=32768, budget=4096)]

if __name__ == "__main__":
    harness.run_cases(__doc__, CASES, run)
