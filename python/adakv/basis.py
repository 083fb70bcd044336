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

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

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

    def of(self, index: int | slice | tuple[slice, ...]) -> Basis:
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

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return sum(x.numel() * x.itemsize for x in self if x is not None)


def width_of(dim: int, share: float) -> int:
    """Dimensions of ``dim`` that a share of them is, rounded up to what pages can hold.

    The others, ``int(dim * (1 - share))``, are left out (as ThinK's code counts them).
    """
    kept = dim - int(dim * (1 - share) + 1e-9)
    return min(-(-kept // MULTIPLE) * MULTIPLE, dim)
