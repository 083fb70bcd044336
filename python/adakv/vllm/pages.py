"""Pages of an engine's requests: which ones a row has, and moving what is kept into them.

A block of one layer is one page for each kv head. What a compressed request keeps is dealt to pages
of its first blocks row by row. Where every layer keeps equally much, a layer's rows have pages of
that layer. Where it doesn't, only the sum over the layers is known beforehand: then the pages of
all layers, block by block, are one list, of which any row of any layer may have any. For that the
layers' memory has to be one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adakv.ops import Kept
from adakv.policy import Flat, Policy
from adakv.reading import Reader
from adakv.vllm.steps import sent


def spans_layers(policy: Policy) -> bool:
    """Whether layers keep unequally much, so that rows have pages of all layers."""
    return policy.is_model_wide or not isinstance(policy.allocator.layers, Flat)


class OwnPages:
    """Rows of a layer have pages of that layer, ``block * Hkv + head``.

    Parameters
    ----------
    layers : one ``[N, 2, P, D]`` for each layer
    num_kv_heads : int
    """

    def __init__(self, layers: Sequence[Tensor], num_kv_heads: int) -> None:
        self.of_layers = list(layers)
        """What page numbers of each layer's tables count in."""
        self._heads, self._device = num_kv_heads, layers[0].device
        self._dealt_of_block = num_kv_heads
        self._own = torch.arange(num_kv_heads, device=self._device)[:, None]

    def tables(self, blocks: Tensor, tails: Tensor, kept_pages: Tensor, width: int) -> Tensor:
        """``[L, B, Hkv, width]`` pages of each row, from blocks ``[B, M]``, first blocks behind the
        prompt ``[B]`` and pages of kept entries ``[L, B, Hkv]``.

        Behind a row's last page follow some that are not its own.
        """
        column = torch.arange(width, device=self._device)
        dealt = self._dealt_before(kept_pages)[..., None] + column
        behind = column - kept_pages[..., None]
        is_kept = behind < 0
        index = torch.where(is_kept, dealt // self._dealt_of_block, tails[:, None, None] + behind)
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
        size = self.of_layers[0].shape[2]
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
            pages[new, :, place % size] = pages[old[:, source // size], :, source % size]

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

    def __init__(self, layers: Sequence[Tensor], num_kv_heads: int) -> None:
        super().__init__(layers, num_kv_heads)
        lowest = min(layers, key=Tensor.data_ptr)
        memory, size = lowest.untyped_storage().data_ptr(), lowest[0].nbytes
        apart = [layer.data_ptr() - lowest.data_ptr() for layer in layers]
        if any(
            layer.untyped_storage().data_ptr() != memory
            or not layer.is_contiguous()
            or distance % size
            for layer, distance in zip(layers, apart, strict=True)
        ):
            raise ValueError(
                "adakv: a policy whose layers keep unequally much needs the caches of all layers "
                f"in one memory, whole pages of {size} bytes apart, got strides of "
                f"{sorted({layer.stride() for layer in layers})} and distances of {apart} bytes"
            )
        firsts = [distance // size for distance in apart]
        count = max(firsts) + len(lowest)
        all_pages = lowest.as_strided((count, *lowest.shape[1:]), lowest.stride())
        self.of_layers = [all_pages] * len(layers)
        self._layers = len(layers)
        self._dealt_of_block = len(layers) * num_kv_heads
        self._firsts = torch.tensor(firsts, dtype=torch.int32, device=self._device)
        heads = torch.arange(num_kv_heads, dtype=torch.int32, device=self._device)
        self._places = (self._firsts[:, None] + heads).flatten()
        self._own = torch.arange(self._dealt_of_block, device=self._device)
        self._own = self._own.view(len(layers), 1, num_kv_heads, 1)

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
        page_size = self.of_layers[0].shape[2]
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
        vectors = self.of_layers[0].view(-1, self.of_layers[0].shape[-1])
        keys_from = source * (2 * page_size) + position % page_size
        keys_to = target * (2 * page_size) + place % page_size
        entries = vectors.index_select(0, torch.cat([keys_from, keys_from + page_size]))
        vectors.index_copy_(0, torch.cat([keys_to, keys_to + page_size]), entries)
        return lengths


def kept_of_all(reader: Reader) -> list[Kept]:
    """What each layer keeps of one prompt, whose entries stay where they are."""
    kept: dict[int, Kept] = {}
    for layer in range(reader.num_layers):
        for finished, (chosen,) in reader.finish(layer).items():
            kept[finished] = chosen.kept
    return [kept[layer] for layer in range(reader.num_layers)]
