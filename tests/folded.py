"""Biases, and what leaves folded into what stays: a part of ``reference.py``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def fold(
    keys: Tensor,
    values: Tensor,
    masses: Tensor,
    kept: list[int],
    cosine: float,
) -> tuple[Tensor, Tensor]:
    """Values ``[n, D]`` and biases ``[n]`` in float64 of those positions of a row that are kept.

    Keys and values are ``[T, D]``, masses ``[T]``. An entry that leaves goes to the kept one whose
    key is most like its own, both less the mean of all keys, if the cosine is at least ``cosine``
    and its mass not more than that of the kept one; it counts for its mass beside that. What has no
    mass takes no part.
    """
    keys, values, masses = keys.double(), values.double(), masses.double()
    centred = keys - keys.mean(0)
    merged = {k: masses[k] * values[k] for k in kept}
    total = {k: float(masses[k]) for k in kept}
    for t in range(len(keys)):
        targets = [k for k in kept if masses[k] > 0]
        if t in kept or masses[t] <= 0 or not targets:
            continue
        similar = [float(torch.cosine_similarity(centred[t], centred[k], dim=0)) for k in targets]
        k = targets[similar.index(max(similar))]
        if max(similar) >= cosine and masses[t] <= masses[k]:
            merged[k] = merged[k] + masses[t] * values[t]
            total[k] += float(masses[t])
    grown = [total[k] / float(masses[k]) if masses[k] > 0 else 1.0 for k in kept]
    new = [merged[k] / total[k] if masses[k] > 0 else values[k] for k in kept]
    return torch.stack(new), torch.tensor([math.log(x) for x in grown], dtype=torch.float64)


def biases_of(layer: Any, b: int, h: int) -> Tensor:
    """What is added to the logits of a row's entries ``[length]``; zeros without biases."""
    length = int(layer.lengths[b, h])
    if layer.page_biases is None:
        return torch.zeros(length)
    pages = layer.block_table[b, h, : -(-length // layer.page_biases.shape[1])].long().cpu()
    return layer.page_biases.cpu()[pages].flatten()[:length]
