"""Pages of an engine's requests: which ones a row has, and moving what is kept into them.

A block of one layer is one page for each kv head. What a compressed request keeps is dealt to pages
of its first blocks row by row. Where every layer keeps equally much, a layer's rows have pages of
that layer. Where it doesn't, only the sum over the layers is known beforehand: then the pages of
all layers, block by block, are one list, of which any row of any layer may have any. For that the
layers' memory has to be one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adakv import ops
from adakv.ops import Kept
from adakv.policy import Flat, Policy
from adakv.reading import Reader
from adakv.vllm.page_memory import Pages, entries_of, in_one_memory
from adakv.vllm.steps import Tables, sent


def spans_layers(policy: Policy) -> bool:
    """Whether layers keep unequally much, so that rows have pages of all layers."""
    return policy.is_model_wide or not isinstance(policy.allocator.layers, Flat)


#: Keys and values of a prompt that are copied and chosen from at a time, of as many layers as hold
#: them. Each choice takes the host as long, and the device waits for what isn't issued when it has
#: read the prompt: with an 8B model's layers one by one that was 5 % of reading 32k tokens.
_BYTES_AT_ONCE = 1 << 29


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
        self._memory = in_one_memory(layers)
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

    def together(self, length: int) -> list[range]:
        """Layers whose requests of ``length`` tokens are compacted at once."""
        count, pages = len(self.of_layers), self.of_layers[0]
        of_layer = 2 * self._heads * length * pages.head_dim * pages.dtype.itemsize
        most = 1 if self._memory is None else max(_BYTES_AT_ONCE // of_layer, 1)
        return [range(i, min(i + most, count)) for i in range(0, count, most)]

    def memory_of(self, layers: range) -> tuple[Pages, Tensor]:
        """Pages in which those of some layers are found, and the first one of each layer, ``[n]``.

        Raises ``ValueError`` for several layers that are not in one memory.
        """
        if self._memory is not None:
            pages, firsts = self._memory
            return pages, firsts[layers.start : layers.stop]
        (layer,) = layers
        return self.of_layers[layer], self._own.new_zeros(1)

    def compact(self, layers: range, kept: Sequence[Kept], page_ids: Tensor, most: int) -> Tensor:
        """Moves what is kept of a whole request in some layers into its first blocks.

        Pages may be taken by what another row keeps: first all that is kept is copied.

        Parameters
        ----------
        layers : range
            Of shared pages all.
        kept : sequence of :class:`adakv.ops.Kept`
            Of the rows of all these layers, one behind the other.
        page_ids : ``[Hkv, blocks]``
            The request's pages in a layer's own memory.
        most : int
            At least as many as are kept in all.

        Returns
        -------
        lengths : ``[n, Hkv]`` int32
        """
        pages, firsts = self.memory_of(layers)
        size = pages.page_size
        positions, starts = _joined(kept, most, 1)
        lengths = starts.diff().view(len(layers), -1)
        number = torch.arange(most, device=self._device)
        # Whoever is behind the last entry is the first one again, and is put where that is put.
        number = number.where(number < starts[-1], 0)
        row = torch.searchsorted(starts[1:], number, right=True)
        place, position = number - starts[row], positions[number].long()
        first, head = firsts[row // self._heads], row % self._heads
        source = first + page_ids[head, position // size]
        dealt = self._dealt_before(-(-lengths // size)[:, None]).flatten()[row] + place // size
        target = page_ids[0, dealt // self._dealt_of_block]
        target = target + self._place_in_memory(dealt % self._dealt_of_block, first)
        pages.move(source, position % size, target, place % size)
        return lengths

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

    def _place_in_memory(self, in_block: Tensor, first: Tensor) -> Tensor:
        """The same in the memory of all layers, in that of a layer whose first page is given."""
        return first + in_block


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
        if self._memory is None:
            entries = [pages.entries for pages in layers]
            raise ValueError(
                "adakv: a policy whose layers keep unequally much needs the caches of all layers "
                f"in one memory, whole pages apart, got strides of "
                f"{sorted({x.stride() for x in entries})} and addresses of "
                f"{[x.data_ptr() for x in entries]}"
            )
        all_pages, firsts = self._memory
        self.of_layers = [all_pages] * len(layers)
        if is_dealt_again:
            self._keep_order(len(all_pages.entries))
        self._layers = len(layers)
        self._dealt_of_block = len(layers) * num_kv_heads
        heads = torch.arange(num_kv_heads, dtype=torch.int32, device=self._device)
        self._places = (firsts[:, None] + heads).flatten()
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

    def together(self, length: int) -> list[range]:
        return [range(self._layers)]

    def _place(self, in_block: Tensor) -> Tensor:
        return self._places[in_block]

    def _place_in_memory(self, in_block: Tensor, first: Tensor) -> Tensor:
        return self._places[in_block]

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


def kept_of(layers: range, reader: Reader) -> list[Kept]:
    """What each of some layers keeps of one prompt, whose entries stay where they are."""
    kept: dict[int, Kept] = {}
    for layer in layers:
        for finished, (chosen,) in reader.finish(layer).items():
            kept[finished] = chosen.kept
    return [kept[layer] for layer in layers]


def kept_of_alike(layers: range, reader: Reader, pages: OwnPages, page_ids: Tensor) -> list[Kept]:
    """The same of layers that are alike, whose entries lie in pages ``[Hkv, blocks]`` of each:
    chosen at once (:meth:`adakv.reading.Reader.finish_alike`)."""

    def entries() -> tuple[Tensor, Tensor]:
        memory, firsts = pages.memory_of(layers)
        of_all = (firsts[:, None, None] + page_ids).flatten(0, 1)
        (length,) = reader.lengths
        found = entries_of(memory, of_all, length)
        keys, values = (x[0].unflatten(0, (len(layers), -1)) for x in found)
        return keys, values

    return [chosen.kept for chosen in reader.finish_alike(layers, entries)]
