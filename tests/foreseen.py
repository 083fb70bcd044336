"""A learned scorer in plain torch: the definition of what it knows and says, row by row in float64
(ForesightKV, arXiv 2602.03203)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    queries: Tensor, keys: Tensor, scale: float | None = None, softcap: float | None = None
) -> Tensor:
    """``[R, n]``: what queries ``[R, D]`` of the last R entries attend to of ``[n, D]``."""
    rows, length = len(queries), len(keys)
    found = torch.zeros(rows, length, dtype=torch.float64)
    for r in range(rows):
        seen = length - rows + r + 1
        z = keys[:seen].double() @ queries[r].double() * (scale or queries.shape[1] ** -0.5)
        if softcap:
            z = softcap * torch.tanh(z / softcap)
        found[r, :seen] = z.softmax(0)
    return found


def features(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    carried: Tensor,
    window: int,
    **logits: float | None,
) -> tuple[Tensor, Tensor]:
    """``[n, 2 D + 8 G]`` and what is carried on, ``[n, 2, G]``, of one row.

    Queries are ``[G, R, D]``, keys and values ``[n, D]``, carried ``[n, 2, G]``.
    """
    columns: list[list[Tensor]] = [[] for _ in range(8)]
    for g, of_head in enumerate(queries):
        p = attention(of_head, keys, **logits)
        newest = p[-window:]
        running = carried[:, 0, g].double() + p.sum(0)
        decayed = 0.9 * carried[:, 1, g].double() + p.sum(0)
        statistics = [newest.max(0).values, newest.min(0).values, newest.sum(0)]
        statistics += [p[-count:].sum(0) for count in (16, 8, 32)] + [running, decayed]
        for column, statistic in zip(columns, statistics, strict=True):
            column.append(statistic)
    known = torch.stack([x for column in columns for x in column], 1)
    carried = torch.stack([torch.stack(column, 1) for column in columns[6:]], 1)
    return torch.cat([keys.double(), values.double(), known], 1), carried


def score(known: Tensor, weights: dict[str, Tensor], layer: int, head: int) -> Tensor:
    """``[n]``: what a file says of features ``[n, F]``; the larger, the longer an entry stays."""
    place = f"layers.{layer}"
    fc1, bias1, fc2, bias2 = (
        weights[f"{place}.{name}"][head].double()
        for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    )
    z = known @ fc1 + bias1
    z = z * (1 + torch.erf(z / math.sqrt(2))) / 2
    return -(z @ fc2 + bias2)[:, 0]
