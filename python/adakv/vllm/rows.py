"""Where the rows of an engine's requests lie in a group of layers.

What has to be known of a request is its boundary, the lengths that its rows had then, and where
what is kept has a gap among its blocks (see plan.py). Requests are known by their first block.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from adakv.ops import Kept, Layer
from adakv.vllm.page_memory import Pages
from adakv.vllm.pages import OwnPages, SharedPages
from adakv.vllm.plan import Plan
from adakv.vllm.steps import Batch, Tables, sent


class Rows:
    """Rows of requests, whole or compressed.

    Parameters
    ----------
    pages : one :class:`adakv.vllm.page_memory.Pages` for each layer
    num_kv_heads : int
    spans_layers : bool
        Whether rows have pages of all layers.
    has_gaps : bool
        Whether what is kept may have a gap among a request's blocks.
    """

    def __init__(
        self, pages: Sequence[Pages], num_kv_heads: int, *, spans_layers: bool, has_gaps: bool
    ) -> None:
        num_blocks, self.block_size = len(pages[0].entries) // num_kv_heads, pages[0].page_size
        self.num_layers, self.device = len(pages), pages[0].entries.device
        kind = SharedPages if spans_layers else OwnPages
        self.pages = kind(pages, num_kv_heads, is_dealt_again=has_gaps)
        self.num_dealt_among = None if spans_layers else num_kv_heads
        """Rows among which a layer's pages are dealt, None if it is the rows of all layers."""
        # By first block. A boundary of 0: the request is whole.
        self.boundaries = self.integers(num_blocks)
        self.lengths = self.integers(self.num_layers, num_blocks, num_kv_heads)
        self._gaps = self.integers(2, num_blocks) if has_gaps else None
        # Nothing here reads positions: one tensor takes what all layers write.
        self.positions = self.integers(len(self.pages.of_layers[0].entries), self.block_size)

    def integers(self, *shape: int) -> Tensor:
        """Zeros."""
        return torch.zeros(shape, dtype=torch.int32, device=self.device)

    def layers(self, tables: Tables, tails: Sequence[Tensor] | None = None) -> list[Layer]:
        """What ``attend`` takes of some rows, in each layer; of int4 with their tails."""
        of_layers = [None] * self.num_layers if tails is None else tails
        layers = zip(self.pages.of_layers, of_layers, *tables, strict=True)
        return [
            pages.layer(self.positions, *of_layer, tails=tail) for pages, tail, *of_layer in layers
        ]

    def compressed(
        self, first_block: int, blocks: Tensor, boundary: int, lengths: Tensor, planned: Plan
    ) -> None:
        """The prompt of a request with ``blocks`` ``[M]`` is compressed, and its rows have
        ``lengths`` ``[L, Hkv]``."""
        self.lengths[:, first_block] = lengths
        self.boundaries[first_block] = boundary
        if self._gaps is not None:
            self._gaps[0, first_block] = planned.kept_blocks
            self._gaps[1, first_block] = planned.tail - planned.kept_blocks
            self.pages.deal_in_order(blocks[: planned.kept_blocks])

    def begin_text(self, first_block: int, boundary: int) -> Tensor:
        """``[L, Hkv]``: the lengths of a request's rows at the end of its prompt. It has a gap if
        it is compressed by now, and will never have one otherwise."""
        assert self._gaps is not None
        is_whole = self.boundaries[first_block] == 0
        self._gaps[:, first_block] *= ~is_whole
        return self.lengths[:, first_block].where(~is_whole, boundary)

    def choose(
        self,
        kept: Sequence[Kept],
        most: int,
        tables: Tables,
        blocks: Tensor,
        into: Sequence[Sequence[int]],
        boundaries: Sequence[int],
    ) -> Tensor:
        """Some of what requests' rows hold stays, in some of their blocks; ``[L, B, Hkv]`` lengths.

        Parameters
        ----------
        kept, most
            As :meth:`OwnPages.compact_in_place` takes them.
        tables : :class:`Tables`
            Of the requests' rows; changed.
        blocks : ``[B, M]``
            Theirs.
        into : ints
            Which of them, by number, in ascending order.
        boundaries : ints ``[B]``
            How many tokens of each have been written.
        """
        assert self._gaps is not None
        first_blocks = blocks[:, 0].long()
        # compact() also wants pages for rows to go on in: the engine's block 0, which nobody has,
        # though rows go on in others.
        columns = [[*numbers, blocks.shape[1]] for numbers in into]
        row = [b for b, numbers in enumerate(columns) for _ in numbers]
        column = [number for numbers in columns for number in numbers]
        found = F.pad(blocks, (0, 1))[tuple(sent([row, column], self.device))]
        page_ids = self.pages.of_blocks(found)
        per_block = len(page_ids) // len(found)
        starts = [0, *accumulate(per_block * len(numbers) for numbers in columns)]
        page_indptr = sent(starts, self.device).int()
        given = self.positions, tables, page_ids, page_indptr
        lengths, table, *_ = self.pages.compact_in_place(kept, most, *given)
        self.pages.remember(blocks, table, self._num_pages(lengths), self._gaps[:, first_blocks])
        self.lengths[:, first_blocks] = lengths
        self.boundaries[first_blocks] = sent(list(boundaries), self.device).int()
        return lengths

    def tables(
        self, batch: Batch, rows: slice | Tensor, new_tokens: int
    ) -> tuple[Tables, Tensor | None]:
        """Where the rows of some requests lie that have equally many new tokens, and how many of
        these are no padding."""
        blocks, seq_lens = batch.block_table[rows], batch.seq_lens[rows].int()
        first_blocks = blocks[:, 0].long()
        boundaries = self.boundaries[first_blocks]  # [B]
        num_new = None if batch.num_new is None else batch.num_new[rows]
        seen = seq_lens - (new_tokens if num_new is None else num_new)
        # [L, B, Hkv]: kept entries, and pages they take
        kept = self.lengths[:, first_blocks] * (boundaries > 0)[:, None]
        kept_pages = self._num_pages(kept)
        lengths = kept + (seen - boundaries)[:, None]
        width = max(1, -(-batch.max_seq_len // self.block_size))
        tails = boundaries // self.block_size
        gaps = None if self._gaps is None else self._gaps[:, first_blocks]
        table = self.pages.tables(blocks, tails, kept_pages, width, gaps)
        fresh = max(1, -(-new_tokens // self.block_size))
        columns = self._num_pages(lengths)[..., None] + torch.arange(fresh, device=self.device)
        fresh_pages = table.gather(-1, columns.clamp(max=width - 1).long())
        seen = seen.expand(self.num_layers, -1).contiguous()
        return Tables(lengths, table, fresh_pages, seen), num_new

    def _num_pages(self, lengths: Tensor) -> Tensor:
        """That rows take."""
        return (lengths + (self.block_size - 1)) // self.block_size
