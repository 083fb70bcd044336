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


def begin(
    kv: KVCache,
    layers: Sequence[int],
    totals: Sequence[Sequence[int]],
    prompt_lens: Sequence[int],
    *,
    first_sequence: int,
) -> tuple[Tensor, Tensor]:
    """Takes the pages of B new sequences for some layers.

    Parameters
    ----------
    kv : :class:`adakv.cache.KVCache`
    layers : ints
        One, or all those of a model-wide policy.
    totals : ints ``[len(layers)][B]``
        As :meth:`adakv.Policy.totals` counts them.
    prompt_lens : ints ``[B]``
    first_sequence : int

    Returns
    -------
    page_ids, next_page : ``[Q]`` and ``[B + 1]`` int32, on the cache's device
        As :func:`adakv.ops.compact` takes them for the first layer; :func:`advance` for the next.
    """
    taken = []  # of each layer, the [Q] pages of each sequence
    for layer, counts in zip(layers, totals, strict=True):
        longest = [min(pair) for pair in zip(counts, prompt_lens, strict=True)]
        page_ids, page_indptr = kv.begin(layer, counts, longest, first_sequence=first_sequence)
        if len(layers) == 1:
            return page_ids, page_indptr
        taken.append(page_ids.split([_num_pages(kv, count) for count in counts]))
    pages = [torch.cat(sequence) for sequence in zip(*taken, strict=True)]
    ends = torch.tensor([0, *map(len, pages)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return torch.cat(pages), ends.to(kv.device, non_blocking=True)


def advance(next_page: Tensor, lengths: Tensor, page_size: int) -> None:
    """Moves ``next_page`` ``[B + 1]`` past the pages of a layer that holds ``lengths``
    ``[B, Hkv]``."""
    pages = (lengths + page_size - 1) // page_size + 1  # and the fresh one
    next_page[:-1] += pages.sum(1, dtype=torch.int32)


def _num_pages(kv: KVCache, total: int) -> int:
    return KVCache.pages_for(total, 0, num_kv_heads=kv.num_kv_heads, page_size=kv.page_size)
