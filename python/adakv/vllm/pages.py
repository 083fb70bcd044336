"""Pages of an engine's requests: which ones a row has, and moving what is kept into them.

A block of one layer is one page for each kv head. What a compressed request keeps is dealt to pages
of its first blocks row by row. Where every layer keeps equally much, a layer's rows have pages of
that layer. Where it doesn't, only the sum over the layers is known beforehand: then the pages of
all layers, block by block, are one list, of which any row of any layer may have any. For that the
layers' memory has to be one.

A page holds keys and values, or their codes with the scales behind them (docs/bits.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adakv import ops
from adakv.entries import dequantised, int4_keys, int4_values
from adakv.formats import SCALE_GROUP
from adakv.ops import Kept, Layer
from adakv.policy import Flat, Policy
from adakv.reading import Reader
from adakv.vllm.steps import Tables, sent


def spans_layers(policy: Policy) -> bool:
    """Whether layers keep unequally much, so that rows have pages of all layers."""
    return policy.is_model_wide or not isinstance(policy.allocator.layers, Flat)


#: Pages that are dequantised at a time, so that little of it is in float32.
_AT_ONCE = 4096


class Pages(NamedTuple):
    """Pages of a layer, as :class:`adakv.ops.Layer` has them, without positions."""

    entries: Tensor  # [N, 2, P, D], or their codes
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @classmethod
    def within(cls, memory: Tensor, kv_dtype: str, *, head_dim: int, dtype: torch.dtype) -> Pages:
        """Pages of codes in ``memory`` ``[N, P, entry_bytes(...)]`` uint8: codes of keys, codes of
        values, scales of keys, scales of values. (Of int4 P is 32.)"""
        num_pages, page_size, _ = memory.shape
        bytes_ = memory.view(num_pages, -1)  # fails rather than copies
        width = head_dim // 2 if kv_dtype == "int4" else head_dim
        codes, rest = bytes_.tensor_split([2 * page_size * width], 1)
        if kv_dtype == "fp8":
            codes = codes.view(torch.float8_e4m3fn)
        of_entry = page_size, num_scales(kv_dtype, head_dim)
        of_keys = (2, head_dim) if kv_dtype == "int4" else of_entry
        scales = rest.view(dtype).tensor_split([math.prod(of_keys)], 1)
        keys, values = (x.unflatten(1, y) for x, y in zip(scales, (of_keys, of_entry), strict=True))
        return cls(codes.unflatten(1, (2, page_size, width)), keys, values)

    @property
    def dtype(self) -> torch.dtype:
        """That of keys and values."""
        return self.entries.dtype if self.key_scales is None else self.key_scales.dtype

    @property
    def page_size(self) -> int:
        """Entries of a page."""
        return self.entries.shape[2]

    @property
    def is_int4(self) -> bool:
        """Whether keys of a page share scales: then entries don't move, they are quantised anew,
        and the newest ones of a row lie elsewhere (see tails.py)."""
        return self.key_scales is not None and self.key_scales.shape[1] != self.page_size

    @property
    def head_dim(self) -> int:
        """Elements of a key."""
        return self.entries.shape[3] * (2 if self.is_int4 else 1)

    @property
    def parts(self) -> list[Tensor]:
        """What an entry consists of, ``[N, P, ...]`` each."""
        entries = self.entries
        if entries.dtype == torch.float8_e4m3fn:
            entries = entries.view(torch.uint8)  # torch moves bytes on every device
        scales = [x for x in (self.key_scales, self.value_scales) if x is not None]
        return [entries[:, 0], entries[:, 1], *scales]

    def layer(self, positions: Tensor, *tables: Tensor, tails: Tensor | None = None) -> Layer:
        """What ``attend`` takes of some rows, with their ``tables``: lengths, block table, fresh
        pages and tokens seen; and of int4 with their ``tails``."""
        lengths, block_table, fresh, seen = tables
        held = self.entries, positions, block_table, lengths, seen, fresh
        return Layer(*held, self.key_scales, self.value_scales, tails)

    def spread(self, count: int) -> Pages:
        """The first ``count`` pages from this layer's first one on, as far apart as its own."""
        entries, *scales = (
            None if x is None else x.as_strided((count, *x.shape[1:]), x.stride()) for x in self
        )
        assert entries is not None
        return Pages(entries, *scales)

    def move(self, source: Tensor, source_slot: Tensor, to: Tensor, to_slot: Tensor) -> None:
        """Copies entries in slots of ``source`` pages ``[n]`` to those of others, after all have
        been read."""
        if self.key_scales is not None or not self.entries.is_contiguous():
            for part in self.parts:
                part[to, to_slot] = part[source, source_slot]
            return
        vectors, size = self.entries.view(-1, self.entries.shape[-1]), self.page_size
        keys_from, keys_to = source * (2 * size) + source_slot, to * (2 * size) + to_slot
        entries = vectors.index_select(0, torch.cat([keys_from, keys_from + size]))
        vectors.index_copy_(0, torch.cat([keys_to, keys_to + size]), entries)

    def read(self, page_ids: Tensor) -> Tensor:
        """Keys and values ``[n, 2, P, D]`` of pages ``[n]``, copied; of int4 those that are
        full."""
        if self.key_scales is None or self.value_scales is None:
            return self.entries[page_ids]
        shape = len(page_ids), 2, self.page_size, self.head_dim
        found = torch.empty(shape, dtype=self.dtype, device=page_ids.device)
        read = (int4_keys, int4_values) if self.is_int4 else (dequantised, dequantised)
        for into, ids in zip(found.split(_AT_ONCE), page_ids.split(_AT_ONCE), strict=True):
            for half, scales in enumerate((self.key_scales, self.value_scales)):
                into[:, half] = read[half](self.entries[ids, half], scales[ids], self.dtype)
        return found


def num_scales(kv_dtype: str, head_dim: int) -> int:
    """Scales, and zeros, of a key or a value; of int4 of a value."""
    return -(-head_dim // SCALE_GROUP) * {"int8": 2, "fp8": 1, "int4": 2}[kv_dtype]


def entry_bytes(kv_dtype: str, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of a key and a value in pages of codes, those of int4 with a 32nd of their page's
    scales of keys."""
    if kv_dtype == "int4":
        of_keys = 2 * head_dim * dtype.itemsize // 32
        return head_dim + of_keys + num_scales(kv_dtype, head_dim) * dtype.itemsize
    return 2 * (head_dim + num_scales(kv_dtype, head_dim) * dtype.itemsize)


class OwnPages:
    """Rows of a layer have pages of that layer, ``block * Hkv + head``.

    Parameters
    ----------
    layers : one :class:`Pages` for each layer
    num_kv_heads : int
    is_dealt_again : bool
        Whether pages of what is kept may come to be in another order than that of their blocks.
    """

    def __init__(
        self, layers: Sequence[Pages], num_kv_heads: int, *, is_dealt_again: bool = False
    ) -> None:
        self.of_layers = list(layers)
        """What page numbers of each layer's tables count in."""
        self._heads, self._device = num_kv_heads, layers[0].entries.device
        self._dealt_of_block = num_kv_heads
        self._own = torch.arange(num_kv_heads, device=self._device)[:, None]
        self._order: Tensor | None = None
        if is_dealt_again:
            num_pages = len(layers[0].entries)
            self._keep_order(len(layers) * num_pages)
            begins = torch.arange(len(layers), device=self._device) * num_pages
            self._begins = begins[:, None, None, None]

    def tables(
        self,
        blocks: Tensor,
        tails: Tensor,
        kept_pages: Tensor,
        width: int,
        gaps: Tensor | None = None,
    ) -> Tensor:
        """``[L, B, Hkv, width]`` pages of each row, from blocks ``[B, M]``, first blocks of new
        tokens ``[B]`` and pages of kept entries ``[L, B, Hkv]``.

        With ``gaps`` ``[2, B]``, the first block of a gap in what is kept, and blocks in it.

        Behind a row's last page follow some that are not its own.
        """
        column = torch.arange(width, device=self._device)
        behind = column - kept_pages[..., None]
        is_kept = behind < 0
        number, in_block = self._dealt(kept_pages, width, gaps)
        number = torch.where(is_kept, number, tails[:, None, None] + behind)
        in_block = torch.where(is_kept, in_block, self._own)
        block = _of_requests(blocks, number)
        pages = block * self._heads + self._place(in_block)
        if gaps is not None:
            assert self._order is not None
            pages = torch.where(is_kept, self._order[pages + self._begins], pages)
        return pages.int()

    def of_blocks(self, blocks: Tensor) -> Tensor:
        """The pages ``[n * m]`` of blocks ``[n]`` in the order in which they are dealt, int32."""
        in_block = torch.arange(self._dealt_of_block, device=self._device)
        return (blocks[:, None] * self._heads + self._place(in_block)).flatten().int()

    def deal_in_order(self, blocks: Tensor) -> None:
        """What is kept in blocks ``[n]`` has their pages in their order."""
        assert self._order is not None
        pages = self.of_blocks(blocks)
        self._order[pages + self._begins] = pages

    def remember(self, blocks: Tensor, table: Tensor, kept_pages: Tensor, gaps: Tensor) -> None:
        """What is kept of requests has pages ``table`` ``[L, B, Hkv, M]``; the rest is as
        :meth:`tables` takes it, which will give them."""
        assert self._order is not None
        width = table.shape[-1]
        number, in_block = self._dealt(kept_pages, width, gaps)
        pages = _of_requests(blocks, number) * self._heads + self._place(in_block)
        is_kept = torch.arange(width, device=self._device) < kept_pages[..., None]
        self._order[torch.where(is_kept, pages + self._begins, -1)] = table

    def compact_in_place(
        self,
        kept: Sequence[Kept],
        most: int,
        positions: Tensor,
        tables: Tables,
        page_ids: Tensor,
        page_indptr: Tensor,
    ) -> Tables:
        """Some of what rows hold stays, as :func:`adakv.ops.compact` does it in place; tables.

        Parameters
        ----------
        kept : one :class:`adakv.ops.Kept` for each layer
            Places in the rows instead of positions.
        most : int
            At least as many as are kept in all.
        positions : ``[N, P]``
            For what is read by nobody.
        tables : :class:`adakv.vllm.steps.Tables`
            Of the rows; changed.
        page_ids, page_indptr : ``[Q]`` and ``[B + 1]``
        """
        for pages, of_rows, *of_layer in zip(self.of_layers, kept, *tables, strict=True):
            layer = pages.layer(positions, *of_layer)
            ops.compact(None, None, of_rows, layer, page_ids, page_indptr)
        return tables

    def close_up(self, blocks: Tensor, tail: int, lengths: Tensor, begin: int, end: int) -> None:
        """Moves the entries of tokens ``begin`` to ``end - 1``, which lie where a whole request has
        them, behind what is kept of the tokens before.

        Parameters
        ----------
        blocks : ``[M]``
            The request's.
        tail : int
            The first block behind those that are given back.
        lengths : ``[L, Hkv]``
            Entries that its rows keep.
        begin, end : int
        """
        size = self.of_layers[0].page_size
        kept_pages = ((lengths + (size - 1)) // size)[:, None]
        tails = sent([0, tail], self._device)[:, None]
        width = -(-end // size)
        before, after = (
            self.tables(blocks[None], first, pages, width)[:, 0].long()
            for first, pages in zip(tails, (torch.zeros_like(kept_pages), kept_pages), strict=True)
        )
        source = torch.arange(begin, end, device=self._device)
        target = lengths.long()[..., None] + (source - begin)  # [L, Hkv, end - begin]
        into = after.gather(-1, target // size)
        for pages, old, new, place in zip(self.of_layers, before, into, target, strict=True):
            for part in pages.parts:
                part[new, place % size] = part[old[:, source // size], source % size]

    def _keep_order(self, num_pages: int) -> None:
        """Keeps in mind which page stands in the place of each, of those that hold what is kept."""
        # The last one is written where a table has no page.
        self._order = torch.zeros(num_pages + 1, dtype=torch.int32, device=self._device)
        self._begins = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=self._device)

    def _dealt(self, kept_pages: Tensor, width: int, gaps: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which block of the request each page of a row is dealt from, by number, and which of its
        pages, as far as the row has kept some; ``[L, B, Hkv, width]`` each."""
        column = torch.arange(width, device=self._device)
        dealt = self._dealt_before(kept_pages)[..., None] + column
        number = dealt // self._dealt_of_block
        if gaps is not None:
            first, count = gaps[..., None, None]
            number = number + (number >= first) * count
        return number, dealt % self._dealt_of_block

    def _dealt_before(self, kept_pages: Tensor) -> Tensor:
        """How many pages the rows before each row have."""
        return kept_pages.cumsum(-1) - kept_pages

    def _place(self, in_block: Tensor) -> Tensor:
        """Where the pages of a block lie, behind ``block * Hkv``."""
        return in_block


class SharedPages(OwnPages):
    """Rows of any layer have pages of all layers: ``first[layer] + block * Hkv + head`` in one view
    of the layers' common memory, where ``first`` is the layer's first page.

    Raises
    ------
    ValueError
        If the layers are not in one memory, whole pages apart.
    """

    def __init__(
        self, layers: Sequence[Pages], num_kv_heads: int, *, is_dealt_again: bool = False
    ) -> None:
        super().__init__(layers, num_kv_heads)
        lowest = min(layers, key=lambda pages: pages.entries.data_ptr())
        first, memory = lowest.entries, lowest.entries.untyped_storage().data_ptr()
        size = first.stride(0) * first.itemsize
        apart = [pages.entries.data_ptr() - first.data_ptr() for pages in layers]
        if any(
            pages.entries.untyped_storage().data_ptr() != memory
            or pages.entries.stride() != first.stride()
            or (pages.key_scales is None and not pages.entries.is_contiguous())
            or distance % size
            for pages, distance in zip(layers, apart, strict=True)
        ):
            raise ValueError(
                "adakv: a policy whose layers keep unequally much needs the caches of all layers "
                f"in one memory, whole pages of {size} bytes apart, got strides of "
                f"{sorted({pages.entries.stride() for pages in layers})} and distances of {apart} "
                "bytes"
            )
        firsts = [distance // size for distance in apart]
        all_pages = lowest.spread(max(firsts) + len(first))
        self.of_layers = [all_pages] * len(layers)
        if is_dealt_again:
            self._keep_order(len(all_pages.entries))
        self._layers = len(layers)
        self._dealt_of_block = len(layers) * num_kv_heads
        self._firsts = torch.tensor(firsts, dtype=torch.int32, device=self._device)
        heads = torch.arange(num_kv_heads, dtype=torch.int32, device=self._device)
        self._places = (self._firsts[:, None] + heads).flatten()
        self._own = torch.arange(self._dealt_of_block, device=self._device)
        self._own = self._own.view(len(layers), 1, num_kv_heads, 1)

    def compact_in_place(
        self,
        kept: Sequence[Kept],
        most: int,
        positions: Tensor,
        tables: Tables,
        page_ids: Tensor,
        page_indptr: Tensor,
    ) -> Tables:
        joined = [x.transpose(0, 1).flatten(1, 2).contiguous() for x in tables[:3]]  # [B, L * Hkv]
        layer = self.of_layers[0].layer(positions, *joined, tables.seen[0])
        of_rows = _joined(kept, most, len(joined[0]))
        ops.compact(None, None, of_rows, layer, page_ids, page_indptr)
        apart = [x.unflatten(1, (self._layers, -1)).transpose(0, 1) for x in joined]
        return Tables(apart[0], apart[1], apart[2], tables.seen)

    def _dealt_before(self, kept_pages: Tensor) -> Tensor:
        by_request = kept_pages.transpose(0, 1)
        dealt = by_request.flatten(1).cumsum(-1).view(by_request.shape)
        return dealt.transpose(0, 1) - kept_pages

    def _place(self, in_block: Tensor) -> Tensor:
        return self._places[in_block]

    def compact(self, kept: Sequence[Kept], page_ids: Tensor, most: int) -> Tensor:
        """Moves what is kept of a whole request into its first blocks.

        A layer's pages may be taken by what another one keeps: first all that is kept is copied.

        Parameters
        ----------
        kept : one :class:`adakv.ops.Kept` for each layer
        page_ids : ``[Hkv, blocks]``
            The request's pages in a layer's own memory.
        most : int
            At least as many as are kept in all.

        Returns
        -------
        lengths : ``[L, Hkv]`` int32
        """
        page_size = self.of_layers[0].page_size
        positions, starts = _joined(kept, most, 1)
        lengths = starts.diff().view(self._layers, -1)
        number = torch.arange(most, device=self._device)
        # Whoever is behind the last entry is the first one again, and is put where that is put.
        number = number.where(number < starts[-1], 0)
        row = torch.searchsorted(starts[1:], number, right=True)
        place, position = number - starts[row], positions[number].long()
        layer, head = row // self._heads, row % self._heads
        source = self._firsts[layer] + page_ids[head, position // page_size]
        dealt = self._dealt_before(-(-lengths // page_size)[:, None]).flatten()[row]
        dealt = dealt + place // page_size
        target = page_ids[0, dealt // self._dealt_of_block]
        target = target + self._place(dealt % self._dealt_of_block)
        self.of_layers[0].move(source, position % page_size, target, place % page_size)
        return lengths

    def quantise(
        self,
        kept: Sequence[Kept],
        entries: Callable[[int], tuple[Tensor, Tensor]],
        blocks: Tensor,
        most: int,
        positions: Tensor,
        tails: Tensor,
    ) -> Tensor:
        """The same in pages of int4, where what is kept is read, and then compacted like new
        entries.

        Parameters
        ----------
        kept, most
            As :meth:`compact` takes them.
        entries : callable
            Gives a layer's keys and values ``[1, Hkv, T, D]``.
        blocks : ``[n]``
            The request's, for what is kept, and one more.
        positions : ``[N, P]``
            For what is read by nobody.
        tails : ``[1, L * Hkv, 2 P, D]``
            The request's.
        """
        found = []
        for number, of_layer in enumerate(kept):
            where = of_layer.rows(self._heads), of_layer.positions.clamp(min=0).long()
            found.append([x[0][where] for x in entries(number)])
        keys, values = (torch.cat(x) for x in zip(*found, strict=True))  # [K, D] each
        numbers = torch.arange(len(keys), device=self._device)
        of_layers = numbers.int().split([len(x.positions) for x in kept])
        places = [Kept(x, y.indptr) for x, y in zip(of_layers, kept, strict=True)]
        shape = 1, self._layers * self._heads, *keys.shape
        page_ids = self.of_blocks(blocks)
        lengths, fresh, table = (
            page_ids.new_empty((*shape[:2], *x)) for x in ((), (1,), (len(page_ids),))
        )
        layer = self.of_layers[0].layer(
            positions, lengths, table, fresh, page_ids.new_empty(1), tails=tails
        )
        starts = sent([0, len(page_ids)], self._device).int()
        given = keys.expand(shape), values.expand(shape), _joined(places, most, 1)
        ops.compact(*given, layer, page_ids, starts)
        return lengths.view(self._layers, -1)


def _of_requests(blocks: Tensor, number: Tensor) -> Tensor:
    """Blocks of requests, by ``number`` ``[L, B, Hkv, M]`` in ``blocks`` ``[B, M]``, or the last
    ones."""
    of_request = torch.arange(len(blocks), device=blocks.device)[:, None, None]
    return blocks[of_request, number.clamp(max=blocks.shape[1] - 1)]


def _joined(kept: Sequence[Kept], most: int, batch: int) -> Kept:
    """What each layer keeps of rows ``[B, Hkv]``, as what is kept of rows ``[B, L * Hkv]``; at most
    so many in all."""
    starts = torch.stack([x.indptr for x in kept])  # [L, B * Hkv + 1]
    sizes = [0, *(len(x.positions) for x in kept[:-1])]
    begins = starts[:, :-1] + sent(sizes, starts.device).cumsum(0)[:, None]
    begin, counts = (
        x.unflatten(1, (batch, -1)).transpose(0, 1).flatten() for x in (begins, starts.diff())
    )
    ends = counts.cumsum(0)
    number = torch.arange(most, device=starts.device)
    row = torch.searchsorted(ends, number, right=True).clamp(max=len(ends) - 1)
    place = begin[row] + number - (ends - counts)[row]
    positions = torch.cat([x.positions for x in kept])
    positions = positions[place.clamp(max=len(positions) - 1)].where(number < ends[-1], -1)
    return Kept(positions, F.pad(ends, (1, 0)).int())


def kept_of_all(reader: Reader) -> list[Kept]:
    """What each layer keeps of one prompt, whose entries stay where they are."""
    kept: dict[int, Kept] = {}
    for layer in range(reader.num_layers):
        for finished, (chosen,) in reader.finish(layer).items():
            kept[finished] = chosen.kept
    return [kept[layer] for layer in range(reader.num_layers)]
