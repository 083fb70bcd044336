"""Tiers: several formats in one row. The entries that matter most have the most bits.

    tiers = Tiers.given("auto:1/4 + int4:3/4")
    kv = TieredCache(tiers, parts)      a cache for each tier, with pages of its format
    tiers.split(kept, scores, window)   what is kept, shared out among them

Attention over disjoint sets of entries is joined exactly by log-sum-exps, so a step attends to one
tier after the other (:class:`adakv.step.PlannedStep`). New tokens go to the first one.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from adakv import ops
from adakv.cache import KVCache
from adakv.errors import short
from adakv.formats import check_kv_dtype
from adakv.ops import Kept, Layer


class Tiers(NamedTuple):
    """Formats of pages, and what each one gets of a row.

    Of what a row keeps, the first tier has the window, and its share of the rest, which scores
    highest; the next one has its share of the rest, and so on.
    """

    formats: tuple[str, ...]
    shares: tuple[Fraction, ...]  #: they sum to 1

    @classmethod
    def given(cls, kv_dtype: str) -> Tiers:
        """``"int4"``, one tier, or several as ``"auto:1/4 + int4:3/4"``; a share is a fraction or a
        decimal number. Raises ``ValueError`` for anything else."""
        if not isinstance(kv_dtype, str) or ":" not in kv_dtype:
            return cls((check_kv_dtype(kv_dtype),), (Fraction(1),))
        parts = [part.partition(":") for part in kv_dtype.split("+")]
        try:
            shares = tuple(Fraction(share.strip()) for _, _, share in parts)
        except (ValueError, ZeroDivisionError):
            shares = ()
        if not shares or min(shares) <= 0 or sum(shares) != 1:
            raise ValueError(
                "kv_dtype: tiers must have shares above 0 that sum to 1, as "
                f"'auto:1/4 + int4:3/4', got {short(kv_dtype)}"
            )
        if max(share.denominator for share in shares) > 10**6:
            raise ValueError(f"kv_dtype: shares must have at most 6 digits, got {short(kv_dtype)}")
        return cls(tuple(check_kv_dtype(name.strip()) for name, _, _ in parts), shares)

    def __str__(self) -> str:
        """As :meth:`given` reads it."""
        if len(self.formats) == 1:
            return self.formats[0]
        return " + ".join(f"{a}:{b}" for a, b in zip(self.formats, self.shares, strict=True))

    def most(self, total: int, rows: int, window: int) -> list[int]:
        """Entries that each tier takes at most, of ``total`` that so many rows keep together, each
        of them a window of so many, or all of its prompt."""
        if rows == 0:
            return [total] * len(self.shares)
        window = min(window, total // rows)
        rest = total - rows * window
        counts = [int(share * rest) + rows for share in self.shares]
        counts[0] += rows * window
        return [min(count, total) for count in counts]

    def totals(
        self, totals: Sequence[Sequence[int]], num_kv_heads: int, window: int, *, model_wide: bool
    ) -> list[list[list[int]]]:
        """``[tiers][L][B]``: most entries that each tier has of each layer's ``totals`` ``[L][B]``,
        which a model-wide policy counts for layer 0 as a whole."""
        if len(self.shares) == 1:
            return [[list(layer) for layer in totals]]
        rows = [num_kv_heads] * len(totals)
        if model_wide:
            rows = [num_kv_heads * len(totals), *[0] * (len(totals) - 1)]
        most = [
            [self.most(n, count, window) for n in layer]
            for layer, count in zip(totals, rows, strict=True)
        ]
        return [[[n[i] for n in layer] for layer in most] for i in range(len(self.shares))]

    def split(self, kept: Kept, scores: Tensor, window: int) -> list[Kept]:
        """What each tier has of entries that are kept.

        Parameters
        ----------
        kept : :class:`adakv.ops.Kept`
        scores : ``[B, Hkv, T]`` floating point
            How much entries matter; ``+inf`` for those of the window. Equal ones: lower position
            first.
        window : int
            Entries of each row that always are in the first tier.
        """
        lowest, nothing = torch.finfo(torch.float32).min, -torch.inf
        left = scores.float().nan_to_num(lowest, torch.inf, lowest)
        left = left.masked_fill(~kept.mask(left.shape), nothing)
        counts = kept.indptr.diff().view(left.shape[:2]).long()
        rest, upto, taken = counts - window, Fraction(0), torch.zeros_like(counts)
        parts = []
        for share in self.shares:
            upto += share
            p, q = upto.as_integer_ratio()
            have = window + (rest * p + q - 1) // q  # rounded up
            total = len(kept.positions)
            positions, ends = ops.select(left, (have - taken).int(), window=0, total=total)
            parts.append(Kept(positions, ends))
            left, taken = left.masked_fill(parts[-1].mask(left.shape), nothing), have
        return parts


class TieredCache:
    """Rows whose entries lie in several :class:`adakv.cache.KVCache`, one for each tier.

    What it has in common with one cache has the same names there.

    Parameters
    ----------
    tiers : :class:`Tiers`
    caches : :class:`adakv.cache.KVCache`, one for each tier
        Equal but for their formats and numbers of pages.
    """

    def __init__(self, tiers: Tiers, caches: Sequence[KVCache]) -> None:
        self.tiers, self.caches = tiers, tuple(caches)
        first = self.caches[0]
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
    def parts(self) -> tuple[KVCache, ...]:
        """The caches that new tokens go to."""
        return (self.first,)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The tensors of each layer of the first tier."""
        return self.first.layers

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
        return TieredCache(self.tiers, forks)

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
        """Bytes of what sequences own."""
        return sum(cache.bytes_used for cache in self.caches)

    @property
    def pages_used(self) -> int:
        """Pages that are owned by sequences."""
        return sum(cache.pages_used for cache in self.caches)
