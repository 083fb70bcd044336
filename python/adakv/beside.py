"""Reads by what a small model looks at: which pages a step lists by it, and which entries it has
copies of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from adakv.cache import KVCache
from adakv.ops import Layer
from adakv.page_bounds import with_pages
from adakv.policy.beside import SmallKV, SpecAttn
from adakv.step import Attention, PageReader


class Look(NamedTuple):
    """What a layer of the small model looks at."""

    weights: Tensor  # [Hq', S, T] float32, the attention of the step's tokens
    sums: Tensor  # [Hq', T] float32, of all tokens so far


class Looking(Protocol):
    """A small model that has read the same tokens, up to those of the step that comes."""

    def looks(self, seen: int) -> Sequence[Look] | None:
        """What all its layers look at; None unless it has seen so many tokens, the last ones in one
        step of few."""
        ...

    def head_map(self, num_layers: int) -> Sequence[Tensor]:
        """The small model's heads that belong to each layer's q heads, ``[Hq]``, numbered through
        its layers."""
        ...


class BesideReader(PageReader):
    """What reads by a small model have in common: for steps that are wider than a page, and while
    the small model has not seen what the cache has, everything is read."""

    def __init__(self, looking: Looking) -> None:
        self.looking = looking
        self._looks: Sequence[Look] | None = None  # of the step that comes
        self._num_pages = 0  # of the longest row of this step

    def forget(self) -> None:
        self._looks = None

    def begin_step(
        self, kv: KVCache, seen: Sequence[int], num_new: Sequence[int], columns: int
    ) -> None:
        self._looks = None
        if len(seen) == 1 and num_new[0] == columns <= self.widest(kv):
            self._looks = self.looking.looks(seen[0] + columns)
            self._num_pages = kv.row_pages_to_grow(num_new)

    def widest(self, kv: KVCache) -> int:
        """Columns of a step that doesn't read everything."""
        return kv.page_size


class DraftPages(BesideReader):
    """The pages in which a draft's step found what it looked at.

    Parameters
    ----------
    read : :class:`adakv.policy.SpecAttn`
        With a layer of the draft for every one of the model's.
    """

    def __init__(self, read: SpecAttn, looking: Looking) -> None:
        super().__init__(looking)
        self.read = read

    def reads_some(self, layer: int) -> bool:
        return self._looks is not None and layer >= self.read.full_layers

    def listed(
        self,
        layer: int,
        view: Layer,
        queries: Tensor,
        attention: Attention,
        num_new: Tensor | None,
    ) -> Layer:
        assert self._looks is not None
        weights = self._looks[self.read.layers[layer]].weights.mean(0)[None]  # [1, S, T]
        length = self._num_pages
        table = view.block_table[:, :, :length].clamp(min=0).long()
        positions = view.page_positions[table]
        pages, counts = self.read.pages(weights.to(table.device), positions, view.lengths)
        return with_pages(view, pages, counts, length)


class Copies(NamedTuple):
    """Copies of some entries of each row, on the device where they are read."""

    held: Tensor  # [Hkv, n] int64, which entry of its row each is
    pages: Tensor  # [Hkv, m, 2 or 1, P, D]: keys and values, or values alone

    def with_those(self, wanted: Tensor, view: Layer) -> Copies:
        """Copies of the entries ``wanted`` ``[Hkv, n]``: only those that were not there are
        copied, unless it becomes smaller. Their order is of no meaning."""
        heads, count = wanted.shape
        if count < self.held.shape[1]:
            return self._replace(held=self.held[:, :0]).with_those(wanted, view)
        half, page_size, head_dim = self.pages.shape[2:]
        pages = self.pages
        if count > pages.shape[1] * page_size:
            num_pages = -(-count // page_size) + 4  # room for the next steps
            pages = pages.new_empty(heads, num_pages, half, page_size, head_dim)
            pages[:, : self.pages.shape[1]] = self.pages
        had = self.held.shape[1]
        longest = int(view.block_table.shape[2]) * view.pages.shape[2]
        is_wanted = torch.zeros(heads, longest, dtype=torch.bool, device=wanted.device)
        is_wanted.scatter_(1, wanted, True)
        stays = torch.zeros(heads, count, dtype=torch.bool, device=wanted.device)
        stays[:, :had] = is_wanted.gather(1, self.held)
        is_wanted.scatter_(1, self.held, False)
        row, entry = is_wanted.nonzero(as_tuple=True)  # as many of each row as free places there
        _, place = (~stays).nonzero(as_tuple=True)
        held = torch.cat([self.held, self.held.new_empty(heads, count - had)], 1)
        held[row, place] = entry
        rows, entries = (x.to(view.pages.device) for x in (row, entry))
        source = view.block_table[0, rows, entries // view.pages.shape[2]].long()
        slot = entries % view.pages.shape[2]
        for part in range(half):
            new = view.pages[source, part + 2 - half, slot].to(pages.device)
            pages[row, place // page_size, part, place % page_size] = new
        return Copies(held, pages)


class SmallEntries(BesideReader):
    """Some entries of one sequence, copied out of the cache's pages, which hold all of them and may
    lie on another device than the model.

    Parameters
    ----------
    read : :class:`adakv.policy.SmallKV`
    """

    def __init__(self, read: SmallKV, looking: Looking) -> None:
        super().__init__(looking)
        self.read = read
        self._map: Sequence[Tensor] = ()
        # Of each layer; what is attended to first.
        self._copies: dict[int, tuple[Copies, Copies]] = {}
        self._kv: KVCache | None = None  # that they are copies of
        self._seen = 0  # tokens of its sequence then
        self._of_heads = torch.empty(0), torch.empty(0)  # sums, weights [L' * Hq', T] of this step
        self._weights = torch.empty(0)  # [Hq, marginal] of the layer that attends now

    def forget(self) -> None:
        super().forget()
        self._copies, self._kv = {}, None

    def begin_step(
        self, kv: KVCache, seen: Sequence[int], num_new: Sequence[int], columns: int
    ) -> None:
        super().begin_step(kv, seen, num_new, columns)
        if kv is not self._kv or list(seen) != [self._seen]:
            self._copies = {}
        if not seen or seen[0] <= 1:
            self._map = ()
        self._kv, self._seen = kv, sum(seen) + columns
        if self._looks is None:
            return
        if not self._map:
            self._map = self.looking.head_map(kv.num_layers)
        weights = torch.cat([look.weights[:, -1] for look in self._looks])
        self._of_heads = torch.cat([look.sums for look in self._looks]), weights

    def widest(self, kv: KVCache) -> int:
        return 1

    def reads_some(self, layer: int) -> bool:
        return self._looks is not None

    def listed(
        self,
        layer: int,
        view: Layer,
        queries: Tensor,
        attention: Attention,
        num_new: Tensor | None,
    ) -> Layer:
        assert self._looks is not None
        heads, of_small = view.lengths.shape[1], self._map[layer]
        sums, weights = (x[of_small].to(queries.device) for x in self._of_heads)
        attended, marginal = self.read.entries(sums, heads)
        both, values = self._copies.get(layer) or self._empty(view, queries.device)
        self._copies[layer] = both.with_those(attended, view), values.with_those(marginal, view)
        both, values = self._copies[layer]
        by_row = values.held.repeat_interleave(queries.shape[1] // heads, 0)
        self._weights = weights.gather(1, by_row)
        pages = both.pages.flatten(0, 1)
        table = torch.arange(len(pages), dtype=torch.int32, device=pages.device)
        return view._replace(
            pages=pages,
            page_positions=table.new_zeros(len(pages), pages.shape[2]),
            block_table=table.view(1, heads, -1),
            lengths=table.new_full((1, heads), both.held.shape[1]),
            seen=view.seen.to(pages.device),
            fresh_pages=view.fresh_pages.to(pages.device),
        )

    def attended(self, layer: int) -> Tensor:
        """``[Hkv, n]`` int64: the entries that a layer attended to last, in any order."""
        return self._copies[layer][0].held

    def mixed(self, layer: int, out: Tensor) -> Tensor:
        values = self._copies[layer][1]
        found = values.pages.flatten(1, 3)[:, : values.held.shape[1]]
        return self.read.mixed(out[0, :, 0], self._weights, found)[None, :, None]

    @staticmethod
    def _empty(view: Layer, device: torch.device) -> tuple[Copies, Copies]:
        heads, (_, _, page_size, head_dim) = view.lengths.shape[1], view.pages.shape
        held = torch.empty(heads, 0, dtype=torch.int64, device=device)
        like = torch.empty(0, dtype=view.pages.dtype, device=device)
        both, values = (like.new_empty(heads, 0, n, page_size, head_dim) for n in (2, 1))
        return Copies(held, both), Copies(held, values)
