"""Choosing again for all layers of a model: score, allocate, select and compact in place, against
the same choice with all entries read out of their pages and compacted from there.

On a GPU it is timed in a graph of all layers, whole and by its parts, beside a copy. What has to be
moved at least are the keys, which the scores are made of, and the entries that change their slots,
which are read and written; the time for that at the rate of the faster copy is the floor.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

import harness
from adakv import ops
from adakv.entries import Held
from cuda_timing import graph_times, launch_times
from filled_rows import filled

COPY_BYTES = 1 << 31


@dataclass(frozen=True)
class Case:
    layers: int = 32
    batch: int = 32
    held: int = 2176
    budget: int = 2048
    window: int = 8
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    kv_dtype: str = "auto"
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        shape = f"{self.layers}x{self.batch}x{self.held}-b{self.budget}-W{self.window}"
        return f"{shape}-G{self.group}-D{self.head_dim}-{self.kv_dtype}"

    @property
    def key_bytes(self) -> int:
        """A key, with its scales."""
        groups = -(-self.head_dim // 64)
        scales = {"int8": 4 * groups, "fp8": 2 * groups}
        return (
            self.head_dim + scales[self.kv_dtype]
            if self.kv_dtype in scales
            else (self.head_dim * getattr(torch, self.dtype).itemsize)
        )


class Texts:
    """Rows of one length in all layers, which a choice can be made from again and again."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        self.kv, dtype = filled(case, device), getattr(torch, case.dtype)
        heads = case.kv_heads * case.group
        shape = case.layers, case.batch, heads, case.window, case.head_dim
        self.queries = torch.randn(shape, device=device).to(dtype)
        self.total = case.batch * case.kv_heads * case.budget
        totals = [[case.kv_heads * case.budget] * case.batch] * case.layers
        self.page_ids, self.starts = self.kv.begin_again(totals, [case.held] * case.batch)
        tensors = self.kv.all_layers
        self._state = tensors.block_table, tensors.lengths, tensors.fresh_pages
        self._before = [x.clone() for x in self._state]
        self.scores = [self.score(layer) for layer in range(case.layers)]
        self.kept = [self.choose(scores) for scores in self.scores]

    def restore(self) -> None:
        """All rows are as long as before."""
        for x, before in zip(self._state, self._before, strict=True):
            x.copy_(before)

    def score(self, layer: int) -> Tensor:
        return ops.score(self.queries[layer], None, self.kv.layers[layer], self.case.held)

    def choose(self, scores: Tensor) -> ops.Kept:
        window = self.case.window
        budgets = ops.allocate(scores, self.case.budget, window=window)
        return ops.select(scores, budgets, window=window, total=self.total)

    def compact(self, layer: int, kept: ops.Kept) -> None:
        view = self.kv.layers[layer]
        ops.compact(None, None, kept, view, self.page_ids, self.starts[layer])

    def again(self) -> None:
        self.restore()
        for layer in range(self.case.layers):
            self.compact(layer, self.choose(self.score(layer)))

    def all_scores(self) -> None:
        for layer in range(self.case.layers):
            self.score(layer)

    def all_choices(self) -> None:
        for scores in self.scores:
            self.choose(scores)

    def all_compactions(self) -> None:
        self.restore()
        for layer, kept in enumerate(self.kept):
            self.compact(layer, kept)

    def dense(self) -> None:
        """The same with copies of all entries."""
        self.restore()
        for layer in range(self.case.layers):
            view = self.kv.layers[layer]
            held = Held(view, self.case.held, self.kv.dtype)
            keys, values = (x[:, :, : self.case.held] for x in (held.keys, held.values))
            kept = self.choose(ops.score(self.queries[layer], keys))
            ops.compact(keys, values, kept, view, self.page_ids, self.starts[layer])

    @property
    def least_bytes(self) -> int:
        """Keys that are read; entries that change their slots, with their positions, read and
        written."""
        case, rows = self.case, self.case.batch * self.case.kv_heads
        moved = 0
        for kept in self.kept:
            row = kept.rows(rows)
            slots = torch.arange(len(row), device=row.device) - kept.indptr[row]
            moved += int(((kept.positions != slots) & (kept.positions >= 0)).sum())
        read = case.layers * rows * case.held * case.key_bytes
        return read + 2 * moved * (2 * case.key_bytes + 4)


def run(case: Case, options: argparse.Namespace) -> None:
    texts = Texts(case, options.device)
    variants = {
        "again": texts.again,
        "score": texts.all_scores,
        "choose": texts.all_choices,
        "compact": texts.all_compactions,
        "dense": texts.dense,
    }
    timings = harness.measure(
        {name: lambda _, call=call: call() for name, call in variants.items()},  # type: ignore[misc]
        rounds=options.rounds,
    )
    _report(texts, timings, timings["again"].median_us, timings["dense"].median_us, options)


def run_on_gpu(case: Case, options: argparse.Namespace) -> None:
    texts = Texts(case, options.device)
    source, target = torch.zeros(2, COPY_BYTES // 8, dtype=torch.int32, device=options.device)
    timings = graph_times(
        {
            "again": [texts.again],
            "score": [texts.all_scores],
            "choose": [texts.all_choices],
            "compact": [texts.all_compactions],
            "copy": [lambda: target.copy_(source)],  # a node of its own in a graph
            "kernel_copy": [lambda: torch.add(source, 1, out=target)],
        }
    )
    timings |= launch_times({"dense": lambda _: texts.dense()}, rounds=5, warmup=2)
    fastest = min(timings[name].median_us for name in ("copy", "kernel_copy"))
    rate = COPY_BYTES / fastest  # read and written, bytes a microsecond
    again = timings["again"].median_us
    derived = {"copy_TB_per_s": rate / 1e6, "floor_ms": texts.least_bytes / rate / 1e3}
    derived["times_floor"] = again / (derived["floor_ms"] * 1e3)
    _report(texts, timings, again, timings["dense"].median_us, options, derived)


def _report(
    texts: Texts,
    timings: dict[str, harness.Timing],
    again_us: float,
    dense_us: float,
    options: argparse.Namespace,
    more: dict[str, float] | None = None,
) -> None:
    derived = {
        "ms": again_us / 1e3,
        "least_GB": texts.least_bytes / 1e9,
        "GB_per_s": texts.least_bytes / again_us / 1e3,
        "speedup": dense_us / again_us,
        **(more or {}),
    }
    harness.report("again", vars(texts.case), timings, derived, options.save)


CASES = [
    Case(layers=2, batch=2, kv_heads=3, head_dim=64, held=1152, budget=1024),
    Case(layers=2, batch=2, kv_heads=3, head_dim=64, held=1152, budget=1024, kv_dtype="int8"),
]
GPU_CASES = [
    Case(),
    Case(window=32),
    Case(window=1),
    Case(kv_dtype="int8"),
    Case(kv_dtype="fp8"),
    Case(batch=1),
    Case(batch=4, held=4096 + 128, budget=4096),
]

if __name__ == "__main__":
    harness.run_cases(harness.parser(__doc__), cpu=[(CASES, run)], cuda=[(GPU_CASES, run_on_gpu)])
