"""score of one layer, against the same in plain torch as other libraries write it.

With as many queries as keys: all of a prompt's attention, the maximum of each column.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import harness
from adakv import ops


@dataclass(frozen=True)
class Case:
    batch: int = 1
    kv_heads: int = 3
    group: int = 3
    head_dim: int = 64
    length: int = 7000
    window: int = 32
    dtype: str = "bfloat16"


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


CASES = [
    Case(),
    Case(dtype="float32"),
    Case(kv_heads=8, group=4, head_dim=128, length=8192),
    Case(length=2000, window=2000),
]

if __name__ == "__main__":
    harness.run_cases(__doc__, CASES, run)
