"""Pages on another device, or in a pool of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adakv.cache import KVCache, sequences
from adakv.tensors import SHARED
from adakv.tiered_cache import TieredCache


def moved_tiers(kv: TieredCache, device: torch.device, new_tokens: int) -> TieredCache:
    """:func:`moved`, of each tier."""
    first, *others = kv.caches
    caches = [moved(first, device, new_tokens), *(moved(cache, device, 0) for cache in others)]
    basis = kv.basis and kv.basis.each(lambda x: x.to(device, copy=True))
    return TieredCache(kv.tiers, caches, basis)


def moved(
    kv: KVCache, device: torch.device, new_tokens: int, slots: slice = slice(None)
) -> KVCache:
    """A cache on a device that holds what ``kv`` does in some slots, bit for bit, with room for so
    many tokens more of each sequence. Nothing is shared with ``kv`` or its forks.

    Raises ``adakv.Error`` if the memory can't be had.
    """
    totals = kv.lengths(slots).sum(2).tolist()  # [L][B]
    sizes = {"num_kv_heads": kv.num_kv_heads, "page_size": kv.page_size}
    pages = sum(kv.pages_for(n, new_tokens, **sizes) for layer in totals for n in layer)
    new = KVCache(
        num_layers=kv.num_layers,
        num_sequences=len(totals[0]),
        head_dim=kv.head_dim,
        value_dim=kv.value_dim,
        num_pages=pages,
        max_row_pages=kv.max_row_pages,
        dtype=kv.dtype,
        kv_dtype=kv.kv_dtype,
        has_biases=kv.has_biases,
        device=device,
        **sizes,
    )
    move_into(new, 0, kv, slots)
    return new


def move_into(new: KVCache, first_sequence: int, kv: KVCache, slots: slice = slice(None)) -> None:
    """Puts what ``kv`` holds in some slots into empty ones of another cache, from
    ``first_sequence`` on, with pages of their own.

    Raises ``adakv.Error`` if there are too few free pages.
    """
    lengths = kv.lengths(slots)
    longest = [int(n) for n in lengths.amax((0, 2)).tolist()]
    places = slice(first_sequence, first_sequence + lengths.shape[1])
    for index in range(kv.num_layers):
        old = sequences(kv.layer(index), slots)
        view = sequences(new.layer(index), places)
        table = begin_rows(new, index, lengths[index], longest, old.seen, first_sequence)
        old_table = old.block_table.cpu()
        before = old_table[old_table >= 0].long().to(kv.device)  # row by row, as they are dealt
        after = table[table >= 0].long().to(new.device)
        for name in SHARED:
            x, y = getattr(old, name), getattr(view, name)
            if x is not None:
                x, y = (bytes_of(part) for part in (x, y))
                y[after] = x[before].to(new.device)
        if old.tails is not None and view.tails is not None:
            view.tails.copy_(old.tails)


def bytes_of(pages: Tensor) -> Tensor:
    """Pages of codes as bytes: float8 can't be indexed everywhere."""
    return pages.view(torch.uint8) if pages.dtype == torch.float8_e4m3fn else pages


def begin_rows(
    kv: KVCache,
    layer: int,
    lengths: Tensor,
    longest: Sequence[int],
    seen: Tensor,
    first_sequence: int = 0,
) -> Tensor:
    """Gives rows of a layer pages for ``lengths`` ``[B, Hkv]`` entries, which are to be filled, as
    compact deals them, from a sequence on; their table ``[B, Hkv, M]`` int32, on the CPU as
    ``lengths``."""
    view = sequences(kv.layer(layer), slice(first_sequence, first_sequence + len(lengths)))
    totals = lengths.sum(1).tolist()
    page_ids, starts = (
        x.cpu() for x in kv.begin(layer, totals, longest, first_sequence=first_sequence)
    )
    counts = -(-lengths.long() // kv.page_size)  # [B, Hkv]
    table = torch.full(view.block_table.shape, -1, dtype=torch.int32)
    is_used = torch.arange(table.shape[2]) < counts[..., None]
    fresh = torch.empty(counts.shape, dtype=torch.int32)
    for b, start in enumerate(starts[:-1].tolist()):
        end = start + int(counts[b].sum())
        table[b][is_used[b]] = page_ids[start:end]
        fresh[b] = page_ids[end : end + counts.shape[1]]
    view.block_table.copy_(table)
    view.fresh_pages[..., 0].copy_(fresh)
    view.lengths.copy_(lengths)
    view.seen.copy_(seen)
    return table
