"""Tiers: several formats in one row. The entries that matter most have the most bits.

    tiers = Tiers.given("auto:1/4 + int4:3/4")
    tiers = Tiers.given("auto:1/4 + rank=1/4:3/4")  some of their dimensions (adakv.basis)
    tiers = Tiers.given("channels=.6")              of all but the window, as ThinK
    tiers = Tiers.given("auto | rank=1/4 : 1/8")    whole, a quarter or nothing, in an eighth
    tiers = Tiers.given("mixed3")                   keys in an order of their channels, as MixKVQ
    kv = TieredCache(tiers, parts)      a cache for each tier, with pages of its format
    tiers.split(kept, scores, window)   what is kept, shared out among them

Attention over disjoint sets of entries is joined exactly by log-sum-exps, so a step attends to one
tier after the other (:class:`adakv.step.PlannedStep`). New tokens go to the first one. One tier is
a :class:`TieredCache`, too, if its rows have an order of channels each.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adakv import ops
from adakv.basis import ORDERS, Basis, directions, levels, width_of
from adakv.cache import KVCache
from adakv.errors import short
from adakv.formats import bits_of_keys, check_kv_dtype, format_of
from adakv.ops import Kept, Layer
from adakv.room import enlarge

_LAST_QUERIES = 32  # of a prompt, which say what channels are worth
_LARGE = 1e30  # the weight of what must stay


class Width(NamedTuple):
    """How many dimensions a tier has of each entry, and which.

    ``"channels"``: those channels of the keys that weigh most in their row, and whole values
    (ThinK, arXiv 2407.21018). ``"rank"``: coordinates of keys and values along the directions in
    which those of their row are largest. ``"order"``: all of them, channels of the keys in the
    order of what their codes would change (MixKVQ), for formats whose keys are mixed.
    """

    kind: str
    share: Fraction  #: of all dimensions, see :func:`adakv.basis.width_of`

    def __str__(self) -> str:
        return f"{self.kind}={self.share}"

    def dims(self, dims: tuple[int, int]) -> tuple[int, int]:
        """Numbers of a key and of a value, of so many."""
        if self.kind == "order":
            return dims
        key, value = (width_of(dim, self.share) for dim in dims)
        return key, value if self.kind == "rank" else dims[1]


class Tiers(NamedTuple):
    """Formats of pages, and what each one gets of a row.

    Of what a row keeps, the first tier has the window, and its share of the rest, which scores
    highest; the next one has its share of the rest, and so on. Entries of a tier with a width have
    some of their dimensions; new tokens and the window are whole.

    Mixed tiers have no shares: each entry goes to the one, or to none, that its weight is worth
    (:meth:`mixed`).
    """

    formats: tuple[str, ...]
    shares: tuple[Fraction, ...]  #: they sum to 1; of mixed tiers the most that each can have
    widths: tuple[Width | None, ...] = (None,)  #: of each; None where entries are whole
    mean: Fraction | None = None  #: of mixed tiers: their bytes, in those of whole entries

    @classmethod
    def given(cls, kv_dtype: str) -> Tiers:
        """``"int4"``, one tier, or several as ``"auto:1/4 + int4:3/4"``; a share is a fraction or a
        decimal number. A format may be followed by ``/rank=1/4`` or ``/channels=.6``, which stand
        alone where it is ``auto``; one tier of these has all but the window. ``"auto | rank=1/2 |
        rank=1/4 : 1/3"`` are mixed, in a third of the bytes. Raises ``ValueError`` for anything
        else."""
        if isinstance(kv_dtype, str) and "|" in kv_dtype:
            return cls._mixed(kv_dtype)
        if not isinstance(kv_dtype, str) or not set(":=") & set(kv_dtype):
            return cls((check_kv_dtype(kv_dtype),), (Fraction(1),), (_width_of(kv_dtype),))
        parts = [part.partition(":") for part in kv_dtype.split("+")]
        names = [name.strip() for name, _, _ in parts]
        widths = tuple(_width_of(name) for name in names)
        formats = tuple(check_kv_dtype(format_of(name)) for name in names)
        if len(parts) == 1 and widths[0] is not None and not parts[0][1]:
            return cls(formats * 2, (Fraction(0), Fraction(1)), (None, *widths))
        shares = [_number(share, kv_dtype) for _, _, share in parts]
        found = [share for share in shares if share is not None]
        if len(found) < len(parts) or min(found) <= 0 or sum(found) != 1:
            raise ValueError(
                "kv_dtype: tiers must have shares above 0 that sum to 1, as "
                f"'auto:1/4 + int4:3/4', got {short(kv_dtype)}"
            )
        if widths[0] is not None and widths[0].kind != "order":
            raise ValueError(
                f"kv_dtype: the first tier must have whole entries, got {short(kv_dtype)}"
            )
        if len({width.kind for width in widths if width is not None}) > 1:
            raise ValueError(
                "kv_dtype: tiers must have ranks or channels, not both, nor mixed keys beside "
                f"them, got {short(kv_dtype)}"
            )
        return cls(formats, tuple(found), widths)

    @classmethod
    def _mixed(cls, kv_dtype: str) -> Tiers:
        names, _, given = kv_dtype.partition(":")
        mean = _number(given, kv_dtype)
        first, *others = [name.strip() for name in names.split("|")]
        widths = [_width_of(name) for name in others]
        formats = tuple(check_kv_dtype(format_of(name)) for name in (first, *others))
        ranks = [width.share for width in widths if width is not None and width.kind == "rank"]
        is_right = "=" not in first and len(ranks) == len(others) and len(set(formats)) == 1
        if mean is None or not 0 < mean < 1 or not is_right:
            raise ValueError(
                "kv_dtype: mixed tiers must be a format, ranks in the same format, and a share of "
                f"the bytes above 0 and below 1, as 'auto | rank=1/4 : 1/3', got {short(kv_dtype)}"
            )
        most = tuple(min(mean / share, Fraction(1)) for share in (Fraction(1), *ranks))
        return cls(formats, most, (None, *widths), mean)

    @property
    def for_bytes(self) -> Tiers:
        """Tiers of fixed shares that take the bytes which mixed ones take at most; or the same."""
        if self.mean is None:
            return self
        return self._replace(shares=(self.mean, *[Fraction(0)] * (len(self.shares) - 1)))

    @property
    def names(self) -> list[str]:
        """The format and the width of each, as :meth:`given` reads them."""
        return [
            _name_of(name, width) for name, width in zip(self.formats, self.widths, strict=True)
        ]

    def __str__(self) -> str:
        """As :meth:`given` reads it."""
        if self.mean is not None:
            return f"{' | '.join(self.names)} : {self.mean}"
        if not self.shares[0]:
            return self.names[1]
        if len(self.formats) == 1:
            return self.formats[0]
        return " + ".join(f"{a}:{b}" for a, b in zip(self.names, self.shares, strict=True))

    def dims(self, dims: tuple[int, int]) -> list[tuple[int, int]]:
        """Numbers of a key and of a value in each tier, of so many of an entry."""
        return [dims if width is None else width.dims(dims) for width in self.widths]

    @property
    def kind(self) -> str | None:
        """What its widths are of, if there are any."""
        return next((width.kind for width in self.widths if width is not None), None)

    @property
    def is_one(self) -> bool:
        """Whether it is one format, as one :class:`adakv.cache.KVCache` has it."""
        return len(self.formats) == 1 and self.kind is None

    def sizes_of(self, queries: Tensor, num_kv_heads: int) -> Tensor:
        """How large the newest queries ``[B, Hq, W, D]`` are in each channel, ``[B, Hkv, D]``
        float32, as :meth:`basis_of` takes it."""
        assert self.kind is not None
        return ORDERS[self.kind][0](queries, num_kv_heads)

    def widest(self, dims: tuple[int, int]) -> tuple[int, int]:
        """The largest of these that are those of a width."""
        widths = [width.dims(dims) for width in self.widths if width is not None]
        return max(key for key, _ in widths), max(value for _, value in widths)

    def newest(self, queries: Tensor, before: Tensor | None = None) -> Tensor:
        """A copy of the last queries of ``[B, Hq, S, D]``, behind those ``before``, by which
        channels are chosen: as many as ThinK takes."""
        joined = queries if before is None else torch.cat([before, queries], 2)
        return joined[:, :, -_LAST_QUERIES:].clone()

    def basis_of(self, keys: Tensor, values: Tensor, held: Tensor, sizes: Tensor | None) -> Basis:
        """That of the widest tier, for rows of a layer.

        Parameters
        ----------
        keys, values : ``[B, Hkv, T, D]`` and ``[B, Hkv, T, Dv]``
        held : ``[B, Hkv, T]`` bool
            Which of them count.
        sizes : ``[B, Hkv, D]`` float32, optional
            :meth:`sizes_of` the newest queries; not needed for ranks.
        """
        key, value = self.widest((keys.shape[3], values.shape[3]))
        if self.kind in ORDERS:
            assert sizes is not None
            return Basis(ORDERS[self.kind][1](sizes, keys, held)[..., :key])
        return Basis(directions(keys, held)[..., :key], directions(values, held)[..., :value])

    def basis_bytes(self, dims: tuple[int, int], itemsize: int) -> int:
        """What a row takes for its :class:`adakv.basis.Basis`, of numbers of so many bytes."""
        if self.kind is None:
            return 0
        key, value = self.widest(dims)
        return 8 * key if self.kind != "rank" else (key * dims[0] + value * dims[1]) * itemsize

    def check(
        self,
        dtype: torch.dtype | None = None,
        dims: tuple[int, int] | None = None,
        *,
        has_biases: bool = False,
    ) -> None:
        """:func:`adakv.formats.check_kv_dtype` of each tier."""
        of_tiers = [None] * len(self.formats) if dims is None else self.dims(dims)
        for name, of_tier in zip(self.formats, of_tiers, strict=True):
            check_kv_dtype(name, dtype, has_biases=has_biases, dims=of_tier)

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

    def mixed(
        self, kept: Kept, scores: Tensor, window: int, energies: Tensor, costs: Sequence[int]
    ) -> list[Kept]:
        """What each of mixed tiers has of entries that are kept, some of which go to none.

        An entry in a tier saves its score times what it has of its energy there. The rows of a
        sequence have :attr:`mean` of the bytes of whole entries, the window aside, and save as much
        as these can (:func:`adakv.basis.levels`). Waits for the device.

        Parameters
        ----------
        kept, scores, window
            As in :meth:`split`; scores below 0 are counted from the lowest of their row.
        energies : ``[tiers, B, Hkv, T]`` float32
            What an entry has of its energy in each tier.
        costs : ints
            What so many entries take in each, the same number of them.
        """
        held = kept.mask(scores.shape)
        held[:, :, scores.shape[2] - window :] = False
        weights = scores.float().nan_to_num(0, _LARGE, -_LARGE).clamp(-_LARGE, _LARGE)
        lowest = weights.masked_fill(~held, 0).amin(2, keepdim=True)
        gains = (weights - lowest.clamp(max=0)) * energies
        gains = gains.masked_fill(~held, -1).flatten(2)  # [tiers, B, Hkv * T]
        order = sorted(range(len(costs)), key=lambda i: costs[i])
        assert self.mean is not None
        p, q = self.mean.as_integer_ratio()
        budget = held.flatten(1).sum(1) * costs[0] * p // q
        found = levels(gains[order], [costs[i] for i in order], budget).view(scores.shape)
        masks = [found == 1 + order.index(i) for i in range(len(costs))]
        masks[0] |= kept.mask(scores.shape) & ~held
        return [_kept(mask) for mask in masks]


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


def _kept(mask: Tensor) -> Kept:
    """What a mask ``[B, Hkv, T]`` shows; waits for the device."""
    rows = mask.flatten(0, 1)
    ends = F.pad(rows.sum(1).cumsum(0), (1, 0))
    return Kept(rows.nonzero()[:, 1].int(), ends.int())


def _width_of(name: str) -> Width | None:
    """That of a tier such as ``"int8/rank=1/4"``."""
    before, is_there, share = name.partition("=")
    is_mixed = bits_of_keys(format_of(name)) is not None
    if not is_there:
        return Width("order", Fraction(1)) if is_mixed else None
    if is_mixed:
        raise ValueError(f"kv_dtype: mixed keys have all of their channels, got {short(name)}")
    kind = before.rpartition("/")[2].strip()
    found = _number(share, name)
    if kind not in ("channels", "rank") or found is None or not 0 < found <= 1:
        raise ValueError(
            "kv_dtype: a tier's width must be rank= or channels= and a share above 0 and up to 1, "
            f"as 'rank=1/4', got {short(name)}"
        )
    return Width(kind, found)


def _name_of(name: str, width: Width | None) -> str:
    """A tier as :meth:`Tiers.given` reads it."""
    if width is None or width.kind == "order":
        return name
    return str(width) if name == "auto" else f"{name}/{width}"


def _number(share: str, kv_dtype: str) -> Fraction | None:
    """A fraction or a decimal number; None if it is neither. ``ValueError`` for many digits."""
    try:
        found = Fraction(share.strip())
    except (ValueError, ZeroDivisionError):
        return None
    if found.denominator > 10**6:
        raise ValueError(f"kv_dtype: shares must have at most 6 digits, got {short(kv_dtype)}")
    return found


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
