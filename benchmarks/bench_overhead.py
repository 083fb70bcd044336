"""What a call costs before any work is done: each verb on tiny tensors.

    python benchmarks/bench_overhead.py

Times the direct call, which is what models use, and the same through torch.ops.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from typing import Any

import torch

from adakv import ops
from adakv.cache import KVCache


def microseconds(call: Callable[[], Any]) -> float:
    """Median of 9 runs of 2,000 calls."""
    call()
    runs = timeit.repeat(call, number=2000, repeat=9)
    return sorted(runs)[4] / 2000 * 1e6


def main() -> None:
    """Prints a table: verb, direct call, call through the dispatcher."""
    torch.set_num_threads(1)
    cache = KVCache(
        num_layers=1,
        num_sequences=1,
        num_kv_heads=1,
        head_dim=8,
        num_pages=8,
        max_row_pages=4,
        dtype=torch.float32,
    )
    layer = cache.layer(0)
    page_ids, page_indptr = cache.begin(0, [4], [4])
    x = torch.zeros(1, 1, 4, 8)
    kept = ops.Kept(torch.arange(4, dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32))
    ops.compact(x, x, kept, layer, page_ids, page_indptr)
    scores = ops.score(x[:, :, :2], x)
    budgets = ops.allocate(scores, 3, window=2)
    schedule = ops.plan(*cache.plan_inputs)
    one = x[:, :, :1]
    empty = torch.zeros(1, dtype=torch.int32)
    print(f"torch {torch.__version__}\n{'verb':12}{'direct, us':>12}{'torch.ops, us':>15}")
    op = torch.ops.adakv
    for verb, direct, dispatched in [
        (
            "score",
            lambda: ops.score(x[:, :, :2], x),
            lambda: op.score(
                x[:, :, :2], x, None, None, None, 0.0, 0.0, "mean", "mean", "group_first", "max", 7
            ),
        ),
        (
            "allocate",
            lambda: ops.allocate(scores, 3, window=2),
            lambda: op.allocate(scores, 3, 2, None, 0.2, "blend"),
        ),
        (
            "select",
            lambda: ops.select(scores, budgets, window=2, total=3),
            lambda: op.select(scores, budgets, 2, None, None, 0.5, 1e-4, 3),
        ),
        (
            "plan",
            lambda: ops.plan(*cache.plan_inputs),
            lambda: op.plan(*cache.plan_inputs, 1, None, 16),
        ),
        (
            "append",
            lambda: ops.append(one, one, layer, num_new=empty),
            lambda: op.append(one, one, *layer, empty),
        ),
        (
            "attend",
            lambda: ops.attend(one, layer, schedule[0]),
            lambda: op.attend(one, *layer, schedule[0], None, None, None, None, 0.0, 0.0),
        ),
    ]:
        print(f"{verb:12}{microseconds(direct):12.2f}{microseconds(dispatched):15.2f}")


if __name__ == "__main__":
    main()
