"""What each of two processes does in tests/vllm/test_ranks.py: here new processes find it."""

from __future__ import annotations

import torch
import torch.distributed

from adakv.vllm.ranks import layer_wide_totals

#: name -> kind of scores, total, most of a rank
CASES = {
    "free": ("random", 60, 1000),
    "capped": ("random", 60, 35),
    "equal": ("equal", 61, 1000),
    "everything": ("random", 400, 1000),
}


def scores_of(rank: int, kind: str) -> torch.Tensor:
    """``[2, 100]`` of a rank."""
    generator = torch.Generator().manual_seed(rank)
    if kind == "equal":
        return torch.full((2, 100), 0.25)
    scores = torch.rand(2, 100, generator=generator) ** 4 * (1 + 2 * rank)
    scores[:, -10:] = -torch.inf
    return scores


def work(rank: int, port: int, folder: str) -> None:
    """All cases, and the message of the error, into a file named after the rank."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results = {
        name: layer_wide_totals(scores_of(rank, kind), total, most)
        for name, (kind, total, most) in CASES.items()
    }
    try:
        layer_wide_totals(scores_of(rank, "random"), 101, 50)
    except ValueError as error:
        results["error"] = str(error)
    torch.save(results, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()
