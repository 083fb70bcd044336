"""Branches of what a cache holds: copies, beams, tokens that are taken back.

All are forks of its pages (:meth:`adakv.cache.KVCache.fork`): what branches have in common is
stored once, and a page that one of them may write to is its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import Cache as TransformersCache

from adakv.cache import KVCache
from adakv.devices import SplitCache
from adakv.errors import Error, integer
from adakv.formats import device_of
from adakv.hf import hidden, hybrid, long_rope, pool_size
from adakv.hf.layers import FullAttentionLayer
from adakv.hf.looking import reader_of
from adakv.hf.notices import Notices
from adakv.hf.repetition import Repetition
from adakv.moving import moved, moved_tiers
from adakv.policy import Budget
from adakv.tiered_cache import TieredCache

Self = TypeVar("Self", bound="BranchingCache")

_Kv = TypeVar("_Kv", KVCache, TieredCache)

#: What a layer of ours has of its own; all else are states that transformers keeps in it.
_OWN = {"index", "num_seen", "attention", "_cache", "_config", "_is_last", "_rotate"}


class BranchingCache(TransformersCache):
    """What transformers asks of caches beside keys and values, for :class:`adakv.Cache`."""

    def fork(self: Self, count: int = 1) -> list[Self]:
        """So many copies, each of which goes on by itself.

        They share the pages of what this cache holds, which stays as it is; each takes memory for
        its last pages and for what it adds. One thread at a time may use a cache and its forks.

        Raises
        ------
        ValueError
            If ``count`` is no number of copies.
        adakv.Error
            If a forward was stopped midway, a prompt is still being read, or there is no memory.
        """
        cache: Any = self
        count = integer("count", count, 1)
        check_branches(cache, "fork")
        if cache._kv is not None:
            sources = list(range(len(cache._seen)))
            pool_size.make_room_to_fork(cache._kv, sources * count)
        return [_copied(cache) for _ in range(count)]

    def __copy__(self: Self) -> Self:
        return self.fork()[0]

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        return self.fork()[0]

    def advance(self, num_tokens: int) -> None:
        """Says that a decoder appended tokens of every sequence."""
        cache: Any = self
        cache._seen = [n + num_tokens for n in cache._seen]
        for layer in cache._full:
            layer.num_seen += num_tokens

    def move_to(self: Self, device: torch.device | str) -> Self:
        """Moves what the cache holds to another device, bit for bit, as modules move: in place.

        It isn't called ``to``, as Accelerate's hooks send whatever has that to where a layer runs.

        On the CPU it waits without taking memory of the GPU; it is back where its model is before
        the model reads on. Forks that it shares pages with stay where they are, and it shares none
        with them any more. An empty cache goes where its next prompt is.

        Parameters
        ----------
        device : torch.device or str
            Where it is already, nothing happens.

        Raises
        ------
        ValueError
            If it is no CPU or GPU.
        adakv.Error
            If a forward was stopped midway, a prompt is still being read, the cache lies on several
            devices or in a slot of others, or there is no memory. Nothing changes.
        """
        cache: Any = self
        place = device_of(device)
        check_branches(cache, "move_to")
        held = cache._kv.device if cache._kv is not None else place
        if cache._signature is not None:
            held = cache._signature[-1]
        if held != place:
            move(cache, place)
        return self

    def shrink(self, ratio: float | None = None, *, budget: int | None = None) -> None:
        """Keeps less of the prompts than before, without reading them again.

        The policy chooses as it did then, from what is still there, by what that scored (which
        ``Cache(keep_scores=True)`` remembers). Tokens behind the prompts stay, and cost no budget.
        Memory is given back; for a moment there is a copy of what was held.

        Parameters
        ----------
        ratio : float in (0, 1], optional
            The share of each prompt's tokens that stays, all kv heads on average. What is more than
            there is changes nothing.
        budget : int, optional
            Instead of ``ratio``: mean entries per kv head, the policy's window included.

        Raises
        ------
        ValueError
            If not one of both is given, or it is out of range; if the cache has no scores or its
            text was evicted from; if the policy keeps everything, or shares out or selects by
            what only a prompt has. Nothing changes.
        adakv.Error
            As :meth:`move_to`.
        """
        from adakv.hf import shrinking

        cache: Any = self
        smaller = Budget(cache.budget.policy, budget, ratio)
        check_branches(cache, "shrink")
        shrinking.shrink(cache, smaller)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i goes on from what sequence ``beam_idx[i]`` holds."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence becomes ``repeats`` of them, one behind the other."""
        cache: Any = self
        repeats = integer("repeats", repeats, 1)
        self._select(
            "batch_repeat_interleave", [b for b in range(len(cache.seen)) for _ in range(repeats)]
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        """The sequences ``indices`` ``[n]`` int64 (or those that ``[B]`` bool marks) stay, in this
        order."""
        if not isinstance(indices, Tensor) or indices.dim() != 1:
            raise ValueError(f"indices must be a tensor [n], got {indices!r}")
        if indices.dtype is torch.bool:
            indices = indices.nonzero().flatten()
        self._select("batch_select_indices", indices.tolist())

    def _select(self, what: str, sources: list[int]) -> None:
        cache: Any = self
        batch = len(cache.seen)
        check_branches(cache, what)
        if batch == 0 or sources == list(range(batch)):
            return
        if not sources or not all(0 <= b < batch for b in sources):
            raise ValueError(f"indices must name sequences 0 .. {batch - 1}, got {sources}")
        kv = None if cache._kv is None else forked(cache._kv, sources)
        _take(cache, kv, sources, [0] * len(sources), 0)
        for layer in cache.layers:
            select_states(layer, sources)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the newest tokens back: ``-n`` of them, or all but the first n (as older versions
        of transformers have it).

        Tokens of a prompt can be taken back where every kv head holds all of them; what was evicted
        doesn't come back. Padding counts as a token.

        Raises
        ------
        ValueError
            If that isn't so, pages are of int4 or int2, or texts are evicted from. Nothing changes.
        """
        cache: Any = self
        given = integer("tokens_to_remove", tokens_to_remove, -(2**31))
        columns = cache._full[0].num_seen if cache._full else 0
        count = -given if given <= 0 else max(columns - given, 0)
        cache.notices.of_guesses()
        if count == 0 or columns == 0:
            return
        own = [layer for layer in cache.layers if not isinstance(layer, FullAttentionLayer)]
        check_branches(cache, "crop")
        check_crop(cache, count, columns)
        back = cache.padding.tokens_in_last(count, columns, len(cache._seen))
        check_held(cache, back)
        kv = forked(cache._kv, list(range(len(back))), back)
        for layer in own:
            layer.crop(-count)
        _take(cache, kv, list(range(len(back))), back, count)

    def activate_past_recording(self) -> None:
        """Tokens may be taken back: layers with a window keep what leaves it."""
        cache: Any = self
        cache.notices.of_guesses()
        for layer in self.layers:
            if not isinstance(layer, FullAttentionLayer) and hasattr(
                layer, "activate_past_recording"
            ):
                layer.activate_past_recording()

    def own_pages(self) -> KVCache:
        """The pages; those of texts that are evicted from are theirs alone, as entries move."""
        cache: Any = self
        kv: KVCache = cache._kv
        sequences = range(kv.num_sequences)
        if cache.eviction.text is not None and any(map(kv.shares_pages, sequences)):
            cache._kv = kv = forked(kv, sequences, whole=True)
        return kv


def move(cache: Any, device: torch.device) -> None:
    """:meth:`adakv.Cache.move_to`, for a cache that holds something; also to where it is."""
    if isinstance(cache._kv, TieredCache):
        cache._kv = moved_tiers(cache._kv, device, cache._allocation.new_tokens)
    elif cache._kv is not None:
        cache._kv = moved(cache._kv, device, cache._allocation.new_tokens)
    if cache.kept_scores is not None:
        cache.kept_scores = [x.to(device) for x in cache.kept_scores]
    for layer in cache.layers:
        for name, value in vars(layer).items():
            if name not in _OWN:
                setattr(layer, name, _on_device(value, device))
    cache.padding = cache.padding.of_branches(range(len(cache._seen)), None)
    if cache.padding.shown is not None:
        cache.padding.shown = cache.padding.shown.to(device)
    if cache._signature is not None:
        cache._signature = (*cache._signature[:-1], device)
    if cache.eviction.text is not None:
        cache.eviction.text = cache.eviction.text.to(device)


def _on_device(value: Any, device: torch.device) -> Any:
    """A tensor of transformers', or a list or dict of some, on a device; else the same. What a
    layer remembers as its device is this one, too."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, torch.device):
        return device
    if isinstance(value, list):
        return [_on_device(x, device) for x in value]
    if isinstance(value, dict):
        return {name: _on_device(x, device) for name, x in value.items()}
    return value


def check_branches(cache: Any, what: str) -> None:
    """Raises ``adakv.Error`` if what a cache holds can't be branched from now."""
    if cache.is_midway:
        raise Error(f"{what}: an earlier forward stopped midway: reset() the cache")
    is_begun = cache.reading is not None and (cache.reading.is_begun or cache.reading.num_compacted)
    if is_begun or cache.eviction.reads_chunks:
        raise Error(
            f"{what}: the prompt is still being read: give the model its first token after it"
        )
    if isinstance(cache._kv, SplitCache):
        raise Error(f"{what}: the cache lies on several devices, whose pages can't be shared yet")
    if cache._kv is not None and cache._kv.num_sequences != len(cache._seen):
        raise Error(f"{what}: the cache lies in a slot of others")


def check_crop(cache: Any, count: int, columns: int) -> None:
    """Raises ``ValueError`` if tokens can't be taken back at all."""
    if count >= columns:
        raise ValueError(
            f"crop: {count} tokens can't be taken back of {columns}: reset() the cache"
        )
    if cache.eviction.text is not None:
        raise ValueError(
            "crop: tokens can't be taken back where texts are evicted from (decode_budget): what "
            "left for them doesn't come back"
        )
    for layer in cache.layers:
        is_window = getattr(layer, "is_sliding", False)
        is_past = is_window and layer.get_seq_length() >= layer.sliding_window
        if hasattr(layer, "number_of_states") or (is_past and not layer.record_past):
            raise ValueError(
                f"crop: a {type(layer).__name__} can't take tokens back, as its states or window "
                "have moved on (call activate_past_recording() before)"
            )
    if cache._kv.layers[0].tails is not None:
        raise ValueError(
            f"crop: tokens can't be taken back in kv_dtype={cache._kv.kv_dtype!r}, whose keys "
            "share scales"
        )


def check_held(cache: Any, back: Sequence[int]) -> None:
    """Raises ``ValueError`` unless all rows hold the ``back`` newest tokens of each sequence."""
    after = [n - of_prompt for n, of_prompt in zip(cache._seen, cache.prompt_lens, strict=True)]
    if all(n <= m for n, m in zip(back, after, strict=True)):
        return  # nothing is evicted from these
    kv: KVCache = cache._kv
    if isinstance(kv, TieredCache):
        raise ValueError(
            "crop: tokens of a prompt can't be taken back from several tiers, got "
            f"kv_dtype={kv.kv_dtype!r}"
        )
    layers, counts = kv.all_layers, torch.tensor(back, device=kv.device)[:, None]
    first = torch.tensor(cache._seen, device=kv.device)[:, None] - counts
    slot = (layers.lengths - counts).clamp(min=0).long()  # [L, B, Hkv]
    pages = layers.block_table.gather(3, slot[..., None] // kv.page_size)[..., 0].clamp(min=0)
    positions = layers.page_positions[pages.long(), slot % kv.page_size]
    holds = (layers.lengths >= counts) & (positions == first) | (counts == 0)
    for b, is_held in enumerate(holds.all(-1).all(0).tolist()):  # waits for the device
        if not is_held:
            raise ValueError(
                f"crop: {back[b]} tokens can't be taken back of sequence {b}: {after[b]} came "
                "after its prompt, and of the prompt some were evicted; read the prompt by "
                "itself before tokens that may be taken back, or keep all of it"
            )


def forked(
    kv: _Kv, sources: Sequence[int], back: Sequence[int] = (), *, whole: bool = False
) -> _Kv:
    """:meth:`adakv.cache.KVCache.fork`, for which the pool grows if it must."""
    pool_size.make_room_to_fork(kv, sources, whole=whole)
    return kv.fork(sources, back=back, whole=whole)


def select_states(layer: Any, sources: list[int]) -> None:
    """The sequences of what transformers keeps in a layer."""
    beams = torch.tensor(sources)
    if not isinstance(layer, FullAttentionLayer):
        layer.reorder_cache(beams)
    elif hasattr(layer, "number_of_states"):
        hybrid.reorder_states(layer, beams)


def _take(
    cache: Any, kv: KVCache | None, sources: Sequence[int], back: Sequence[int], columns: int
) -> None:
    """A cache goes on with branches of its sequences, without so many columns."""
    seen, prompts = cache._seen, cache.prompt_lens
    cache._kv = kv
    cache._seen = [seen[b] - n for b, n in zip(sources, back, strict=True)]
    if prompts:
        cache.prompt_lens = [min(prompts[b], n) for b, n in zip(sources, cache._seen, strict=True)]
    left = cache._full[0].num_seen - columns if cache._full else None
    cache.padding = cache.padding.of_branches(sources, left)
    if cache._signature is not None:
        cache._signature = (len(sources), *cache._signature[1:])
    if cache.eviction.text is not None:
        cache.eviction.text = cache.eviction.text.of_branches(sources)
    if cache.kept_scores is not None:
        cache.kept_scores = [x[list(sources)] for x in cache.kept_scores]
    for layer in cache._full:
        layer.num_seen -= columns


def _copied(cache: Any) -> Any:
    """A cache of the same contents, with layers of its own."""
    new = object.__new__(type(cache))
    new.__dict__.update(cache.__dict__)
    new.layers = [_copied_layer(layer, new) for layer in cache.layers]
    new._full = [layer for layer in new.layers if isinstance(layer, FullAttentionLayer)]
    long_rope.watch(new)
    full = [i for i, x in enumerate(new.layers) if isinstance(x, FullAttentionLayer)]
    hidden.tell(new, new.budget.policy.needs, new.model, full)
    if not cache.seen:
        new._begin()
        return new
    new._repetition = Repetition(new, is_needed="repeat" in cache.budget.policy.needs)
    new.eviction = copy.copy(cache.eviction)
    new.notices, new.step = Notices(), None
    new._reader = None if new.read is None else reader_of(new.read, new)
    new._states = copy.deepcopy(cache._states)
    new._seen = list(cache._seen)
    sources = list(range(len(new._seen)))
    kv = None if cache._kv is None else forked(cache._kv, sources)
    _take(new, kv, sources, [0] * len(sources), 0)
    return new


def _copied_layer(layer: Any, cache: Any) -> Any:
    if not isinstance(layer, FullAttentionLayer):
        return copy.deepcopy(layer)
    new = copy.copy(layer)
    for name, value in vars(layer).items():
        if name not in _OWN:
            setattr(new, name, copy.deepcopy(value))
    new._cache = cache
    return new
