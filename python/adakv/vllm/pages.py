"""Pages of an engine's requests: which ones a row has, and moving what is kept into them.

A block of one layer is one page for each kv head. What a compressed request keeps is dealt to pages
of its first blocks row by row. Where every layer keeps equally much, a layer's rows have pages of
that layer. Where it doesn't, only the sum over the layers is known beforehand: then the pages of
all layers, block by block, are one list, of which any row of any layer may have any. For that the
layers' memory has to be one.

A page holds keys and values, or their codes with the scales behind them (docs/bits.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adakv.entries import dequantised
from adakv.formats import SCALE_GROUP
from adakv.ops import Kept, Layer
from adakv.policy import Flat, Policy
from adakv.reading import Reader
from adakv.vllm.steps import sent


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
        values, scales of keys, scales of values."""
        num_pages, page_size, _ = memory.shape
        bytes_ = memory.view(num_pages, -1)  # fails rather than copies
        codes, rest = bytes_.tensor_split([2 * page_size * head_dim], 1)
        if kv_dtype == "fp8":
            codes = codes.view(torch.float8_e4m3fn)
        width = num_scales(kv_dtype, head_dim)
        scales = rest.view(dtype).unflatten(1, (2, page_size, width))
        return cls(codes.unflatten(1, (2, page_size, head_dim)), scales[:, 0], scales[:, 1])

    @property
    def dtype(self) -> torch.dtype:
        """That of keys and values."""
        return self.entries.dtype if self.key_scales is None else self.key_scales.dtype

    @property
    def page_size(self) -> int:
        """Entries of a page."""
        return self.entries.shape[2]

    @property
    def parts(self) -> list[Tensor]:
        """What an entry consists of, ``[N, P, ...]`` each."""
        entries = self.entries
        if entries.dtype == torch.float8_e4m3fn:
            entries = entries.view(torch.uint8)  # torch moves bytes on every device
        scales = [x for x in (self.key_scales, self.value_scales) if x is not None]
        return [entries[:, 0], entries[:, 1], *scales]

    def layer(self, positions: Tensor, *tables: Tensor) -> Layer:
        """What ``attend`` takes of some rows, with their ``tables``: lengths, block table, fresh
        pages and tokens seen."""
        lengths, block_table, fresh, seen = tables
        held = self.entries, positions, block_table, lengths, seen, fresh
        return Layer(*held, self.key_scales, self.value_scales)

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
        """Keys and values ``[n, 2, P, D]`` of pages ``[n]``, copied."""
        if self.key_scales is None or self.value_scales is None:
            return self.entries[page_ids]
        shape = len(page_ids), *self.entries.shape[1:]
        found = torch.empty(shape, dtype=self.dtype, device=page_ids.device)
        for into, ids in zip(found.split(_AT_ONCE), page_ids.split(_AT_ONCE), strict=True):
            for half, scales in enumerate((self.key_scales, self.value_scales)):
                into[:, half] = dequantised(self.entries[ids, half], scales[ids], self.dtype)
        return found


def num_scales(kv_dtype: str, head_dim: int) -> int:
    """Scales, and zeros, of a key or a value."""
    return -(-head_dim // SCALE_GROUP) * {"int8": 2, "fp8": 1}[kv_dtype]


def entry_bytes(kv_dtype: str, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of a key and a value in pages of codes."""
    return 2 * (head_dim + num_scales(kv_dtype, head_dim) * dtype.itemsize)


class OwnPages:
    """Rows of a layer have pages of that layer, ``block * Hkv + head``.

    Parameters
    ----------
    layers : one :class:`Pages` for each layer
    num_kv_heads : int
    """

    def __init__(self, layers: Sequence[Pages], num_kv_heads: int) -> None:
        self.of_layers = list(layers)
        """What page numbers of each layer's tables count in."""
        self._heads, self._device = num_kv_heads, layers[0].entries.device
        self._dealt_of_block = num_kv_heads
        self._own = torch.arange(num_kv_heads, device=self._device)[:, None]

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
        dealt = self._dealt_before(kept_pages)[..., None] + column
        behind = column - kept_pages[..., None]
        is_kept = behind < 0
        kept = dealt // self._dealt_of_block
        if gaps is not None:
            first, count = gaps[..., None, None]
            kept = kept + (kept >= first) * count
        index = torch.where(is_kept, kept, tails[:, None, None] + behind)
        index = index.clamp(max=blocks.shape[1] - 1)
        of_request = torch.arange(len(blocks), device=self._device)[:, None, None]
        block = blocks[of_request, index]
        in_block = torch.where(is_kept, dealt % self._dealt_of_block, self._own)
        return (block * self._heads + self._place(in_block)).int()

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

    def move(
        self, kept: Sequence[Kept], before: Tensor, after: Tensor, totals: Sequence[int]
    ) -> None:
        """Moves what is kept of rows to the beginnings of other rows.

        Parameters
        ----------
        kept : one :class:`adakv.ops.Kept` for each layer
            Places in the rows of a request, in the place of positions.
        before, after : ``[L, Hkv, M]``
            Pages of its rows. All that a layer keeps is read before any of it is written.
        totals : at least as many entries as each layer keeps
        """
        layers = zip(self.of_layers, kept, before, after, totals, strict=True)
        for pages, (positions, starts), old, new, most in layers:
            _move_rows(pages, positions, starts[:-1], starts.diff(), old, new, most)

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

    def __init__(self, layers: Sequence[Pages], num_kv_heads: int) -> None:
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
        self._layers = len(layers)
        self._dealt_of_block = len(layers) * num_kv_heads
        self._firsts = torch.tensor(firsts, dtype=torch.int32, device=self._device)
        heads = torch.arange(num_kv_heads, dtype=torch.int32, device=self._device)
        self._places = (self._firsts[:, None] + heads).flatten()
        self._own = torch.arange(self._dealt_of_block, device=self._device)
        self._own = self._own.view(len(layers), 1, num_kv_heads, 1)

    def move(
        self, kept: Sequence[Kept], before: Tensor, after: Tensor, totals: Sequence[int]
    ) -> None:
        starts = torch.stack([x.indptr for x in kept])
        sizes = [0, *(len(x.positions) for x in kept[:-1])]
        begin = starts[:, :-1] + sent(sizes, self._device).cumsum(0)[:, None]
        begin, lengths = begin.flatten(), starts.diff().flatten()
        positions = torch.cat([x.positions for x in kept])
        old, new = before.flatten(0, 1), after.flatten(0, 1)
        _move_rows(self.of_layers[0], positions, begin, lengths, old, new, sum(totals))

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
        starts = torch.stack([x.indptr for x in kept])
        lengths = starts.diff()  # [L, Hkv]
        rows = lengths.flatten()
        ends = rows.cumsum(0)
        number = torch.arange(most, device=self._device)
        # Whoever is behind the last entry is the first one again, and is put where that is put.
        number = number.where(number < ends[-1], 0)
        row = torch.searchsorted(ends, number, right=True)
        place = number - (ends - rows)[row]
        layer, head = row // self._heads, row % self._heads
        sizes = [0, *(len(x.positions) for x in kept[:-1])]
        of_layer = sent(sizes, self._device).cumsum(0)[:, None]
        begin = (of_layer + starts[:, :-1]).flatten()
        position = torch.cat([x.positions for x in kept])[begin[row] + place].long()
        source = self._firsts[layer] + page_ids[head, position // page_size]
        dealt = self._dealt_before(-(-lengths // page_size)[:, None]).flatten()[row]
        dealt = dealt + place // page_size
        target = page_ids[0, dealt // self._dealt_of_block]
        target = target + self._place(dealt % self._dealt_of_block)
        self.of_layers[0].move(source, position % page_size, target, place % page_size)
        return lengths


def _move_rows(
    pages: Pages,
    positions: Tensor,
    begin: Tensor,
    lengths: Tensor,
    before: Tensor,
    after: Tensor,
    most: int,
) -> None:
    """Moves entries of rows ``[R]`` from places ``positions[begin[r]:begin[r] + lengths[r]]`` in
    pages ``before[r]`` to the beginning of pages ``after[r]``; ``most`` entries or fewer."""
    size, ends = pages.page_size, lengths.cumsum(0)
    number = torch.arange(most, device=positions.device)
    # Whoever is behind the last entry is the first one again, and is put where that is put.
    number = number.where(number < ends[-1], 0)
    row = torch.searchsorted(ends, number, right=True)
    place = number - (ends - lengths)[row]
    source = positions[begin[row] + place].long()
    old, new = before[row, source // size].long(), after[row, place // size].long()
    pages.move(old, source % size, new, place % size)


def kept_of_all(reader: Reader) -> list[Kept]:
    """What each layer keeps of one prompt, whose entries stay where they are."""
    kept: dict[int, Kept] = {}
    for layer in range(reader.num_layers):
        for finished, (chosen,) in reader.finish(layer).items():
            kept[finished] = chosen.kept
    return [kept[layer] for layer in range(reader.num_layers)]
