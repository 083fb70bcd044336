"""Where the rows of an engine's requests lie in a group of layers.

What has to be known of a request is its boundary, the lengths that its rows had then, and where
what is kept has a gap among its blocks (see plan.py). Requests are known by their first block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adakv.ops import Kept, Layer
from adakv.vllm.pages import OwnPages, Pages, SharedPages
from adakv.vllm.plan import Plan
from adakv.vllm.steps import Batch, Tables


class Rows:
    """Rows of requests, whole or compressed.

    Parameters
    ----------
    pages : one :class:`adakv.vllm.pages.Pages` for each layer
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
        self.pages = kind(pages, num_kv_heads)
        # By first block. A boundary of 0: the request is whole.
        self.boundaries = self.integers(num_blocks)
        self.lengths = self.integers(self.num_layers, num_blocks, num_kv_heads)
        self._gaps = self.integers(2, num_blocks) if has_gaps else None
        # Nothing here reads positions: one tensor takes what all layers write.
        self.positions = self.integers(len(self.pages.of_layers[0].entries), self.block_size)

    def integers(self, *shape: int) -> Tensor:
        """Zeros."""
        return torch.zeros(shape, dtype=torch.int32, device=self.device)

    def layers(self, tables: Tables) -> list[Layer]:
        """What ``attend`` takes of some rows, in each layer."""
        layers = zip(self.pages.of_layers, *tables, strict=True)
        return [pages.layer(self.positions, *of_layer) for pages, *of_layer in layers]

    def compressed(self, first_block: int, boundary: int, lengths: Tensor, planned: Plan) -> None:
        """A request's prompt is compressed, and its rows have ``lengths`` ``[L, Hkv]``."""
        self.lengths[:, first_block] = lengths
        self.boundaries[first_block] = boundary
        if self._gaps is not None:
            self._gaps[0, first_block] = planned.kept_blocks
            self._gaps[1, first_block] = planned.tail - planned.kept_blocks

    def begin_text(self, first_block: int, boundary: int) -> Tensor:
        """``[L, Hkv]``: the lengths of a request's rows at the end of its prompt. It has a gap if
        it is compressed by now, and will never have one otherwise."""
        assert self._gaps is not None
        is_whole = self.boundaries[first_block] == 0
        self._gaps[:, first_block] *= ~is_whole
        return self.lengths[:, first_block].where(~is_whole, boundary)

    def deal_again(
        self,
        first_block: int,
        boundary: int,
        blocks: Tensor,
        block_table: Tensor,
        kept: Sequence[Kept],
        totals: Sequence[int],
    ) -> Tensor:
        """Moves some of what a request's rows hold to its first blocks; ``[L, Hkv]`` lengths.

        Parameters
        ----------
        first_block, boundary : int
            ``boundary`` tokens have been written.
        blocks : ``[1, M]``
            The request's.
        block_table : ``[L, 1, Hkv, M]``
            Pages of its rows.
        kept, totals
            As :meth:`OwnPages.move` takes them.
        """
        assert self._gaps is not None
        lengths = torch.stack([x.indptr.diff() for x in kept])
        kept_pages = (lengths + (self.block_size - 1)) // self.block_size
        width, gaps = block_table.shape[-1], self._gaps[:, first_block, None]
        after = self.pages.tables(blocks, self.integers(1), kept_pages[:, None], width, gaps)
        self.pages.move(kept, block_table[:, 0], after[:, 0], totals)
        self.lengths[:, first_block] = lengths
        self.boundaries[first_block] = boundary
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
        kept_pages = (kept + (self.block_size - 1)) // self.block_size
        lengths = kept + (seen - boundaries)[:, None]
        width = max(1, -(-batch.max_seq_len // self.block_size))
        tails = boundaries // self.block_size
        gaps = None if self._gaps is None else self._gaps[:, first_blocks]
        table = self.pages.tables(blocks, tails, kept_pages, width, gaps)
        fresh = max(1, -(-new_tokens // self.block_size))
        used = (lengths + (self.block_size - 1)) // self.block_size
        columns = used[..., None] + torch.arange(fresh, device=self.device)
        fresh_pages = table.gather(-1, columns.clamp(max=width - 1).long())
        seen = seen.expand(self.num_layers, -1).contiguous()
        return Tables(lengths, table, fresh_pages, seen), num_new
