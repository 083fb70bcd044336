"""Prompts read by FlashAttention, from an engine's pages as they are; without a line of vLLM.

A request that is still whole has the same blocks for all kv heads. So its pages ``[2, P, D]``, page
``block * Hkv + h`` for head h, are also what FlashAttention's paged kernels read, by strides::

    pages [N, 2, P, D]  ->  [blocks, Hkv, 2, P, D]  ->  keys, values [blocks, P, Hkv, D]

Nothing is copied, and it is as fast as from blocks of its own layout. Pages of codes it can't read:
then it reads copies of a layer's pages, dequantised, once the new entries are in theirs; of int4
with what lies in tails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from adakv.ops import Layer, append
from adakv.step import Attention
from adakv.vllm.page_memory import Pages
from adakv.vllm.steps import Batch, Run, sent


class ReadKernel(Protocol):
    """``vllm.vllm_flash_attn.flash_attn_varlen_func``, as far as it is used."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        out: Tensor | None,
        cu_seqlens_q: Tensor,
        max_seqlen_q: int,
        seqused_k: Tensor,
        max_seqlen_k: int,
        block_table: Tensor,
        causal: bool,
        softmax_scale: float | None,
        softcap: float,
        s_aux: Tensor | None,
        return_softmax_lse: bool,
        fa_version: int,
    ) -> Tensor | tuple[Tensor, Tensor]: ...


class WriteKernel(Protocol):
    """Writes new keys and values ``[n, Hkv, D]`` to slots ``[n]`` of ``[blocks, P, Hkv, D]``."""

    def __call__(
        self, keys: Tensor, values: Tensor, into_keys: Tensor, into_values: Tensor, slots: Tensor
    ) -> None: ...


def write_by_torch(
    keys: Tensor, values: Tensor, into_keys: Tensor, into_values: Tensor, slots: Tensor
) -> None:
    """A :class:`WriteKernel`."""
    block_size = into_keys.shape[1]
    where = slots // block_size, slots % block_size
    into_keys[where], into_values[where] = keys, values


class Appended(NamedTuple):
    """Requests of a step that have the same number of new tokens, which are only appended."""

    run: Run
    layers: Sequence[Layer]
    partly: tuple[Tensor, Tensor] | None = None  # of int4: see of_copies

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Those of a layer; ``keys`` and ``values`` ``[tokens, Hkv, D]`` are of the whole step."""
        k, v = (
            x[self.run.tokens].unflatten(0, (-1, self.run.new_tokens)).transpose(1, 2)
            for x in (keys, values)
        )
        append(k, v, self.layers[layer])

    def of_copies(self, last_pages: Mapping[int, int], num_kv_heads: int) -> Appended:
        """Knows where pages that are not full are among copies ``[n, 2, P, D]``: by row of the
        batch, the first one of those of its last block."""
        found = [
            (i, last_pages[row]) for i, row in enumerate(self.run.numbers) if row in last_pages
        ]
        if not found or self.layers[0].tails is None:
            return self
        device = self.layers[0].lengths.device
        numbers, firsts = sent([*zip(*found, strict=True)], device)
        heads = torch.arange(num_kv_heads, device=device)
        return self._replace(partly=(numbers, (firsts[:, None] + heads).flatten()))

    def lay_over(self, layer: int, copies: Tensor) -> None:
        """Writes what lies in the rows' tails into those pages."""
        tails = self.layers[layer].tails
        if self.partly is not None and tails is not None:
            numbers, into = self.partly
            copies[into] = tails[numbers].flatten(0, 1).unflatten(1, (2, -1))


class Whole(NamedTuple):
    """Requests of a step that are still whole and read their prompts, side by side."""

    tokens: slice | Tensor  # of the step
    starts: Tensor  # [n + 1] int32, where the tokens of each begin among these
    seq_lens: Tensor  # [n] int32, the new tokens included
    block_table: Tensor  # [n, M] int32
    slots: Tensor  # [tokens], where the new entries go: block * P + place in it
    longest: int  # new tokens
    max_seq_len: int
    of_row: dict[int, slice]  # by row of the batch: its tokens among these
    copied: Tensor | None = None  # [pages], which pages are copied, where block_table is of copies
    appended: Sequence[Appended] = ()  # then the same requests, again

    def of_copies(
        self,
        batch: Batch,
        rows: Sequence[int],
        appended: Sequence[Appended],
        page_size: int,
        num_kv_heads: int,
    ) -> Whole:
        """The same for copies of the pages that hold the requests' tokens."""
        start, computed = batch.query_start, batch.computed
        lengths = [computed[row] + start[row + 1] - start[row] for row in rows]
        counts = [-(-length // page_size) for length in lengths]
        blocks = [row[:count] for row, count in zip(self.block_table, counts, strict=True)]
        device = self.block_table.device
        heads = torch.arange(num_kv_heads, device=device)
        page_ids = torch.cat(blocks).long()[:, None] * num_kv_heads + heads
        firsts = torch.tensor([0, *counts]).cumsum(0)
        ends = zip(rows, lengths, (firsts[1:] - 1).tolist(), strict=True)
        last_pages = {row: end * num_kv_heads for row, length, end in ends if length % page_size}
        table = (firsts[:-1, None] + torch.arange(max(counts))).clamp(max=int(firsts[-1]) - 1)
        return self._replace(
            block_table=sent(table.tolist(), device).int(),
            copied=page_ids.flatten(),
            appended=[x.of_copies(last_pages, num_kv_heads) for x in appended],
        )


def whole(batch: Batch, rows: Sequence[int]) -> Whole:
    """These requests of a step; the host doesn't wait for anything."""
    start, device = batch.query_start, batch.block_table.device
    counts = [start[row + 1] - start[row] for row in rows]
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    first, last = rows[0], rows[-1]
    tokens: slice | Tensor
    if last - first + 1 == len(rows):
        tokens, chosen = slice(start[first], start[last + 1]), slice(first, last + 1)
        block_table, seq_lens = batch.block_table[chosen], batch.seq_lens[chosen]
    else:
        indices = [i for row in rows for i in range(start[row], start[row + 1])]
        tokens, picked = sent(indices, device), sent(list(rows), device)
        block_table, seq_lens = batch.block_table[picked], batch.seq_lens[picked]
    assert batch.slots is not None
    return Whole(
        tokens,
        sent(ends, device).int(),
        seq_lens.int(),
        block_table,
        batch.slots[tokens],
        max(counts),
        batch.max_seq_len,
        {row: slice(a, b) for row, (a, b) in zip(rows, pairwise(ends), strict=True)},
    )


@dataclass(frozen=True)
class FlashAttention:
    """How prompts are read.

    Parameters
    ----------
    read : :class:`ReadKernel`
    write : :class:`WriteKernel`
    version : int
        Of FlashAttention.
    """

    read: ReadKernel
    write: WriteKernel
    version: int = 3

    def append(
        self, layer: int, whole: Whole, pages: Pages, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Appends the requests' new tokens in one layer.

        Parameters
        ----------
        layer : int
        whole : :class:`Whole`
        pages : :class:`adakv.vllm.page_memory.Pages`
        keys, values : ``[tokens, Hkv, D]``
            Of the whole step.

        Returns
        -------
        pages : ``[N, 2, P, D]``
            Those that ``whole.block_table`` counts in.
        """
        if whole.copied is not None:
            for group in whole.appended:
                group.append(layer, keys, values)
            copies = pages.read(whole.copied)
            for group in whole.appended:
                group.lay_over(layer, copies)
            return copies
        into = blocks_of(pages.entries, keys.shape[1])
        self.write(keys[whole.tokens], values[whole.tokens], *into, whole.slots)
        return pages.entries

    def attend(
        self,
        whole: Whole,
        pages: Tensor,
        num_kv_heads: int,
        queries: Tensor,
        out: Tensor,
        attention: Attention,
        *,
        wants_lse: bool,
    ) -> Tensor | None:
        """Attends to the requests' tokens in one layer, the new ones included.

        Parameters
        ----------
        whole : :class:`Whole`
        pages : ``[N, 2, P, D]``
        num_kv_heads : int
        queries, out : ``[tokens, Hq, D]``
            Of the whole step; only these requests' are read and written.
        attention : :class:`adakv.step.Attention`
        wants_lse : bool

        Returns
        -------
        lse : ``[Hq, n]`` float32, or None
            Log-sum-exp of the logits of these requests' new tokens.
        """
        all_keys, all_values = blocks_of(pages, num_kv_heads)
        sinks = attention.sink_logits
        in_place = isinstance(whole.tokens, slice)
        result = self.read(
            queries[whole.tokens],
            all_keys,
            all_values,
            out=out[whole.tokens] if in_place else None,
            cu_seqlens_q=whole.starts,
            max_seqlen_q=whole.longest,
            seqused_k=whole.seq_lens,
            max_seqlen_k=whole.max_seq_len,
            block_table=whole.block_table,
            causal=True,
            softmax_scale=attention.scale,
            softcap=attention.softcap or 0.0,
            s_aux=None if sinks is None else sinks.to(queries.dtype),
            return_softmax_lse=wants_lse,
            fa_version=self.version,
        )
        attended, lse = result if isinstance(result, tuple) else (result, None)
        if not in_place:
            out[whole.tokens] = attended
        return lse


def blocks_of(pages: Tensor, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[blocks, P, Hkv, D]`` of pages ``[N, 2, P, D]``: views."""
    blocks = pages.unflatten(0, (-1, num_kv_heads))
    return blocks[:, :, 0].transpose(1, 2), blocks[:, :, 1].transpose(1, 2)
