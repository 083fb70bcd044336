"""Bases: rows of which each entry is held with some of its dimensions.

    basis = Basis(channels)                            some channels of the keys, values whole
    basis = Basis(keys, values)                        coordinates along some directions
    keys, values = basis.of_entries(keys, values)      what pages hold
    queries = basis.of_queries(queries)                what attends to them
    out = basis.whole(out)                             what was attended to, in all dimensions

With orthonormal columns ``b`` a key is held as ``k b`` and stands for ``k b b^T``: its logit is
``(q b) . (k b)``. All of it is torch operations that wait for nothing, so that a step can be
recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Keys whose codes share a scale in each channel.
PAGE = 32

#: Pages hold a multiple of so many dimensions.
MULTIPLE = 8


def in_order(x: Tensor, channels: Tensor) -> Tensor:
    """Some channels of heads, or all of them in another order, which each kv head has for itself.

    Parameters
    ----------
    x : ``[B, H, n, D]`` floating point
        Of Hkv heads, or of Hq: those of a group lie side by side.
    channels : ``[B, Hkv, Dk]`` int64

    Returns
    -------
    ``[B, H, n, Dk]``, ``x[b, h, i, channels[b, h // G]]``
    """
    batch, heads, count, _ = x.shape
    rows = x.reshape(batch, channels.shape[1], -1, x.shape[3])
    index = channels[:, :, None].expand(-1, -1, rows.shape[2], -1)
    return rows.gather(3, index).view(batch, heads, count, -1)


def along(x: Tensor, directions: Tensor) -> Tensor:
    """Coordinates of heads ``[B, H, n, D]`` along directions ``[B, Hkv, D, Dk]``, which each kv
    head has for itself: ``[B, H, n, Dk]``."""
    batch, heads, count, _ = x.shape
    rows = x.reshape(batch, directions.shape[1], -1, x.shape[3])
    return (rows @ directions).view(batch, heads, count, -1)


class Basis(NamedTuple):
    """What some rows hold of each entry.

    ``keys`` is ``[..., B, Hkv, Dk]`` int64, channels, or ``[..., B, Hkv, D, Dk]`` of the dtype of
    keys, orthonormal columns. ``values`` is ``[..., B, Hkv, Dv, Dw]``, such columns too, or None
    where values are whole. Leading dimensions are those of layers, if there are several.
    """

    keys: Tensor
    values: Tensor | None = None

    def of(self, index: int | slice | tuple[int | slice, ...]) -> Basis:
        """That of a layer, or of some sequences."""
        return self.each(lambda x: x[index])

    def each(self, change: Callable[[Tensor], Tensor]) -> Basis:
        """With something done to each tensor."""
        return Basis(change(self.keys), None if self.values is None else change(self.values))

    def of_entries(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What pages hold of keys ``[B, Hkv, T, D]`` and values ``[B, Hkv, T, Dv]``."""
        held = self.of_queries(keys)
        return held, values if self.values is None else along(values, self.values)

    def of_queries(self, queries: Tensor) -> Tensor:
        """Queries ``[B, Hq, S, D]`` as they attend to such keys: ``[B, Hq, S, Dk]``."""
        if self.keys.is_floating_point():
            return along(queries, self.keys)
        return in_order(queries, self.keys)

    def whole(self, out: Tensor) -> Tensor:
        """What was attended to, ``[B, Hq, S, Dw]``, in all dimensions of the values."""
        return out if self.values is None else along(out, self.values.transpose(-1, -2))

    def fill(self, other: Basis) -> None:
        """Becomes another one of the same shape."""
        for mine, theirs in zip(self, other, strict=True):
            if mine is not None and theirs is not None:
                mine.copy_(theirs)

    def narrowed(self, key: int, value: int) -> Basis:
        """That of so many numbers of a key and of a value: the first columns."""
        return Basis(
            self.keys[..., :key], None if self.values is None else self.values[..., :value]
        )

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return sum(x.numel() * x.itemsize for x in self if x is not None)


def mean_square(queries: Tensor, num_kv_heads: int) -> Tensor:
    """``[B, Hkv, D]`` float32: of queries ``[B, Hq, W, D]``, and of the q heads of a group."""
    return _of_groups(queries.float().square(), num_kv_heads)


def channels(asked: Tensor, keys: Tensor, held: Tensor) -> Tensor:
    """The channels of a row's keys, those first that give its logits most (ThinK, arXiv
    2407.21018): the mean of ``q[d]^2`` times the mean of ``k[d]^2``.

    That product is the Frobenius norm of the logits which channel d gives, squared, over their
    number. Equal ones: lower channel first.

    Parameters
    ----------
    asked : ``[B, Hkv, D]`` float32
        :func:`mean_square` of the queries.
    keys : ``[B, Hkv, T, D]``
    held : ``[B, Hkv, T]`` bool
        Which of them count.

    Returns
    -------
    channels : ``[B, Hkv, D]`` int64
    """
    weight = held.float()[:, :, None]  # [B, Hkv, 1, T]
    squares = (weight @ keys.float().square())[:, :, 0]  # their number is the same in all channels
    return (asked * squares).argsort(dim=2, descending=True, stable=True)


def mean_size(queries: Tensor, num_kv_heads: int) -> Tensor:
    """``[B, Hkv, D]`` float32: the mean of ``|q|`` of queries ``[B, Hq, W, D]``, and of the q heads
    of a group."""
    return _of_groups(queries.float().abs(), num_kv_heads)


def _of_groups(x: Tensor, num_kv_heads: int) -> Tensor:
    """``[B, Hkv, D]``: means of ``[B, Hq, W, D]`` over the W, and over the q heads of a group."""
    return x.mean(2).view(len(x), num_kv_heads, -1, x.shape[3]).mean(2)


def by_error(asked: Tensor, keys: Tensor, held: Tensor) -> Tensor:
    """The channels of a row's keys, those first whose codes would change its logits most (MixKVQ,
    arXiv 2512.19206): the mean of ``|q[d]|`` times the step of a code, which is in proportion to
    the range of ``k[d]``.

    Codes have their steps page by page, so the range is that of 32 keys which are held side by
    side, and its mean over these pages. Equal ones: lower channel first.

    Parameters
    ----------
    asked : ``[B, Hkv, D]`` float32
        :func:`mean_size` of the queries.
    keys : ``[B, Hkv, T, D]``
    held : ``[B, Hkv, T]`` bool
        Which of them count.

    Returns
    -------
    channels : ``[B, Hkv, D]`` int64
    """
    places = (~held).int().argsort(dim=2, stable=True)  # those that are held first, in order
    places = F.pad(places, (0, -places.shape[2] % PAGE))
    is_held = torch.arange(places.shape[2], device=held.device) < held.sum(2)[..., None]
    pages = keys.gather(2, places[..., None].expand(-1, -1, -1, keys.shape[3]))
    pages = pages.float().view(*held.shape[:2], -1, PAGE, keys.shape[3])
    is_held = is_held.view(*held.shape[:2], -1, PAGE, 1)
    low = pages.masked_fill(~is_held, torch.inf).amin(3)
    high = pages.masked_fill(~is_held, -torch.inf).amax(3)
    ranges = (high - low).clamp(min=0).sum(2)  # their number is the same in all channels
    return (asked * ranges).argsort(dim=2, descending=True, stable=True)


#: How channels of a row's keys are put in order: what is asked of queries, and the order by that.
#: "channels" is ThinK's, for those that are left out, "order" MixKVQ's, for those with fewer bits.
ORDERS = {"channels": (mean_square, channels), "order": (mean_size, by_error)}


def directions(x: Tensor, held: Tensor) -> Tensor:
    """The directions in which a row's keys or values are largest, those first that have most.

    They are the eigenvectors of ``X^T X``, computed in float32, for which a GPU is waited for.

    Parameters
    ----------
    x : ``[B, Hkv, T, D]``
    held : ``[B, Hkv, T]`` bool
        Which of them count.

    Returns
    -------
    directions : ``[B, Hkv, D, D]`` of the dtype of ``x``, orthonormal columns
    """
    counted = x.float() * held[..., None]
    moments = counted.mT @ counted
    found: Tensor = torch.linalg.eigh(moments.nan_to_num()).eigenvectors
    return found.flip(-1).to(x.dtype)


def energies(entries: Sequence[tuple[Tensor, Tensor]], held: Tensor) -> Tensor:
    """What each entry has of itself in several tiers: the square of its key in the mean of its
    row, and so of its value.

    Parameters
    ----------
    entries : keys and values ``[B, Hkv, T, Dk]`` of each tier
        Those of the first one are whole.
    held : ``[B, Hkv, T]`` bool
        Those of which the mean is taken.

    Returns
    -------
    energies : ``[tiers, B, Hkv, T]`` float32
    """
    squares = torch.stack(
        [torch.stack([x.float().square().sum(3) for x in of_tier]) for of_tier in entries]
    )  # [tiers, 2, B, Hkv, T]
    counts = held.sum(2, keepdim=True).clamp(min=1)
    means = (squares[0] * held).sum(3, keepdim=True) / counts
    return (squares / means.clamp(min=torch.finfo(torch.float32).tiny)).sum(1)


def levels(gains: Tensor, costs: Sequence[int], budget: Tensor) -> Tensor:
    """Which of R levels each of some things gets, so that a budget saves the most.

    Of the upper hulls of gains over costs the steepest steps are taken, as long as they fit: no
    choice of the same cost saves more, but that the last thing may come to a level below its hull.
    Equal ones: lower level first, then the first thing.

    Parameters
    ----------
    gains : ``[R, B, n]`` floating point
        What each level of a thing saves; less than 0 for a thing that gets nothing.
    costs : ints
        Of each level, in ascending order.
    budget : ``[B]`` int64

    Returns
    -------
    levels : ``[B, n]`` int64, 0 for nothing, else from 1 to R
    """
    all_gains, all_costs = [torch.zeros_like(gains[0]), *gains], [0, *costs]
    slopes = []  # of the step to each level: the hull has it up to this price
    for r in range(1, len(all_costs)):
        of_steps = [
            torch.stack(
                [
                    (all_gains[b] - all_gains[a]) / max(all_costs[b] - all_costs[a], 1)
                    for b in range(r, len(all_costs))
                ]
            ).amax(0)
            for a in range(r)
        ]
        slopes.append(torch.stack(of_steps).amin(0))
    batch, count = gains.shape[1:]
    steepest = torch.stack(slopes, 1).flatten(1).sort(dim=1, descending=True, stable=True)
    steps = torch.tensor([b - a for a, b in pairwise(all_costs)], device=gains.device)
    spent = steps[steepest.indices // max(count, 1)].cumsum(1)
    taken = (spent <= budget[:, None]) & (steepest.values >= 0)
    is_taken = torch.zeros_like(taken).scatter(1, steepest.indices, taken)
    return is_taken.view(batch, len(costs), count).sum(1)


def width_of(dim: int, share: Fraction) -> int:
    """Dimensions of ``dim`` that a share of them is, rounded up to what pages can hold.

    The others, ``int(dim * (1 - share))``, are left out (as ThinK's code counts them).
    """
    kept = dim - int(dim * (1 - share))
    return min(-(-kept // MULTIPLE) * MULTIPLE, dim)
