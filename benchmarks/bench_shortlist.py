"""A step that reads some pages of every row, against one that reads them all: choosing the pages by
their bounds, planning and attending, in several layers in turn, more than the last-level cache
holds. On a GPU in a graph of all layers. As in a model's step all layers are planned before the
first one; "planned alone" plans each for itself, as where it isn't known before how many pages are
listed.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import harness
from adakv import ops
from adakv.page_bounds import PageBounds
from adakv.policy import Quest
from adakv.step import Attention, planned
from cuda_timing import graph_times
from filled_rows import filled


@dataclass(frozen=True)
class Case:
    batch: int = 1
    held: int = 8192
    share: float = 0.125
    layers: int = 4
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    kv_dtype: str = "auto"
    dtype: str = "bfloat16"
    page_size: int | None = None  # None: as is usual for the pages

    def __str__(self) -> str:
        pages = "" if self.page_size is None else f"-pages{self.page_size}"
        return f"{self.batch}x{self.held}-share{self.share}-{self.kv_dtype}{pages}"


class Rows:
    """Rows of one length in all layers, whose pages hold random entries, and a step's queries."""

    def __init__(self, case: Case, device: str) -> None:
        self.kv, dtype = filled(case, device), getattr(torch, case.dtype)
        shape = case.layers, case.batch, case.kv_heads * case.group, 1, case.head_dim
        self.queries = torch.randn(shape, device=device).to(dtype)
        self.schedules = self.plan()
        self.bounds = PageBounds(Quest(share=case.share, full_layers=0))
        self.listed_schedules: tuple[Tensor, ...] = ()
        seen, none = [case.held] * case.batch, [0] * case.batch
        for _ in range(2):  # the second time bounds are known
            self.bounds.begin_step(self.kv, seen, none, 1)
            for layer in range(case.layers):
                self.listed(layer)

    def plan(self, **listing: Any) -> tuple[Tensor, ...]:
        """The schedules of all layers."""
        how = {"new_tokens": 0, "page_size": self.kv.page_size, **listing}
        return ops.plan(*self.kv.plan_inputs, **how).unbind()

    def all_pages(self, layer: int) -> Tensor:
        return ops.attend(self.queries[layer], self.kv.layers[layer], self.schedules[layer])[0]

    def listed(self, layer: int) -> ops.Layer:
        view = self.kv.layers[layer]
        return self.bounds.listed(layer, view, self.queries[layer], Attention(), None)

    def some_pages(self, layer: int) -> Tensor:
        if layer == 0:
            listing = self.bounds.listing
            assert listing is not None
            self.listed_schedules = self.plan(**listing._asdict())
        view, schedule = self.listed(layer), self.listed_schedules[layer]
        return ops.attend(self.queries[layer], view, schedule, prefetch=True)[0]

    def planned_alone(self, layer: int) -> Tensor:
        view = self.listed(layer)
        return ops.attend(self.queries[layer], view, planned(view))[0]


def run(case: Case, options: argparse.Namespace) -> None:
    rows = Rows(case, options.device)
    variants = {
        "all": rows.all_pages,
        "choosing": rows.listed,
        "some": rows.some_pages,
        "some, planned alone": rows.planned_alone,
    }
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
    share = timings["some"].median_us / timings["all"].median_us
    sizes = {name: getattr(case, name) for name in case.__dataclass_fields__}
    harness.report("shortlist", sizes, timings, {"time of all": share}, options.save)


CPU_CASES = [
    Case(),
    Case(share=0.25),
    Case(kv_dtype="int8"),
    Case(held=32768, layers=2),
]
CUDA_CASES = [
    Case(batch=32, layers=8),
    Case(batch=32, layers=8, page_size=32),
    Case(batch=32, layers=8, share=0.25),
    Case(batch=32, layers=8, kv_dtype="int8"),
    Case(batch=1, held=32768, layers=32),
]


if __name__ == "__main__":
    harness.run_cases(harness.parser(__doc__), cpu=[(CPU_CASES, run)], cuda=[(CUDA_CASES, run)])
