"""What was chosen of prompts goes into the pages of a cache, or of each of its tiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from adakv.cache import KVCache, sequences
from adakv.devices import AnyCache, SplitCache
from adakv.entries import Reserve, Whole
from adakv.ops import Kept
from adakv.policy import Policy
from adakv.tiers import TieredCache


class Chosen(NamedTuple):
    """What is kept of some of the prompts, all of one length, in a layer."""

    prompts: slice
    kept: Kept
    entries: Whole | Reserve


class Compaction:
    """Layers on their way into pages, which are taken at once.

    Parameters
    ----------
    kv : :class:`adakv.cache.KVCache`, or what has the same names
    policy : :class:`adakv.policy.Policy`
        That chose.
    layers : ints
        One, or those that were chosen together.
    totals : ints ``[len(layers)][B]``
        As :meth:`adakv.cache.KVCache.begin_layers` takes them.
    lengths : ints ``[B]``
        Tokens of the prompts.
    first_sequence : int
        The sequence of the first prompt.
    """

    def __init__(
        self,
        kv: AnyCache,
        policy: Policy,
        layers: Sequence[int],
        totals: Sequence[Sequence[int]],
        lengths: Sequence[int],
        *,
        first_sequence: int = 0,
    ) -> None:
        self._kv, self._policy, self._num_prompts = kv, policy, len(lengths)
        self._slots = slice(first_sequence, first_sequence + len(lengths))
        self._caches: Sequence[KVCache | SplitCache]
        of_caches: Sequence[Sequence[Sequence[int]]]
        if isinstance(kv, TieredCache):
            self._caches = kv.caches
            model_wide, window = policy.is_model_wide, policy.window
            of_caches = kv.tiers.totals(totals, kv.num_kv_heads, window, model_wide=model_wide)
        else:
            self._caches, of_caches = (kv,), (totals,)
        self._pages = [
            cache.begin_layers(layers, of_cache, lengths, first_sequence=first_sequence)
            for cache, of_cache in zip(self._caches, of_caches, strict=True)
        ]

    def compact(self, layer: int, chosen: Sequence[Chosen], *, is_last: bool) -> None:
        """Moves what is kept in a layer; they come in order."""
        tiers = self._tiers(chosen)
        for cache, (page_ids, next_page), groups in zip(
            self._caches, self._pages, tiers, strict=True
        ):
            view = cache.layers[layer]
            if self._num_prompts < cache.num_sequences:
                view = sequences(view, self._slots)
            for prompts, kept, entries in groups:
                starts = next_page[prompts.start : prompts.stop + 1]
                rows = view if len(chosen) == 1 else sequences(view, prompts)
                entries.compact(kept, rows, page_ids, starts)
            if not is_last and isinstance(cache, KVCache):
                cache.advance_pages(next_page, view.lengths)

    def _tiers(self, chosen: Sequence[Chosen]) -> list[list[Chosen]]:
        """What each cache has of a layer's choice."""
        if not isinstance(self._kv, TieredCache):
            return [list(chosen)]
        groups = []
        for prompts, kept, entries in chosen:
            scores = entries.pinned(self._policy)
            window = min(self._policy.window, scores.shape[2])
            parts = self._kv.tiers.split(kept, scores, window)
            groups.append([Chosen(prompts, part, entries) for part in parts])
        return [list(of_tier) for of_tier in zip(*groups, strict=True)]
