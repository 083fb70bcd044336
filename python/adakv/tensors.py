"""Tensors that belong together: of a layer of a cache, and of what its rows keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from adakv import shown

_MOST_ROWS, _MOST_COLUMNS = 64, 120  # of a picture

#: Fields of a layer that all layers share.
SHARED = (
    "pages", "page_positions", "key_scales", "value_scales", "page_biases", "value_pages",
)  # fmt: skip


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. Nobody waits for it, unless it comes from a GPU to the host, which
    would read it before it is there."""
    return x.to(device, non_blocking=device.type == "cuda")


class Layer(NamedTuple):
    """The tensors of one layer of a :class:`adakv.cache.KVCache` (or of some of its sequences).

    ``pages`` ``[N, 2, P, D]`` keys, then values, of one row each; shared by all layers. They are
    of the dtype of keys and values, or their codes in uint8 or float8_e4m3fn (docs/bits.md). For
    int4 ``[N, 2, P, D / 2]`` uint8, two codes a byte, that of the dimension before in the low half;
    int2 ``[N, 2, P, D / 4]``, four, the first in the lowest bits.
    ``page_positions`` ``[N, P]`` int32, where the entry of each slot stood in its sequence; shared.
    ``block_table`` ``[B, Hkv, M]`` int32, pages of each row in slot order, -1 behind the last.
    ``lengths`` ``[B, Hkv]`` int32, entries that each row holds.
    ``seen`` ``[B]`` int32, tokens that went by, kept or not.
    ``fresh_pages`` ``[B, Hkv, F]`` int32, the pages that rows take when they outgrow their last
    one.
    ``key_scales``, ``value_scales`` ``[N, P, 2 Z]`` for int8 and ``[N, P, Z]`` for fp8, scales (and
    zeros) of the Z = ceil(D / 64) groups of each entry; shared. None for plain pages. For int4 and
    int2 ``key_scales`` is ``[N, 2, D]``, the scale of each dimension of a page's keys, then the
    zeros, and in int2 values have groups of 32 dimensions.
    ``tails`` ``[B, Hkv, 2 P, D]`` of the dtype of keys and values, for int4 and int2: the last
    ``lengths % P`` entries of each row, P keys, then P values. With all layers ``[L * B, ...]``.
    ``page_biases`` ``[N, P]`` float16, only of a cache that has biases: what attend adds to the
    logit of each slot's entry; shared.
    ``value_pages`` ``[N, 1, P, Dv]``, only where values have a width Dv of their own: then
    ``pages`` are ``[N, 1, P, D]``, keys alone; shared. For int4 ``[N, 1, P, D / 2]``, only where
    keys are mixed: dimensions in 16 bits, then in 4, then in 2, four in a byte. Then ``key_scales``
    are those of the dimensions that have codes.
    """

    pages: Tensor
    page_positions: Tensor
    block_table: Tensor
    lengths: Tensor
    seen: Tensor
    fresh_pages: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    tails: Tensor | None = None
    page_biases: Tensor | None = None
    value_pages: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """``[N, P, Dv]``, the values or their codes in the slots of pages; their keys are
        ``pages[:, 0]``."""
        return self.pages[:, 1] if self.value_pages is None else self.value_pages[:, 0]

    @property
    def value_dim(self) -> int | None:
        """Dv, where values have a width of their own; else None."""
        if self.value_pages is None or self.tails is not None:
            return None
        return self.value_pages.shape[3]


class Tier(NamedTuple):
    """Entries of the same rows that lie elsewhere, as :func:`adakv.ops.attend` takes them.

    ``layer`` holds them, and none of a step's new tokens: ``schedule`` ``[X]`` int32 is planned
    with ``new_tokens=0``. ``queries`` ``[B, Hq, S, D]``, with the D of the tier, are those that
    meet its keys; None: those of the step. ``column`` is that of the output to which the first
    element of its values belongs: 0 for values as they are, a later one for coordinates along other
    directions.
    """

    layer: Layer
    schedule: Tensor
    queries: Tensor | None = None
    column: int = 0


class Source(NamedTuple):
    """Rows of the A sequences that :func:`adakv.ops.fork` branches from, in one layer: their
    ``block_table`` ``[A, Hkv, M]``, ``lengths`` ``[A, Hkv]``, ``seen`` ``[A]`` and tails."""

    source_table: Tensor
    source_lengths: Tensor
    source_seen: Tensor
    source_tails: Tensor | None = None


class Kept(NamedTuple):
    """Positions that each row keeps: row r = b * Hkv + h keeps ``positions[indptr[r]:indptr[r +
    1]]``, ascending.

    ``positions`` is ``[K]`` int32 and may be longer than ``indptr[-1]``; what is behind holds -1.
    ``indptr`` is ``[B * Hkv + 1]`` int32.
    """

    positions: Tensor
    indptr: Tensor

    def rows(self, num_rows: int) -> Tensor:
        """``[K]`` int64: the row of each position; of those behind the last row, the last one."""
        index = torch.arange(len(self.positions), dtype=torch.int32, device=self.indptr.device)
        return torch.searchsorted(self.indptr[1:num_rows], index, right=True)

    def places(self, shape: Sequence[int]) -> Tensor:
        """``[B, Hkv, T]`` int32: the index in ``positions`` of each entry that is kept, else -1."""
        size = math.prod(shape)
        index = self.rows(shape[0] * shape[1]) * shape[2] + self.positions
        index = index.where(self.positions >= 0, size)  # behind all of them
        places = self.positions.new_full((size + 1,), -1)
        order = torch.arange(len(index), dtype=torch.int32, device=places.device)
        return places.scatter_(0, index, order)[:size].view(*shape)

    def mask(self, shape: Sequence[int]) -> Tensor:
        """``[B, Hkv, T]`` bool: what is kept."""
        return self.places(shape) >= 0

    def __repr__(self) -> str:
        try:
            counts = self.indptr.diff().tolist()
        except (RuntimeError, AttributeError):  # those of a graph have no numbers
            return f"Kept(positions={self.positions!r}, indptr={self.indptr!r})"
        if not counts:
            return "Kept(no rows)"
        each = f"{min(counts)} to {max(counts)} each"
        return f"Kept({sum(counts)} entries of {len(counts)} rows, {each})"

    def _repr_html_(self) -> str:
        positions, ends = self.positions.cpu().long(), self.indptr.tolist()
        num_rows = min(len(ends) - 1, _MOST_ROWS)
        length = int(positions.max()) + 1 if ends[-1] else 0
        columns = min(length, _MOST_COLUMNS)
        values = [
            torch.bincount(positions[a:b] * columns // length, minlength=columns).tolist()
            for a, b in pairwise(ends[: num_rows + 1])
        ]
        label = f"{self!r}: rows (down) and where they keep entries of {length} positions"
        if num_rows < len(ends) - 1:
            label += f"; the first {num_rows} rows"
        return shown.heat_map(values, label=label, rows="row", columns="part")
