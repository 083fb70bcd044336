"""What all prompts of a batch begin with: read once, chosen from at its end, and shared.

It lies in the last slot of the batch's cache. A prompt goes into its own slot as a branch of it,
and is read behind it as a second turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from adakv.cache import KVCache
from adakv.devices import AnyCache, Group
from adakv.hf.attachment import CACHE
from adakv.hf.pool_size import Need
from adakv.policy import Protection
from adakv.reselection import Rule

if TYPE_CHECKING:
    from adakv.hf.cache import Cache


class Prefix(NamedTuple):
    """Tokens that all prompts begin with.

    Parameters
    ----------
    ids : ``[T]`` int64
    protection : :class:`adakv.policy.Protection`
        What must stay of them.
    need : :class:`adakv.hf.pool_size.Need`
        What is kept of them takes these pages.
    """

    ids: Tensor
    protection: Protection
    need: Need

    def read(self, model: Any, reader: Cache, kv: AnyCache) -> None:
        """Has the model read them into the last slot of ``kv``."""
        reader.protection = self.protection
        reader.fill(kv, kv.num_sequences - 1)
        ids = self.ids[None].to(kv.device)
        model(ids, use_cache=True, logits_to_keep=1, **{CACHE: reader})

    def branch(self, reader: Cache, kv: AnyCache, slot: int) -> int:
        """Empties the reader, which goes on behind them in a slot of ``kv``. How many they are."""
        assert isinstance(kv, KVCache)  # check_shared refuses others
        kv.fork_into(slot, [kv.num_sequences - 1])
        reader.reset()
        seen = len(self.ids)
        reader.go_on_from(kv, [seen], [seen], seen, first_sequence=slot)
        return seen


def check_shared(prefix: Any, rule: Rule | None, groups: Sequence[Group]) -> None:
    """Raises ``ValueError`` for what a ``prefix`` doesn't go with."""
    if prefix is not None and rule is not None:
        raise ValueError(
            "decode_budget must not be given with prefix: texts that share pages are not evicted "
            "from; give each prompt as a whole"
        )
    if prefix is not None and groups:
        raise ValueError(
            "prefix: the model lies on several devices, whose pages can't be shared yet; give each "
            "prompt as a whole"
        )
