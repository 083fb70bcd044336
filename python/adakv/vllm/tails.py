"""The newest entries of rows in blocks of int4, which stay in 16 bits until their page is full; see
docs/bits.md.

A block has room for codes only, so these entries lie in memory of the worker's own: each request
that the engine may run has a place there. ``attend`` wants the places of the requests that it works
on side by side, so a request moves when a step has it elsewhere among the others than the step
before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adakv.errors import Error
from adakv.vllm.page_memory import Pages
from adakv.vllm.steps import sent


class Tails:
    """Tails of a group of layers.

    Parameters
    ----------
    num_places : int
        Requests that the engine runs at most.
    pages : one :class:`adakv.vllm.page_memory.Pages` for each layer
    num_kv_heads : int
    """

    def __init__(self, num_places: int, pages: Sequence[Pages], num_kv_heads: int) -> None:
        like = pages[0]
        self._memory = torch.zeros(
            (num_places, len(pages), num_kv_heads, 2 * like.page_size, like.head_dim),
            dtype=like.dtype,
            device=like.entries.device,
        )
        self._requests: list[int | None] = [None] * num_places  # by place

    def layers(self, places: slice) -> list[Tensor]:
        """``[L]`` times ``[n, Hkv, 2 P, D]``, views: the tails of n requests."""
        return list(self._memory[places].unbind(1))

    def joined(self, place: slice) -> Tensor:
        """``[1, L * Hkv, 2 P, D]``, a view: those of one request, of all layers."""
        return self._memory[place].flatten(1, 2)

    def place(self, request: int) -> slice:
        """Where a request of this step, or of the one before, has its tails."""
        place = self._requests.index(request)
        return slice(place, place + 1)

    def arrange(self, requests: Sequence[int], is_gone: Callable[[int], bool]) -> None:
        """Puts the tails of a step's requests, those that it begins with among them, side by side
        from the first place on.

        Parameters
        ----------
        requests : ints
            By which requests are known from their first step to their last.
        is_gone : callable
            Whether the engine has no longer a request that isn't in this step.

        Raises
        ------
        adakv.Error
            If there are more requests than places.
        """
        before, count = self._requests, len(requests)
        if before[:count] == list(requests):
            return
        if count > len(before):
            raise Error(f"the engine runs more than {len(before)} requests at once, got {count}")
        in_step = set(requests)
        gone = {x for x in before if x is None or x in in_step or is_gone(x)}
        stay = [None if x in gone else x for x in before]
        free = (place for place in range(count, len(before)) if stay[place] is None)
        after: list[int | None] = [*requests, *stay[count:]]
        for request in stay[:count]:
            if request is not None:
                place = next(free, -1)
                if place < 0:
                    raise Error(f"the engine runs more than {len(before)} requests at once")
                after[place] = request
        found = {request: place for place, request in enumerate(before) if request is not None}
        moves = [
            (found[request], place)
            for place, request in enumerate(after)
            if request is not None and found.get(request, place) != place
        ]
        if moves:
            source, target = sent([*zip(*moves, strict=True)], self._memory.device)
            self._memory.index_copy_(0, target, self._memory.index_select(0, source))
        self._requests = after
