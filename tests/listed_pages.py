"""Sparse reads in plain torch: the definition of what a step lists, row by row in float64."""

from __future__ import annotations

from typing import Any

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


def listed_length(
    length: int, tokens: int, *, page_size: int, share: float, least: int, newest: int, asks: bool
) -> int:
    """How many of a row's ``length`` entries lie in pages that a step of ``tokens`` columns lists
    with a mass of 1; ``asks``: some of these are tokens of the row's sequence."""
    num_pages = -(-length // page_size)
    budget = max(-(-num_pages * round(share * 2**20) // 2**20), min(least, num_pages))
    always = min(newest + -(-(tokens - 1) // page_size), num_pages)
    count = max(budget, always) if asks or budget >= num_pages else always
    return length - (num_pages - count) * page_size


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


def foretold(history: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """``[m]``: what the network says of the pages between the first and the newest, from the
    largest attention of each in the last steps ``[H, m]`` (AttentionPredictor, arXiv
    2502.04077)."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d((1, None)), torch.nn.Flatten(1, 2),
        torch.nn.Conv1d(32, 1, 1),
    ).double()  # fmt: skip
    for number, place in (("1", 0), ("2", 2), ("3", 6)):
        layer: Any = network[place]
        layer.weight.data = weights[f"conv{number}.weight"].double()
        layer.bias.data = weights[f"conv{number}.bias"].double()
    with torch.no_grad():
        return network(history.double()[None, None])[0, 0]


def foretold_pages(
    histories: Tensor,
    length: int,
    weights: dict[str, Tensor],
    *,
    page_size: int,
    share: float,
    least: int = 8,
    first: int = 4,
    newest: int = 4,
) -> list[int]:
    """Which pages of one row of so many entries a step reads, ascending, by the histories of the
    group's q heads ``[G, H, m]``."""
    count = -(-length // page_size)
    newest = min(newest, count)
    middle = [*range(first, count - newest)]
    always = {*range(min(first, count)), *range(count - newest, count)}
    budget = max(-(-count * round(share * 2**20) // 2**20), min(least, count))
    worth = dict.fromkeys(middle, 0.0)
    if middle:
        of_heads = [foretold(of_head[:, middle], weights) for of_head in histories]
        worth = dict(zip(middle, torch.stack(of_heads).amax(0).tolist(), strict=True))
    best = sorted(middle, key=lambda page: (-worth[page], page))
    room = max(budget - len(always), 0)
    return sorted(always | {*best[:room]})
