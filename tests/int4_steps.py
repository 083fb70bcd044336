"""Requests of an engine whose blocks hold int4, played as in engine_steps.py: what their rows hold
depends on when entries were written, so it is written down step by step."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

import codes
from engine_steps import HEADS, LAYERS, Request, Steps

PAGE = 32


class Row:
    """What a row holds: pages that are full as codes, the rest as it was written."""

    def __init__(self, like: Tensor) -> None:
        self._full = torch.empty(2, 0, like.shape[-1], device=like.device)
        self._tail = like.new_empty(2, 0, like.shape[-1])
        self.end = 0  # tokens that it was given

    def append(self, entries: Tensor, *, is_read_first: bool = False) -> None:
        """Keys and values ``[2, n, D]``. One that is read before it is quantised is so later, by
        :meth:`quantise`."""
        self.quantise()
        self._tail = torch.cat([self._tail, entries], 1)
        self.end += entries.shape[1]
        if not is_read_first:
            self.quantise()

    def quantise(self) -> None:
        """Pages that are full become codes."""
        while self._tail.shape[1] >= PAGE:
            page = codes.quantise_page(*self._tail[:, :PAGE])
            stands_for = codes.dequantise_page(*page, torch.float32)
            self._full = torch.cat([self._full, stands_for], 1)
            self._tail = self._tail[:, PAGE:]

    def held(self, dtype: torch.dtype) -> Tensor:
        """Keys and values ``[2, n, D]``."""
        return torch.cat([self._full.to(dtype), self._tail.to(dtype)], 1)


class Int4Steps(Steps):
    """Steps over blocks of int4."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, kv_dtype="int4", **options)  # type: ignore[arg-type]
        self.rows: dict[Request, list[list[Row]]] = {}

    def inputs(self, layer: int, counts: list[int]) -> list[Tensor]:
        """Also notes what a layer appends."""
        for request, count in zip(self.requests, counts, strict=True):
            rows = self._rows_of(request)[layer]
            by_flash = self.flash and request.computed < request.prompt
            for head, row in enumerate(rows):
                if row.end == request.computed:  # not asked before in this step
                    new = self._new(request, layer, head, row.end, row.end + count)
                    row.append(new, is_read_first=count == 1 and not by_flash)
        return super().inputs(layer, counts)

    def advance(self, counts: list[int]) -> None:
        super().advance(counts)
        for request in self.requests:
            for row in chain(*self._rows_of(request)):
                row.quantise()

    def preempt(self, request: Request) -> None:
        super().preempt(request)
        self.rows.pop(request, None)

    def _rows_of(self, request: Request) -> list[list[Row]]:
        if request not in self.rows:
            like = request.new_keys
            self.rows[request] = [[Row(like) for _ in range(HEADS)] for _ in range(LAYERS)]
        return self.rows[request]

    def _new(self, request: Request, layer: int, head: int, begin: int, end: int) -> Tensor:
        """``[2, n, D]``"""
        both = request.new_keys, request.new_values
        return torch.stack([x[layer, begin:end, head] for x in both])

    def _held(self, x: Tensor) -> Tensor:
        return x.float()

    def _fill(self, request: Request, count: int) -> None:
        for layer, pages in enumerate(self.cache.pages):
            for head, row in enumerate(self._rows_of(request)[layer]):
                row.append(self._new(request, layer, head, 0, count))
                for number, block in enumerate(request.blocks):
                    begin = number * PAGE
                    entries = self._new(request, layer, head, begin, begin + PAGE)
                    page = codes.quantise_page(*entries)
                    for into, x in zip(pages, page, strict=True):
                        into[block * HEADS + head] = x

    def _kept(self, request: Request) -> list[list[Tensor]]:
        """What is kept of what rows hold, which is then quantised anew."""
        n, rows = request.boundary, self._rows_of(request)
        held = [[row.held(self.dtype) for row in of_layer] for of_layer in rows]
        for layer, of_layer in enumerate(held):
            for head, (keys, values) in enumerate(of_layer):
                request.keys[layer, :n, head] = keys[:n].float()
                request.values[layer, :n, head] = values[:n].float()
        kept = super()._kept(request)
        self.rows.pop(request)
        for layer, of_layer in enumerate(self._rows_of(request)):
            for head, row in enumerate(of_layer):
                row.append(held[layer][head][:, kept[layer][head]])
                row.append(held[layer][head][:, n:])
                row.end = held[layer][head].shape[1]
        return kept

    def _row(
        self, request: Request, layer: int, head: int, end: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        kept = len(request.kept[layer][head]) - request.boundary if request.kept else 0
        keys, values = self._rows_of(request)[layer][head].held(dtype)[:, : kept + end]
        return keys, values
