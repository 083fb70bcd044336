"""The tensors of a layer of a cache, which belong together."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Layer(NamedTuple):
    """The tensors of one layer of a :class:`adakv.cache.KVCache` (or of some of its sequences).

    ``pages`` ``[N, 2, P, D]`` keys, then values, of one row each; shared by all layers. They are
    of the dtype of keys and values, or their codes in uint8 or float8_e4m3fn (docs/bits.md). For
    int4 ``[N, 2, P, D / 2]`` uint8, two codes a byte, that of the dimension before in the low half.
    ``page_positions`` ``[N, P]`` int32, where the entry of each slot stood in its sequence; shared.
    ``block_table`` ``[B, Hkv, M]`` int32, pages of each row in slot order, -1 behind the last.
    ``lengths`` ``[B, Hkv]`` int32, entries that each row holds.
    ``seen`` ``[B]`` int32, tokens that went by, kept or not.
    ``fresh_pages`` ``[B, Hkv, F]`` int32, the pages that rows take when they outgrow their last
    one.
    ``key_scales``, ``value_scales`` ``[N, P, 2 Z]`` for int8 and ``[N, P, Z]`` for fp8, scales (and
    zeros) of the Z = ceil(D / 64) groups of each entry; shared. None for plain pages. For int4
    ``key_scales`` is ``[N, 2, D]``, the scale of each dimension of a page's keys, then the zeros.
    ``tails`` ``[B, Hkv, 2 P, D]`` of the dtype of keys and values, only for int4: the last
    ``lengths % P`` entries of each row, P keys, then P values. With all layers ``[L * B, ...]``.
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
