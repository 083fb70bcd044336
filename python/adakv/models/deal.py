"""Pages for all layers at once, where only the device knows how much each layer keeps.

A model-wide policy keeps K entries of a prompt in all layers together. Over L * Hkv rows they fill
at most K // P + L * Hkv pages, however they lie, and every row needs a fresh page besides. The host
takes that many; the device deals them out, each layer from where the one before stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adakv.cache import KVCache


def begin_all(
    kv: KVCache, totals: Sequence[Sequence[int]], longest: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Takes the pages of new sequences for all layers.

    Parameters
    ----------
    kv : :class:`adakv.cache.KVCache`
    totals : ints ``[L][B]``
        As :meth:`adakv.Policy.totals` counts them.
    longest : ints ``[B]``
        Most entries of a row.

    Returns
    -------
    page_ids, next_page : ``[Q]`` and ``[B + 1]`` int32, on the cache's device
        As :func:`adakv.ops.compact` takes them for layer 0; :func:`advance` before the others.
    """
    layers = []  # [L][B] tensors
    for layer, counts in enumerate(totals):
        pages = [
            KVCache.pages_for(n, 0, num_kv_heads=kv.num_kv_heads, page_size=kv.page_size)
            for n in counts
        ]
        page_ids, _ = kv.begin(layer, counts, longest)
        layers.append(page_ids.split(pages))
    sequences = [torch.cat(of_one) for of_one in zip(*layers, strict=True)]
    ends = torch.tensor([0, *map(len, sequences)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return torch.cat(sequences), ends.to(kv.device, non_blocking=True)


def advance(next_page: Tensor, lengths: Tensor, page_size: int) -> None:
    """Moves ``next_page`` ``[B + 1]`` past the pages of a layer that holds ``lengths``
    ``[B, Hkv]``."""
    pages = (lengths + page_size - 1) // page_size + 1  # and the fresh one
    next_page[:-1] += pages.sum(1, dtype=torch.int32)
