"""What all prompts of a batch begin with: read once, chosen from at its end, and shared.

It lies in the last slot of the batch's cache. A prompt goes into its own slot as a branch of it,
and is read behind it as a second turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adakv.cache import KVCache
from adakv.devices import AnyCache, Group
from adakv.hf.pool_size import Need
from adakv.hf.prompts import Requests, read
from adakv.reselection import Rule

if TYPE_CHECKING:
    from adakv.hf.cache import Cache


@dataclass
class Prefix:
    """Tokens that all prompts begin with.

    Parameters
    ----------
    requests : :class:`adakv.hf.prompts.Requests`
        With the prefix, and what must stay of it.
    need : :class:`adakv.hf.pool_size.Need`
        What is kept of it takes these pages.
    """

    requests: Requests
    need: Need
    end: int = 0  #: the position of what comes behind it, once it is read

    def read(self, model: Any, reader: Cache, kv: AnyCache) -> None:
        """Has the model read it into the last slot of ``kv``."""
        (ids,), given = self.requests.chosen_from, self.requests
        reader.protection, reader.classes = given.protection, given.classes
        reader.fill(kv, kv.num_sequences - 1)
        _, self.end = read(model, ids, given.prefix_inputs, reader)

    def branch(self, reader: Cache, kv: AnyCache, slot: int) -> int:
        """Empties the reader, which goes on behind it in a slot of ``kv``; from which position."""
        assert isinstance(kv, KVCache)  # check_shared refuses others
        kv.fork_into(slot, [kv.num_sequences - 1])
        reader.reset()
        (seen,) = map(len, self.requests.chosen_from)
        reader.go_on_from(kv, [seen], [seen], seen, first_sequence=slot)
        return self.end


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
