"""Reads by a small model's attention, in plain Python: the definitions of SpecAttn and SmallKV."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

import listed_pages


def layer_map(cost: Tensor) -> float:
    """The least sum over all ways to give rows columns that never go back."""
    rows, columns = cost.shape
    ways = itertools.combinations_with_replacement(range(columns), rows)
    return min(float(sum(cost[j, i] for j, i in enumerate(way))) for way in ways)


def jaccard(ours: Tensor, theirs: Tensor, count: int) -> float:
    """How much the ``count`` largest of two ``[T]`` are the same entries."""
    a, b = (set(x.argsort(descending=True, stable=True)[:count].tolist()) for x in (ours, theirs))
    return len(a & b) / len(a | b)


def draft_pages(
    weights: Tensor, positions: list[int], *, page_size: int, mass: float, newest: int = 1
) -> list[int]:
    """Which pages of a row are read whose entries stand at ``positions``, by what a draft's tokens
    look at ``[S, T]``: those with an entry in the smallest set of any of them, and the newest."""
    tokens, length = len(weights), len(positions)
    chosen: set[int] = set()
    for row in weights:
        chosen |= set((row >= listed_pages.top_p(row, mass)).nonzero().flatten().tolist())
    num_pages = -(-length // page_size)
    older = max(num_pages - newest - -(-(tokens - 1) // page_size), 0)
    found = {slot // page_size for slot, position in enumerate(positions) if position in chosen}
    return sorted({page for page in found if page < older} | {*range(older, num_pages)})


def small_kv(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    sums: Tensor,
    weights: Tensor,
    counts: tuple[int, int, int],
    *,
    scale: float,
    renormalise: bool = True,
) -> Tensor:
    """``[G, D]``: what the q heads ``[G, D]`` of a row of entries ``[n, D]`` get, in float64.

    ``sums`` and ``weights`` ``[G, n]`` are those of the small model's heads that belong to them.
    """
    critical, recent, marginal = counts
    older = len(keys) - recent
    order = sums.sum(0)[:older].argsort(descending=True, stable=True).tolist()
    attended = [*order[:critical], *range(older, len(keys))]
    by_values = order[critical : critical + marginal]
    found = []
    for query, given in zip(queries.double(), weights.double(), strict=True):
        p = (keys[attended].double() @ query * scale).softmax(0)
        if renormalise:
            p = p * (1 - given[by_values].sum())
        found.append(p @ values[attended].double() + given[by_values] @ values[by_values].double())
    return torch.stack(found)
