"""Sparse reads: what the last steps looked at, page by page, and which pages a step lists by it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adakv.cache import KVCache
from adakv.devices import AnyCache
from adakv.entries import Held, HeldInputs
from adakv.ops import Layer
from adakv.page_bounds import PageBounds, with_pages
from adakv.policy.attention import attention as attended
from adakv.policy.predictor import AttentionPredictor
from adakv.policy.reads import Quest, Read
from adakv.step import Attention, PageReader


class PageHistory(PageReader):
    """The largest attention that an entry of each page got from each q head in the last steps, by
    which steps of one token choose what they read.

    The attention of a step is computed once more here, in plain torch and over copies of the keys
    that it reads. Where anything else has happened to the rows meanwhile the history begins anew.
    It takes ``Hq * H`` float32 numbers for each page of a row.

    Parameters
    ----------
    predictor : :class:`adakv.policy.AttentionPredictor`
    """

    def __init__(self, predictor: AttentionPredictor) -> None:
        self.predictor = predictor
        self._kv: KVCache | None = None  # that the history is of
        self._seen: list[int] = []  # tokens of its sequences then
        self._rings: dict[int, Tensor] = {}  # of each layer [B, Hkv, G, H, m], the oldest first
        self._steps = 0  # that the history is of
        self._num_pages = 0  # of the longest row of this step

    def forget(self) -> None:
        self._kv, self._rings, self._steps = None, {}, 0

    def begin_step(
        self, kv: KVCache, seen: Sequence[int], num_new: Sequence[int], columns: int
    ) -> None:
        if kv is not self._kv or list(seen) != self._seen or columns > 1 or min(num_new) < 1:
            self.forget()
        if columns == 1 and min(num_new) == 1:
            self._kv, self._seen = kv, [n + 1 for n in seen]
            self._num_pages = kv.row_pages_to_grow(num_new)
            self._steps += 1

    def reads_some(self, layer: int) -> bool:
        return self._kv is not None and layer >= self.predictor.full_layers

    def listed(
        self,
        layer: int,
        view: Layer,
        queries: Tensor,
        attention: Attention,
        num_new: Tensor | None,
    ) -> Layer:
        assert self._kv is not None
        page_size, length = view.pages.shape[2], self._num_pages
        history = self._history(layer, queries, view)  # [B, Hkv, G, H, m]
        behind = self._steps - 1 - self.predictor.history  # steps that were foretold before
        if behind < 0 or behind % self.predictor.every == self.predictor.every - 1:
            ends = -(-view.lengths // page_size)
            pages = torch.arange(length, device=ends.device).expand(*ends.shape, -1)
            pages = pages.where(pages < ends[..., None], length)
            read = view
        else:
            pages, counts = self.predictor.pages(history, view.lengths, page_size=page_size)
            read = with_pages(view, pages, counts, length)
        held = Held(read, pages.shape[2] * page_size, self._kv.dtype)
        inputs = HeldInputs(held, queries, 0, 1, attention=attention)
        most = attended(inputs, slice(None)).view(*history.shape[:3], -1, page_size).amax(-1)
        row = history.new_zeros(*history.shape[:3], length + 1)  # [B, Hkv, G, m + 1]
        row.scatter_(3, pages[:, :, None].expand_as(most), most)
        row = row[..., None, :length]
        self._rings[layer] = torch.cat([history, row], 3)[..., -self.predictor.history :, :]
        return read

    def _history(self, layer: int, queries: Tensor, view: Layer) -> Tensor:
        """The history of a layer, with as many pages as rows have now."""
        ring = self._rings.get(layer)
        if ring is None:
            batch, heads = view.lengths.shape
            group = queries.shape[1] // heads
            return queries.new_zeros(batch, heads, group, 0, self._num_pages, dtype=torch.float32)
        return F.pad(ring, (0, self._num_pages - ring.shape[4]))


def recorded_reader_of(read: Read, kv: AnyCache) -> PageBounds:
    """The same for steps that may be recorded in CUDA graphs.

    Raises ``ValueError`` for reads that aren't made for it, and for layers on several devices.
    """
    if not isinstance(read, Quest):
        kind = type(read).__name__
        raise ValueError(f"read must be a Quest where steps are recorded, got {kind}")
    if not isinstance(kv, KVCache):
        raise ValueError("read must be left out with layers on several devices")
    return PageBounds(read, is_recorded=True)


def reader_of(read: Read) -> PageReader:
    """What chooses for a cache by a read, and keeps what it chooses by."""
    if isinstance(read, AttentionPredictor):
        return PageHistory(read)
    assert isinstance(read, Quest)
    return PageBounds(read)
