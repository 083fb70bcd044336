"""A step of new tokens in a cache whose sequences may bring unequal numbers of them.

One token a sequence is the usual step. Several are a second turn, padded where its parts differ in
length; where they are more than the fresh pages of a row take, they are appended in pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adakv import ops
from adakv.cache import KVCache
from adakv.models.padding import align, new_tokens, restore
from adakv.models.prompt import Attention


class _Piece(NamedTuple):
    """Columns of a step that KVCache.grow made room for in one go."""

    columns: slice
    fresh_pages: Tensor  # [L, B, Hkv, F]
    num_new: Tensor | None  # [B] int32


class PaddedStep:
    """Makes room for a step in all layers and plans it; then every layer attends.

    Parameters
    ----------
    kv : :class:`adakv.cache.KVCache`
    mask : ``[B, 1, S, columns so far]`` or ``[B, columns so far]``, optional
        The model's, see :func:`adakv.models.padding.new_tokens`.
    seen : list of int
        Tokens of each of the B sequences before the step; :attr:`seen` has those after it.
    columns : int
        S, padding included.
    """

    def __init__(self, kv: KVCache, mask: Tensor | None, seen: list[int], columns: int) -> None:
        self._kv = kv
        num_new, self._order = new_tokens(mask, seen, columns)
        self.seen = [n + new for n, new in zip(seen, num_new, strict=True)]
        self._num_new = self._to_device(num_new, columns)
        self._pieces: list[_Piece] = []
        left = columns
        while left:
            rest = [min(n, left) for n in num_new]
            now = kv.grow(rest, left)
            if now < columns:
                # The next piece's pages overwrite these before the other layers have used them.
                fresh = kv.all_layers.fresh_pages.clone()
                counts = self._to_device([max(n - left + now, 0) for n in rest], now)
                start = columns - left
                self._pieces.append(_Piece(slice(start, start + now), fresh, counts))
            left -= now
        self._schedules: tuple[Tensor, ...] = ()
        if not self._pieces:
            schedules = ops.plan(
                *kv.plan_inputs,
                new_tokens=columns,
                num_new=self._num_new,
                page_size=kv.page_size,
            )
            self._schedules = schedules.unbind()

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, attention: Attention
    ) -> Tensor:
        """Appends keys and values ``[B, Hkv, S, D]`` to a layer, and attends: ``[B, S, Hq, D]``."""
        scale, softcap, sinks, _ = attention
        if self._order is not None:
            queries, keys, values = (align(x, self._order) for x in (queries, keys, values))
        if self._pieces:
            schedule = self._append_pieces(layer, keys, values)
            new_keys = new_values = None
        else:
            schedule, new_keys, new_values = self._schedules[layer], keys, values
        out, _ = ops.attend(
            queries,
            self._kv.layer(layer),
            schedule,
            keys=new_keys,
            values=new_values,
            num_new=self._num_new,
            sink_logits=sinks,
            scale=scale,
            softcap=softcap,
            prefetch=layer > 0 and not self._pieces,  # else it was planned just now
        )
        out = out.transpose(1, 2)
        return out if self._order is None else restore(out, self._order)

    def _append_pieces(self, layer: int, keys: Tensor, values: Tensor) -> Tensor:
        """Appends a step that was too wide for one go; the schedule ``[X]`` to attend with."""
        view = self._kv.layer(layer)
        for columns, fresh_pages, num_new in self._pieces:
            piece = view._replace(fresh_pages=fresh_pages[layer])
            ops.append(keys[:, :, columns], values[:, :, columns], piece, num_new=num_new)
        return ops.plan(
            view.lengths[None],
            view.block_table[None],
            view.fresh_pages[None],
            new_tokens=0,
            page_size=self._kv.page_size,
        )[0]

    def _to_device(self, num_new: Sequence[int], columns: int) -> Tensor | None:
        if all(n == columns for n in num_new):
            return None
        return torch.tensor(num_new, dtype=torch.int32, device=self._kv.device)
