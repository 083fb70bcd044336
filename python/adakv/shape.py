"""What the layers of a model put into a cache, and how many bytes that takes in pages."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from adakv.cache import KVCache
from adakv.devices import AnyCache, Group, SplitCache
from adakv.formats import check_kv_dtype, page_size_for
from adakv.tiered_cache import TieredCache
from adakv.tiers import Tiers

#: Formats of pages from the most bits to the fewest, in which a budget in bytes tries them.
FROM_MANY_BITS = ("auto", "int8", "int4")


@dataclass(frozen=True)
class Shape:
    """What a model's layers put into a cache.

    ``groups`` are those of layers on several devices, of which ``device`` is the first.
    ``value_dim`` is the width of values, if it is another one than that of keys, ``head_dim``.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    kv_dtype: str = "auto"
    groups: tuple[Group, ...] = ()
    has_biases: bool = False
    value_dim: int | None = None

    def cache(
        self, num_sequences: int, num_pages: int, max_row_pages: int, page_size: int
    ) -> AnyCache:
        """An empty cache for it; each group of layers has its share of the pages."""
        if self.groups:
            parts = []
            for group in self.groups:
                count = len(group.layers)
                shape = replace(self, num_layers=count, device=group.device, groups=())
                pages = -(-num_pages * count // self.num_layers)
                parts.append(shape._cache(num_sequences, pages, max_row_pages, page_size))
            return SplitCache(self.groups, parts)
        return self._cache(num_sequences, num_pages, max_row_pages, page_size)

    def tiered_cache(
        self, num_sequences: int, num_pages: Sequence[int], max_row_pages: int, page_size: int
    ) -> AnyCache:
        """The same with so many pages of each tier (:class:`adakv.tiers.Tiers`), on one device."""
        tiers = Tiers.given(self.kv_dtype)
        if tiers.is_one:
            return self.cache(num_sequences, num_pages[0], max_row_pages, page_size)
        caches = [
            shape._cache(num_sequences, pages, max_row_pages, page_size)
            for shape, pages in zip(self.of_tiers, num_pages, strict=True)
        ]
        return TieredCache(tiers, caches)

    @property
    def of_tiers(self) -> list[Shape]:
        """That of each tier's pages."""
        tiers = Tiers.given(self.kv_dtype)
        return [
            replace(self, kv_dtype=name, head_dim=key, value_dim=value)
            for name, (key, value) in zip(tiers.formats, tiers.dims(self.dims), strict=True)
        ]

    @property
    def basis_bytes(self) -> int:
        """What a sequence takes beside the pages of its tiers, if they have widths."""
        rows, size = self.num_layers * self.num_kv_heads, self.dtype.itemsize
        return rows * Tiers.given(self.kv_dtype).basis_bytes(self.dims, size)

    def _cache(
        self, num_sequences: int, num_pages: int, max_row_pages: int, page_size: int
    ) -> KVCache:
        return KVCache(
            num_layers=self.num_layers,
            num_sequences=num_sequences,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            num_pages=num_pages,
            max_row_pages=max_row_pages,
            page_size=page_size,
            dtype=self.dtype,
            device=self.device,
            kv_dtype=self.kv_dtype,
            has_biases=self.has_biases,
            value_dim=self.value_dim,
        )

    @property
    def page_name(self) -> str:
        """What pages hold, in words."""
        return str(self.dtype).removeprefix("torch.") if self.kv_dtype == "auto" else self.kv_dtype

    def full_bytes(self, num_tokens: int) -> int:
        """Keys and values of so many tokens, all of them, as the model has them."""
        return num_tokens * self.num_layers * self.num_kv_heads * self.entry_bytes

    @property
    def entry_bytes(self) -> int:
        """A key and a value as the model has them."""
        return sum(self.dims) * self.dtype.itemsize

    @property
    def dims(self) -> tuple[int, int]:
        """Numbers of a key and of a value."""
        return self.head_dim, self.value_dim or self.head_dim

    def formats(self, kv_dtype: str | None, page_size: int | None) -> list[tuple[str, int]]:
        """Formats of pages that may be chosen from, with their page sizes: the one that was given,
        or those of :data:`FROM_MANY_BITS` that keys and values of this dtype can have in pages of
        this size."""
        if kv_dtype is not None:
            Tiers.given(kv_dtype).check(self.dtype, self.dims, has_biases=self.has_biases)
            return [(kv_dtype, page_size_for(kv_dtype, page_size))]
        found = []
        for name in FROM_MANY_BITS:
            try:
                check_kv_dtype(name, self.dtype, has_biases=self.has_biases, dims=self.dims)
                found.append((name, page_size_for(name, page_size)))
            except ValueError:
                continue
        return found


class UnitBytes(NamedTuple):
    """Bytes of what caches consist of."""

    page: int
    tails: int  # of a sequence, beside its pages
    tables: int  # of a sequence, with one column in the block table


@functools.lru_cache(maxsize=256)
def unit_bytes(shape: Shape, page_size: int) -> UnitBytes:
    """Those of caches of a shape, from a small one."""
    small = replace(shape, device=torch.device("cpu"), groups=())._cache(1, 1, 1, page_size)
    return UnitBytes(small.page_bytes, small.tail_bytes, small.table_bytes)


@dataclass(frozen=True)
class Footprint:
    """What one sequence takes of a cache.

    Parameters
    ----------
    shape : :class:`Shape`
        With the format of the pages.
    page_size : int
    row_pages : int
        Columns of the block table.
    text : ints ``[L]``, optional
        Entries of a text behind the prompt that each layer keeps, all its kv heads together, if the
        text is evicted from while it is written.
    every, first : int
        Tokens from one choice of the text to the next, and up to the first one.
    window, model_wide : int and bool
        What tiers have to know of the policy: :meth:`adakv.tiers.Tiers.totals`.
    """

    shape: Shape
    page_size: int
    row_pages: int
    text: tuple[int, ...] = ()
    every: int = 0
    first: int = 0
    window: int = 0
    model_wide: bool = False

    @property
    def plain(self) -> Footprint:
        """That in pages which hold keys and values as the model has them."""
        size = page_size_for("auto", None)
        columns = -(-self.row_pages * self.page_size // size)
        shape = replace(self.shape, kv_dtype="auto", has_biases=False)
        return replace(self, shape=shape, page_size=size, row_pages=columns)

    def bytes_of(self, totals: Sequence[int]) -> int:
        """Pages, tails and tables of a sequence whose layers keep ``totals`` ``[L]`` entries of its
        prompt, all their kv heads together; with a text at its most."""
        tiers, heads = Tiers.given(self.shape.kv_dtype), self.shape.num_kv_heads
        of_tiers = tiers.for_bytes.totals(
            [[n] for n in totals], heads, self.window, model_wide=self.model_wide
        )
        return self.shape.basis_bytes + sum(
            replace(self, shape=shape)._bytes_of_one([n for (n,) in of_tier])
            for shape, of_tier in zip(self.shape.of_tiers, of_tiers, strict=True)
        )

    def _bytes_of_one(self, totals: Sequence[int]) -> int:
        """The same of one tier."""
        unit = unit_bytes(self.shape, self.page_size)
        heads = self.shape.num_kv_heads
        pages = self._pages(totals, 0)
        if self.text:
            later = [a + b for a, b in zip(totals, self.text, strict=True)]
            pages = max(self._pages(totals, self.first), self._pages(later, self.every))
        more_columns = self.shape.num_layers * heads * (self.row_pages - 1) * 4
        return pages * unit.page + unit.tails + unit.tables + more_columns

    def _pages(self, totals: Sequence[int], new: int) -> int:
        heads, size = self.shape.num_kv_heads, self.page_size
        return sum(
            KVCache.pages_for(total, new, num_kv_heads=heads, page_size=size) for total in totals
        )
