"""Tiers: several formats in one row, as a text says them. What matters most has the most bits.

    tiers = Tiers.given("auto:1/4 + int4:3/4")
    tiers = Tiers.given("auto:1/4 + rank=1/4:3/4")  some of their dimensions (adakv.basis)
    tiers = Tiers.given("channels=.6")              of all but the window, as ThinK
    tiers = Tiers.given("auto | rank=1/4 : 1/8")    whole, a quarter or nothing, in an eighth
    tiers = Tiers.given("mixed3")                   keys in an order of their channels, as MixKVQ
    tiers.split(kept, scores, window)               what is kept, shared out among them

:class:`adakv.tiered_cache.TieredCache` holds rows in tiers.
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
from adakv.errors import short
from adakv.formats import bits_of_keys, check_kv_dtype, format_of
from adakv.ops import Kept

_LAST_QUERIES = 32  # of a prompt, which say what channels are worth
_MOST_TIERS = 8
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
        _check_count(kv_dtype.split("+"), kv_dtype)
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
        _check_count([first, *others], kv_dtype)
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


def _kept(mask: Tensor) -> Kept:
    """What a mask ``[B, Hkv, T]`` shows; waits for the device."""
    rows = mask.flatten(0, 1)
    ends = F.pad(rows.sum(1).cumsum(0), (1, 0))
    return Kept(rows.nonzero()[:, 1].int(), ends.int())


def _check_count(names: Sequence[str], kv_dtype: str) -> None:
    """What :func:`adakv.ops.attend` takes."""
    if len(names) > _MOST_TIERS:
        raise ValueError(f"kv_dtype: tiers must be at most {_MOST_TIERS}, got {short(kv_dtype)}")


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
