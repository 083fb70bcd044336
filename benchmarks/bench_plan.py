"""plan for all layers of a step, over rows as ragged as Ada-KV makes them.

On a GPU it is timed launch by launch with the L2 cache flushed, and in a graph of many calls.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import harness
from adakv import ops
from cuda_timing import graph_times, launch_times

KV_HEADS, PAGE_SIZE = 8, 16


@dataclass(frozen=True)
class Case:
    layers: int
    sequences: int
    mean_length: int = 1024


def plan_call(case: Case, device: str) -> Callable[[], Tensor]:
    """plan with tables of random pages."""
    floor = case.mean_length // 5 + 1
    rest = (case.mean_length - floor) * KV_HEADS
    share = torch.distributions.Dirichlet(torch.full((KV_HEADS,), 0.7))
    lengths = (floor + share.sample((case.layers, case.sequences)) * rest).int()
    columns = int(lengths.max()) // PAGE_SIZE + 2
    table = torch.randint(1 << 20, (*lengths.shape, columns)).int()
    fresh = torch.randint(1 << 20, (*lengths.shape, 32)).int()
    inputs = (x.to(device) for x in (lengths, table, fresh))
    return functools.partial(ops.plan, *inputs, page_size=PAGE_SIZE)


def run(case: Case, options: argparse.Namespace) -> None:
    plan = plan_call(case, options.device)
    timings = harness.measure({"adakv": lambda _: plan()}, rounds=options.rounds)
    harness.report("plan", vars(case), timings, {}, options.save)


def run_on_gpu(case: Case, options: argparse.Namespace) -> None:
    plan = plan_call(case, options.device)
    timings = {"launch": launch_times({"plan": lambda _: plan()})["plan"]}
    timings["graph"] = graph_times({"plan": [plan] * 20})["plan"]
    harness.report("plan", vars(case), timings, {}, options.save)


CASES = [Case(32, 64), Case(32, 1), Case(1, 64)]

if __name__ == "__main__":
    harness.run_cases(harness.parser(__doc__), cpu=[(CASES, run)], cuda=[(CASES, run_on_gpu)])
