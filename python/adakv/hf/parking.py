"""Sequences that wait in other memory until there are pages for them.

With a place to park, a batch promises a prompt the pages of its first tokens only, instead of all
that it may write. When texts outgrow that and the pages don't suffice for all, those that came last
wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from adakv.cache import KVCache
from adakv.formats import device_of
from adakv.hf.pool_size import Need
from adakv.hf.slots import Decoder, Slot
from adakv.moving import move_into, moved
from adakv.shape import Shape

#: Tokens that a prompt has pages for when it is read.
FIRST_ROOM = 128


class Parked(NamedTuple):
    """A sequence that waits."""

    pages: KVCache  # that hold what it did
    slot: Slot  # what a step reads and writes of it

    @classmethod
    def take(cls, decoder: Decoder, slot: int, place: torch.device) -> Parked:
        """Takes a sequence out of its slot, whose pages are free then."""
        assert isinstance(decoder.kv, KVCache)  # check_parks refuses others
        pages = moved(decoder.kv, place, 0, slice(slot, slot + 1))
        return cls(pages, decoder.take_out(slot))

    def put_back(self, decoder: Decoder, slot: int) -> None:
        """Puts it into an empty slot."""
        assert isinstance(decoder.kv, KVCache)
        move_into(decoder.kv, slot, self.pages)
        decoder.put_back(slot, self.slot)


def place_for(park: str | torch.device | None) -> torch.device | None:
    """Where sequences wait. Raises ``ValueError`` for what is no device."""
    try:
        return None if park is None else device_of(park)
    except ValueError:
        raise ValueError(f"park must be cpu or cuda, got {park!r}") from None


def check_parks(prefix: Any, rule: Any, groups: Any) -> None:
    """Raises ``ValueError`` for what parking doesn't go with."""
    for given, what in (
        (prefix, "prefix: its pages are shared"),
        (rule, "decode_budget: its texts have all their pages from the beginning"),
        (groups, "a model whose layers lie on several devices"),
    ):
        if given:
            raise ValueError(f"options.park must not be given with {what}")


def with_return(
    need_of: Callable[[int, int], Need], shape: Shape, prompt_len: int, new: int
) -> Need:
    """What a sequence takes that may have waited: its rows then begin their pages elsewhere, which
    costs each of them one at most."""
    need = need_of(prompt_len, new)
    return replace(need, pages=need.pages + shape.num_layers * shape.num_kv_heads)
