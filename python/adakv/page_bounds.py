"""Sparse reads: what is known of the keys of each page, and which pages a step lists by it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adakv.cache import KVCache
from adakv.entries import keys_of_pages
from adakv.ops import Layer
from adakv.policy import Quest
from adakv.shortlist import shortlist
from adakv.step import Attention, Listing, PageReader


class PageBounds(PageReader):
    """The largest and the smallest number of each page's keys in each dimension, by which steps of
    up to a page of tokens choose what they read.

    They are found out when a step first asks, and then kept up to date page by page; where anything
    else has happened to a sequence meanwhile its are found out again. They take ``2 D`` numbers of
    the keys' dtype for each page.

    Parameters
    ----------
    quest : :class:`adakv.policy.Quest`
    is_recorded : bool
        Whether steps may be recorded in CUDA graphs: then rows are looked at as far as they may
        ever get, instead of as far as the step's longest.
    """

    def __init__(self, quest: Quest, *, is_recorded: bool = False) -> None:
        self.quest, self._is_recorded = quest, is_recorded
        self._kv: KVCache | None = None  # that the bounds are of
        self._seen: list[int] = []  # tokens of its sequences, -1 where it has to be looked at anew
        self._bounds = torch.empty(0)  # [N, 2 D], the largest, then the smallest
        self._num_pages: int | None = None  # of the longest row of this step

    def forget(self, slots: slice = slice(None)) -> None:
        self._seen[slots] = [-1] * len(self._seen[slots])

    def begin_step(
        self, kv: KVCache, seen: Sequence[int], num_new: Sequence[int], columns: int
    ) -> None:
        shape = kv.num_pages, 2 * kv.head_dim
        if columns > kv.page_size:
            self._kv = None
            return
        if kv is not self._kv or self._bounds.shape != shape or len(seen) != len(self._seen):
            self._kv, self._seen = kv, [-1] * len(seen)
            self._bounds = torch.empty(shape, dtype=kv.dtype, device=kv.device)
        changed = [b for b, n in enumerate(seen) if n != self._seen[b]]
        if changed:
            self._find_all(kv, changed)
        if len(changed) < len(seen):
            self._find_filled(kv.all_layers)
        self._seen = [n + new for n, new in zip(seen, num_new, strict=True)]
        self._num_pages = None if self._is_recorded else kv.row_pages_to_grow(num_new)

    def reads_some(self, layer: int) -> bool:
        return self._kv is not None and layer >= self.quest.full_layers

    @property
    def listing(self) -> Listing | None:
        quest = self.quest
        if quest.mass < 1:
            return None
        return Listing(share=quest.share, least=quest.least, newest=quest.newest)

    def listed(
        self,
        layer: int,
        view: Layer,
        queries: Tensor,
        attention: Attention,
        num_new: Tensor | None,
    ) -> Layer:
        quest = self.quest
        pages, lengths = shortlist(
            queries,
            self._bounds,
            view.lengths,
            view.block_table[:, :, : self._num_pages],
            num_new=num_new,
            scale=attention.scale,
            softcap=attention.softcap,
            page_size=view.pages.shape[2],
            share=quest.share,
            mass=quest.mass,
            least=quest.least,
            newest=quest.newest,
            prefetch=True,  # bounds are as old as the step, and append comes right before
        )
        return view._replace(block_table=pages, lengths=lengths)

    def _find_all(self, kv: KVCache, slots: Sequence[int]) -> None:
        """The bounds of all pages of some sequences, layer by layer."""
        chosen = torch.tensor(slots, device=kv.device)
        most = kv.row_pages_to_grow([0] * kv.num_sequences)
        for layer in kv.layers:
            self._find(layer, layer.block_table[chosen, :, :most])

    def _find_filled(self, layers: Layer) -> None:
        """The bounds of the last whole page of each row of all layers, which the step before may
        have filled. It has not been among a row's older pages until now."""
        last = layers.lengths // layers.pages.shape[2] - 1  # [L, B, Hkv]
        self._find(layers, layers.block_table.gather(3, last.clamp(min=0)[..., None].long()))

    def _find(self, layers: Layer, table: Tensor) -> None:
        """The bounds of pages ``[...]`` of rows."""
        pages = table.long().clamp(min=0)
        keys = keys_of_pages(layers, pages, self._bounds.dtype)  # [..., P, D]
        self._bounds[pages] = torch.cat([keys.amax(-2), keys.amin(-2)], -1)


def with_pages(view: Layer, pages: Tensor, counts: Tensor, length: int) -> Layer:
    """A layer with some of the first ``length`` pages of its rows: ``pages`` ``[B, Hkv, n]``,
    ``length`` behind the last of each, and how many they are, ``counts`` ``[B, Hkv]``."""
    table = view.block_table[:, :, :length].gather(2, pages.clamp(max=length - 1))
    page_size = view.pages.shape[2]
    # What is left out are whole pages.
    lengths = view.lengths - (-(-view.lengths // page_size) - counts) * page_size
    return view._replace(block_table=table.where(pages < length, -1), lengths=lengths)
