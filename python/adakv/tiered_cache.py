"""Rows in tiers: a cache for each one, with pages of its format.

    kv = TieredCache(tiers, caches)     new tokens go to the first one

A step attends to all tiers in one call (:class:`adakv.step.PlannedStep`). One tier alone is a
:class:`TieredCache`, too, if its rows have an order of channels each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adakv.basis import Basis
from adakv.cache import KVCache
from adakv.ops import Layer
from adakv.room import enlarge
from adakv.tiers import Tiers


class TieredCache:
    """Rows whose entries lie in several :class:`adakv.cache.KVCache`, one for each tier.

    What it has in common with one cache has the same names there.

    Parameters
    ----------
    tiers : :class:`Tiers`
    caches : :class:`adakv.cache.KVCache`, one for each tier
        Equal but for their formats, widths and numbers of pages.
    basis : :class:`adakv.basis.Basis`, optional
        Of the widest tier with a width, in all layers and sequences; narrower ones have its first
        columns. Default: none is known yet.
    """

    def __init__(self, tiers: Tiers, caches: Sequence[KVCache], basis: Basis | None = None) -> None:
        self.tiers, self.caches = tiers, tuple(caches)
        first = self.caches[0]
        if basis is None and tiers.kind is not None:
            basis = _no_basis(tiers, first)
        self.basis = basis
        """``[L, B, ...]``, written to when a layer's entries come into pages."""
        self.kv_dtype = str(tiers)
        self.num_layers, self.num_sequences = first.num_layers, first.num_sequences
        self.num_kv_heads = first.num_kv_heads
        self.head_dim, self.value_dim = first.head_dim, first.value_dim
        self.dtype, self.device, self.page_size = first.dtype, first.device, first.page_size

    @property
    def first(self) -> KVCache:
        """The cache that new tokens go to."""
        return self.caches[0]

    @property
    def bases(self) -> list[Basis | None]:
        """What the rows of each tier hold of entries; None where these are whole."""
        basis = self.basis
        return [
            basis.narrowed(cache.head_dim, cache.value_dim) if basis and width else None
            for width, cache in zip(self.tiers.widths, self.caches, strict=True)
        ]

    @property
    def parts(self) -> tuple[KVCache, ...]:
        """The caches that new tokens go to."""
        return (self.first,)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The tensors of each layer of the first tier."""
        return self.first.layers

    def begin_layers(
        self,
        layers: Sequence[int],
        totals: Sequence[Sequence[Sequence[int]]],
        longest: Sequence[int],
        *,
        first_sequence: int = 0,
    ) -> list[tuple[Tensor, Tensor]]:
        """As :meth:`KVCache.begin_layers`, of each tier, with ``totals`` ``[tiers][L][B]``. Mixed
        ones grow if they are too small: how much goes to each is known when it comes."""
        for cache, of_tier in zip(self.caches, totals, strict=True):
            sizes = {"num_kv_heads": self.num_kv_heads, "page_size": self.page_size}
            needed = sum(cache.pages_for(n, 0, **sizes) for layer in of_tier for n in layer)
            if self.tiers.mean is not None and needed > cache.num_free:
                enlarge(cache, needed - cache.num_free)
        return [
            cache.begin_layers(layers, of_tier, longest, first_sequence=first_sequence)
            for cache, of_tier in zip(self.caches, totals, strict=True)
        ]

    def grow(self, num_new: Sequence[int], columns: int) -> int:
        """As :meth:`KVCache.grow`."""
        return self.first.grow(num_new, columns)

    def reserve(self, *, num_pages: int = 0, max_row_pages: int = 0) -> None:
        """As :meth:`KVCache.reserve`, of the first tier."""
        self.first.reserve(num_pages=num_pages, max_row_pages=max_row_pages)

    def fork(
        self, sources: Sequence[int], *, back: Sequence[int] = (), whole: bool = False
    ) -> TieredCache:
        """As :meth:`KVCache.fork`; the tokens that stay behind are those of the first tier."""
        first, *others = self.caches
        forks = [first.fork(sources, back=back, whole=whole)]
        forks += [cache.fork(sources, whole=whole) for cache in others]
        basis = self.basis and self.basis.each(lambda x: x[:, list(sources)])
        return TieredCache(self.tiers, forks, basis)

    def shares_pages(self, sequence: int) -> bool:
        """As :meth:`KVCache.shares_pages`."""
        return any(cache.shares_pages(sequence) for cache in self.caches)

    def lengths(self, slots: slice = slice(None)) -> Tensor:
        """As :meth:`KVCache.lengths`, of all tiers together."""
        return torch.stack([cache.lengths(slots) for cache in self.caches]).sum(0).int()

    def positions(self, layer: int, slots: slice = slice(None)) -> list[list[Tensor]]:
        """As :meth:`KVCache.positions`, of all tiers together, ascending."""
        tiers = [cache.positions(layer, slots) for cache in self.caches]
        return [
            [torch.cat(rows).sort().values for rows in zip(*heads, strict=True)]
            for heads in zip(*tiers, strict=True)
        ]

    def remove(self, sequence: int) -> None:
        """Gives all pages of a sequence back and empties its rows."""
        for cache in self.caches:
            cache.remove(sequence)

    @property
    def num_pages(self) -> int:
        """Pages of the pool that new tokens take theirs from."""
        return self.first.num_pages

    @property
    def bytes_used(self) -> int:
        """Bytes of what sequences own: their pages, and the bases of those that hold anything."""
        size = sum(cache.bytes_used for cache in self.caches)
        if self.basis is None:
            return size
        held = int((self.caches[0].lengths()[0].sum(1) > 0).sum())
        return size + self.basis.num_bytes // self.num_sequences * held

    @property
    def pages_used(self) -> int:
        """Pages that are owned by sequences."""
        return sum(cache.pages_used for cache in self.caches)


@torch.inference_mode(mode=False)  # prompts of later forwards are written there
def _no_basis(tiers: Tiers, first: KVCache) -> Basis:
    """Memory for that of the widest tier, of rows whose entries have the dimensions of a first
    tier."""
    dims = first.head_dim, first.value_dim
    key, value = tiers.widest(dims)
    rows = first.num_layers, first.num_sequences, first.num_kv_heads
    if tiers.kind != "rank":
        return Basis(torch.zeros(*rows, key, dtype=torch.int64, device=first.device))
    keys, values = (
        torch.zeros(*rows, dim, width, dtype=first.dtype, device=first.device)
        for dim, width in zip(dims, (key, value), strict=True)
    )
    return Basis(keys, values)
