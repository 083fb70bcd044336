"""Memory of an engine's layers as pages: what one holds, and reading and moving its entries.

A page holds keys and values, or their codes with the scales behind them (docs/bits.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adakv.entries import dequantised, tailed_keys, tailed_values
from adakv.formats import SCALE_GROUP
from adakv.ops import Layer

#: Pages that are dequantised at a time, so that little of it is in float32.
_AT_ONCE = 4096


class Pages(NamedTuple):
    """Pages of a layer, as :class:`adakv.ops.Layer` has them, without positions."""

    entries: Tensor  # [N, 2, P, D], or their codes
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @classmethod
    def within(cls, memory: Tensor, kv_dtype: str, *, head_dim: int, dtype: torch.dtype) -> Pages:
        """Pages of codes in ``memory`` ``[N, P, entry_bytes(...)]`` uint8: codes of keys, codes of
        values, scales of keys, scales of values. (Of int4 P is 32.)"""
        num_pages, page_size, _ = memory.shape
        bytes_ = memory.view(num_pages, -1)  # fails rather than copies
        width = head_dim // 2 if kv_dtype == "int4" else head_dim
        codes, rest = bytes_.tensor_split([2 * page_size * width], 1)
        if kv_dtype == "fp8":
            codes = codes.view(torch.float8_e4m3fn)
        of_entry = page_size, num_scales(kv_dtype, head_dim)
        of_keys = (2, head_dim) if kv_dtype == "int4" else of_entry
        scales = rest.view(dtype).tensor_split([math.prod(of_keys)], 1)
        keys, values = (x.unflatten(1, y) for x, y in zip(scales, (of_keys, of_entry), strict=True))
        return cls(codes.unflatten(1, (2, page_size, width)), keys, values)

    @property
    def dtype(self) -> torch.dtype:
        """That of keys and values."""
        return self.entries.dtype if self.key_scales is None else self.key_scales.dtype

    @property
    def page_size(self) -> int:
        """Entries of a page."""
        return self.entries.shape[2]

    @property
    def is_int4(self) -> bool:
        """Whether keys of a page share scales: then entries don't move, they are quantised anew,
        and the newest ones of a row lie elsewhere (see tails.py)."""
        return self.key_scales is not None and self.key_scales.shape[1] != self.page_size

    @property
    def head_dim(self) -> int:
        """Elements of a key."""
        return self.entries.shape[3] * (2 if self.is_int4 else 1)

    @property
    def parts(self) -> list[Tensor]:
        """What an entry consists of, ``[N, P, ...]`` each."""
        entries = self.entries
        if entries.dtype == torch.float8_e4m3fn:
            entries = entries.view(torch.uint8)  # torch moves bytes on every device
        scales = [x for x in (self.key_scales, self.value_scales) if x is not None]
        return [entries[:, 0], entries[:, 1], *scales]

    def layer(self, positions: Tensor, *tables: Tensor, tails: Tensor | None = None) -> Layer:
        """What ``attend`` takes of some rows, with their ``tables``: lengths, block table, fresh
        pages and tokens seen; and of int4 with their ``tails``."""
        lengths, block_table, fresh, seen = tables
        held = self.entries, positions, block_table, lengths, seen, fresh
        return Layer(*held, self.key_scales, self.value_scales, tails)

    def spread(self, count: int) -> Pages:
        """The first ``count`` pages from this layer's first one on, as far apart as its own."""
        entries, *scales = (
            None if x is None else x.as_strided((count, *x.shape[1:]), x.stride()) for x in self
        )
        assert entries is not None
        return Pages(entries, *scales)

    def move(self, source: Tensor, source_slot: Tensor, to: Tensor, to_slot: Tensor) -> None:
        """Copies entries in slots of ``source`` pages ``[n]`` to those of others, after all have
        been read."""
        if self.key_scales is not None or not self.entries.is_contiguous():
            for part in self.parts:
                part[to, to_slot] = part[source, source_slot]
            return
        vectors, size = self.entries.view(-1, self.entries.shape[-1]), self.page_size
        keys_from, keys_to = source * (2 * size) + source_slot, to * (2 * size) + to_slot
        entries = vectors.index_select(0, torch.cat([keys_from, keys_from + size]))
        vectors.index_copy_(0, torch.cat([keys_to, keys_to + size]), entries)

    def read(self, page_ids: Tensor) -> Tensor:
        """Keys and values ``[n, 2, P, D]`` of pages ``[n]``, copied; of int4 those that are
        full."""
        if self.key_scales is None or self.value_scales is None:
            return self.entries[page_ids]
        shape = len(page_ids), 2, self.page_size, self.head_dim
        found = torch.empty(shape, dtype=self.dtype, device=page_ids.device)
        read = (tailed_keys, tailed_values) if self.is_int4 else (dequantised, dequantised)
        for into, ids in zip(found.split(_AT_ONCE), page_ids.split(_AT_ONCE), strict=True):
            for half, scales in enumerate((self.key_scales, self.value_scales)):
                into[:, half] = read[half](self.entries[ids, half], scales[ids], self.dtype)
        return found


def num_scales(kv_dtype: str, head_dim: int) -> int:
    """Scales, and zeros, of a key or a value; of int4 of a value."""
    return -(-head_dim // SCALE_GROUP) * {"int8": 2, "fp8": 1, "int4": 2}[kv_dtype]


def entry_bytes(kv_dtype: str, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of a key and a value in pages of codes, those of int4 with a 32nd of their page's
    scales of keys."""
    if kv_dtype == "int4":
        of_keys = 2 * head_dim * dtype.itemsize // 32
        return head_dim + of_keys + num_scales(kv_dtype, head_dim) * dtype.itemsize
    return 2 * (head_dim + num_scales(kv_dtype, head_dim) * dtype.itemsize)


def entries_of(
    pages: Pages, page_ids: Tensor, length: int, tail: Tensor | None = None, held: int = 0
) -> tuple[Tensor, Tensor]:
    """Keys and values ``[1, Hkv, length, D]`` in pages ``[Hkv, blocks]``, copied. Of int4 the rows
    hold ``held`` entries, the last ones in their ``tail`` ``[1, Hkv, 2 P, D]``."""
    if pages.key_scales is None:
        found = [pages.entries[:, i][page_ids] for i in (0, 1)]
    else:
        found = list(pages.read(page_ids.flatten()).unflatten(0, page_ids.shape).unbind(2))
    keys, values = (x.flatten(1, 2)[None, :, :length] for x in found)
    if tail is not None:
        size = pages.page_size
        first = held // size * size
        count = min(held, length) - first
        for x, half in zip((keys, values), tail.split(size, 2), strict=True):
            x[:, :, first:length] = half[:, :, : max(count, 0)]
    return keys, values


def in_one_memory(layers: Sequence[Pages]) -> tuple[Pages, Tensor] | None:
    """The pages of all layers as one, and the number ``[L]`` of each layer's first page there; None
    if they are not in one memory, whole pages apart."""
    lowest = min(layers, key=lambda pages: pages.entries.data_ptr())
    first, memory = lowest.entries, lowest.entries.untyped_storage().data_ptr()
    size = first.stride(0) * first.itemsize
    apart = [pages.entries.data_ptr() - first.data_ptr() for pages in layers]
    if any(
        pages.entries.untyped_storage().data_ptr() != memory
        or pages.entries.stride() != first.stride()
        or (pages.key_scales is None and not pages.entries.is_contiguous())
        or distance % size
        for pages, distance in zip(layers, apart, strict=True)
    ):
        return None
    firsts = [distance // size for distance in apart]
    return lowest.spread(max(firsts) + len(first)), torch.tensor(firsts, device=first.device)
