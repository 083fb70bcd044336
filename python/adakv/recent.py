"""The newest queries of texts, by which they are chosen from again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Recent(Protocol):
    """The newest queries of some texts."""

    def advance(self, num_new: Sequence[int], columns: int) -> None:
        """A step of so many columns comes, the last ``num_new[b]`` of them tokens of sequence b."""
        ...

    def put(self, layer: int, queries: Tensor) -> None:
        """The queries ``[B, Hq, S, D]`` of the step's columns."""
        ...

    def last(self, layer: int, count: int) -> Tensor:
        """The last ``count <= W``, ``[B, Hq, count, D]``, the oldest first."""
        ...


class RecentQueries(Recent):
    """The last W queries of each layer, in a ring ``[B, Hq, W, D]`` that steps write to.

    Before so many have come the others are 0, which look at all entries alike. ``given`` are those
    of each layer ``[B, Hq, W, D]``, the oldest first, if there are any.
    """

    def __init__(
        self, window: int, num_layers: int, given: Sequence[Tensor | None] | None = None
    ) -> None:
        self._window = window
        self._rings: list[Tensor | None] = [*given] if given else [None] * num_layers
        self._next = 0  # where the next query goes
        self._num_new: list[int] | None = None  # of the step, if some columns are padding

    def advance(self, num_new: Sequence[int], columns: int) -> None:
        self._num_new = list(num_new) if min(num_new) < columns else None
        self._next = (self._next + columns) % self._window

    def put(self, layer: int, queries: Tensor) -> None:
        batch, heads, columns, head_dim = queries.shape
        ring = self._rings[layer]
        if ring is None:
            ring = queries.new_zeros(batch, heads, self._window, head_dim)
            self._rings[layer] = ring
        if self._num_new is not None:
            self._put_some(ring, queries, self._num_new)
            return
        first = (self._next - columns) % self._window
        for begin in range(max(columns - self._window, 0), columns):
            ring[:, :, (first + begin) % self._window] = queries[:, :, begin]

    def _put_some(self, ring: Tensor, queries: Tensor, num_new: Sequence[int]) -> None:
        """The same where columns are padding: each sequence has other queries as its last ones."""
        both = torch.cat([ring.roll(queries.shape[2] - self._next, 2), queries], 2)
        for b, count in enumerate(num_new):
            padding = slice(self._window, both.shape[2] - count)
            tokens = torch.cat([both[b, :, : padding.start], both[b, :, padding.stop :]], 1)
            ring[b] = tokens[:, -self._window :].roll(self._next, 1)

    def of_branches(self, sources: Sequence[int]) -> RecentQueries:
        """Those of the sequences ``sources``, on their own."""
        branches = copy.copy(self)
        branches._rings = [None if ring is None else ring[list(sources)] for ring in self._rings]
        return branches

    def to(self, device: torch.device) -> RecentQueries:
        """The same on another device."""
        there = copy.copy(self)
        there._rings = [None if ring is None else ring.to(device) for ring in self._rings]
        return there

    def last(self, layer: int, count: int) -> Tensor:
        ring = self._rings[layer]
        assert ring is not None
        return ring.roll(-self._next, 2)[:, :, -count:]

    def all_layers(self) -> list[Tensor | None]:
        """The last W of each layer, the oldest first; None where none have come."""
        return [
            None if ring is None else self.last(layer, self._window)
            for layer, ring in enumerate(self._rings)
        ]
