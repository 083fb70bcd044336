"""Sparse reads in plain torch: the definition of what a step lists, row by row in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def capped(logit: Tensor, softcap: float | None) -> Tensor:
    return logit if not softcap else softcap * torch.tanh(logit / softcap)


def top_p(weights: Tensor, mass: float, steps: int = 10) -> float:
    """The threshold that holds the largest ``weights`` ``[n]`` of which the sum is at least
    ``mass`` of all, by bisection, so nearly (SpecAttn, arXiv 2510.27641)."""
    low, high = 0.0, float(weights.max())
    for _ in range(steps):
        middle = (low + high) / 2
        if weights[weights >= middle].sum() >= mass * weights.sum():
            low = middle
        else:
            high = middle
    return low


def listed_pages(
    queries: Tensor,
    keys: Tensor,
    *,
    page_size: int,
    share: float,
    mass: float = 1.0,
    least: int = 0,
    newest: int = 1,
    scale: float | None = None,
    softcap: float | None = None,
) -> list[int]:
    """Which pages of one row a step reads (Quest, arXiv 2406.10774), ascending.

    ``queries`` ``[G, S, D]`` are those of the group's S tokens, ``keys`` ``[length, D]`` what the
    row holds, the S tokens included. In each page and dimension the largest product that a key
    could have with a query is that with its largest or its smallest number there.
    """
    tokens, length = queries.shape[1], len(keys)
    num_pages = -(-length // page_size)
    budget = max(-(-num_pages * round(share * 2**20) // 2**20), min(least, num_pages))
    num_newest = min(newest + -(-(tokens - 1) // page_size), num_pages)
    older = num_pages - num_newest
    if budget >= num_pages and mass == 1:
        return list(range(num_pages))
    z = torch.empty(queries.shape[0] * tokens, older, dtype=torch.float64)
    for page in range(older):
        held = keys[page * page_size : (page + 1) * page_size]
        for r, q in enumerate(queries.flatten(0, 1).double()):
            bound = torch.maximum(q * held.amax(0), q * held.amin(0)).sum()
            z[r, page] = capped(bound * (scale or queries.shape[2] ** -0.5), softcap)
    weights = z.softmax(1)  # [G * S, older]
    if mass < 1 and older:  # what a query doesn't need counts for nothing
        for row in weights:
            row[row < top_p(row, mass)] = -1
    best = weights.amax(0) if older else weights.sum(0)
    listed = best.argsort(descending=True, stable=True).tolist()[: max(budget - num_newest, 0)]
    return sorted(x for x in listed if best[x] >= 0) + list(range(older, num_pages))
