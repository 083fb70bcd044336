"""Entries of prompts before they are in pages: while they come in by parts, and until those that
stay are compacted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adakv import ops
from adakv.basis import energies
from adakv.formats import SCALE_GROUP, VALUE_GROUPS
from adakv.ops import Kept, Layer
from adakv.policy import LayerBudget, LayerInputs, Policy
from adakv.policy.base import needs_of
from adakv.policy.folded import Folded, Folding
from adakv.policy.inputs import scaled
from adakv.step import Attention
from adakv.tiered_cache import TieredCache
from adakv.tiers import Tiers

#: Gives keys and values ``[B, Hkv, T, D]``.
Entries = Callable[[], tuple[Tensor, Tensor]]


class Part(NamedTuple):
    """What a layer hands over of its prompts: new queries, and all entries so far.

    The B prompts are padded on the left. ``entries()`` gives keys and values ``[B, Hkv, T, D]``,
    ``w_o()`` the output projection's weight ``[E, Hq * D]``; they are called when they are needed.
    """

    queries: Tensor  # [B, Hq, S, D], those of the last S columns
    entries: Entries
    attention: Attention = Attention()
    w_o: Callable[[], Tensor] | None = None
    lse: Tensor | None = None  # [B, Hq, S] float32, as LayerInputs.lse
    hidden: Tensor | None = None  # [B, S, E], as LayerInputs.hidden

    def copied(self) -> Part:
        """With what belongs to its queries in memory of its own."""
        lse, hidden = (None if x is None else x.clone() for x in (self.lse, self.hidden))
        return self._replace(queries=self.queries.clone(), lse=lse, hidden=hidden)


def all_hidden(parts: Sequence[Part]) -> Tensor | None:
    """A copy of the hidden states ``[B, n, E]`` of all parts, if all of them have some."""
    known = [part.hidden for part in parts if part.hidden is not None]
    return torch.cat(known, 1) if len(known) == len(parts) > 0 else None


class Observed(NamedTuple):
    """What a layer remembers of the parts that it took."""

    newest: Part  # without its queries, unless it is the only one
    parts: tuple[Part, ...] = ()  # those whose queries are still there, or some of them
    taken: tuple[Any, ...] = ()  # of each group
    last: Tensor | None = None  # [B, Hq, W, D], the newest queries, for Policy.fold

    def joined(self) -> Part:
        """The newest part, with all queries and hidden states that are there, and with the queries'
        log-sum-exp if that of all is known."""
        if len(self.parts) == 1:
            return self.parts[0]
        known = [part.lse for part in self.parts if part.lse is not None]
        return self.newest._replace(
            queries=torch.cat([part.queries for part in self.parts], 2),
            lse=torch.cat(known, 2) if len(known) == len(self.parts) else None,
            hidden=all_hidden(self.parts),
        )


class GrowingEntries:
    """Keys and values of a prompt's parts, side by side in memory that grows by an eighth.

    So n entries take room for at most ``9 / 8 * n``, and all copies together are of ``O(n)``.
    """

    def __init__(self) -> None:
        self._memory: list[Tensor] = []  # keys and values, [B, Hkv, capacity, D] each
        self._length = 0

    def put(self, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Takes ``[B, Hkv, S, D]`` of each for the columns from ``start`` on, behind which nothing
        is left, and gives all there are, as :meth:`view` does."""
        self._length = start + keys.shape[2]
        if not self._memory:
            self._memory = [
                x.new_empty(0).view(*x.shape[:2], 0, x.shape[3]) for x in (keys, values)
            ]
        capacity = self._memory[0].shape[2]
        if self._length > capacity:
            capacity = max(self._length, capacity + capacity // 8)
            for i, old in enumerate(self._memory):  # one after the other: the old one is freed
                self._memory[i] = old.new_empty(*old.shape[:2], capacity, old.shape[3])
                self._memory[i][:, :, :start] = old[:, :, :start]
                del old
        for memory, new in zip(self._memory, (keys, values), strict=True):
            memory[:, :, start : self._length] = new
        return self.view()

    def view(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, Hkv, T, D]`` of all parts."""
        keys, values = (memory[:, :, : self._length] for memory in self._memory)
        return keys, values


class Whole(NamedTuple):
    """Prompts of one length, in one layer."""

    inputs: LayerInputs
    budgets: Sequence[LayerBudget]  #: of each of them
    scores: Tensor | None  #: [B, Hkv, T], if there are any before the policy's turn
    folding: Folding | None = None  #: of what leaves, if it is
    sizes: Tensor | None = None  #: [B, Hkv, D] float32, of the newest queries, if tiers ask

    def scored(self, policy: Policy) -> Whole:
        """With scores, unless all of it is kept; without the queries, which are done with."""
        scores = self.scores
        if scores is None and not self.budgets[0].keeps_everything:
            scores = policy.score(self.inputs, self.budgets)
        return self._replace(inputs=self.inputs.without_queries(), scores=scores)

    def with_scores(self, policy: Policy) -> Whole:
        """With scores, also where all of it is kept."""
        if self.scores is not None:
            return self
        if self.inputs.length <= policy.window:  # all of it always stays
            nothing = self.inputs.keys.new_zeros(self.inputs.shape, dtype=torch.float32)
            return self._replace(scores=nothing)
        return self._replace(scores=policy.score(self.inputs, self.budgets))

    def pinned(self, policy: Policy) -> Tensor:
        """Its scores, ``+inf`` for what always stays."""
        return _pinned(policy, self.inputs, self.scores)

    def without_entries(self, policy: Policy) -> Whole:
        """With the norms that the policy's selector will ask for."""
        if "w_o" in needs_of(policy.selector):
            self.inputs.norms(getattr(policy.selector, "norm", "l1"))  # while there are values
        return Whole(self.inputs.without_entries(), self.budgets, self.scores)

    def asked(self, rule: Folded | Tiers, asked: LayerInputs) -> Whole:
        """With what folds that which leaves, or finds the channels that matter, by the newest
        queries of the same prompts."""
        if isinstance(rule, Tiers):
            return self._replace(sizes=rule.sizes_of(asked.queries, asked.num_kv_heads))
        if self.budgets[0].keeps_everything:
            return self
        return self._replace(folding=Folding(rule, rule.masses(asked)))

    def reserved(self, policy: Policy) -> Whole:
        """With the scores of what a :class:`Reserve` would hold, and all entries."""
        _, scores, _ = policy.reserve(self.inputs, self.budgets, scores=self.scores)
        return self._replace(inputs=self.inputs.without_queries(), scores=scores)

    def whole(self) -> Whole:
        """The same."""
        return self


class Reserve(NamedTuple):
    """Those entries of a :class:`Whole` that may still be kept, one behind the other."""

    inputs: LayerInputs  #: of the same shape, without keys and values; with the norms, if needed
    budgets: Sequence[LayerBudget]  #: as those of the :class:`Whole`
    scores: Tensor  #: [B, Hkv, T] float32, -inf for entries that were dropped
    keys: Tensor  #: [K, D]
    values: Tensor  #: [K, D]
    places: Tensor  #: [B, Hkv, T] int32, where an entry lies among keys and values; -1 if dropped
    sizes: Tensor | None = None  #: as those of the :class:`Whole`

    @classmethod
    def take(cls, policy: Policy, whole: Whole) -> Reserve:
        """Copies what the policy holds of it, so that the rest can be freed."""
        inputs, heads = whole.inputs, whole.inputs.num_kv_heads
        kept, scores, places = policy.reserve(inputs, whole.budgets, scores=whole.scores)
        row = kept.rows(len(scores) * heads)
        where = row // heads, row % heads, kept.positions.long()
        entries = inputs.keys[where], inputs.values[where]
        hollow, sizes = inputs.without_entries(), whole.sizes
        return cls(hollow, whole.budgets, scores, *entries, places, sizes)

    def whole(self) -> Whole:
        """With keys and values at their places; where nothing is left stands something else."""
        places = self.places.clamp(min=0).long()
        inputs = replace(self.inputs, keys=self.keys[places], values=self.values[places])
        return Whole(inputs, self.budgets, self.scores, sizes=self.sizes)

    def pinned(self, policy: Policy) -> Tensor:
        """Its scores, ``+inf`` for what always stays."""
        return _pinned(policy, self.inputs, self.scores)

    def places_of(self, kept: Kept) -> Tensor:
        """``[K]`` int32: where some of its entries lie among keys and values."""
        batch, heads, length = self.places.shape
        index = kept.rows(batch * heads) * length + kept.positions.clamp(min=0)
        return self.places.flatten()[index]


class Chosen(NamedTuple):
    """What is kept of some of the prompts, all of one length, in a layer."""

    prompts: slice
    kept: Kept
    entries: Whole | Reserve

    def of_tiers(self, policy: Policy, kv: TieredCache, layer: int, slots: slice) -> list[Chosen]:
        """What each tier has of it. The basis of its rows is written to where ``kv`` has that of
        sequences in ``slots``."""
        scores = self.entries.pinned(policy)
        window = min(policy.window, scores.shape[2])
        before = scores.shape[2] - window
        scores = scores.clamp(max=torch.finfo(scores.dtype).max)  # the window is before the rest
        scores[:, :, before:] = torch.inf
        if kv.basis is None:
            parts = kv.tiers.split(self.kept, scores, window)
            return [self._replace(kept=part) for part in parts]
        whole, held = self.entries.whole(), self.kept.mask(scores.shape)
        if kv.tiers.kind != "order":  # the window is whole
            held[:, :, before:] = False
        keys, values = whole.inputs.keys, whole.inputs.values
        basis = kv.tiers.basis_of(keys, values, held, whole.sizes)
        kv.basis.of((layer, slots)).of(self.prompts).fill(basis)
        wide, entries = basis.of_entries(keys, values), []
        for width, cache in zip(kv.tiers.widths, kv.caches, strict=True):
            narrow = wide[0][..., : cache.head_dim], wide[1][..., : cache.value_dim]
            entries.append((keys, values) if width is None else narrow)
        if kv.tiers.mean is None:
            parts = kv.tiers.split(self.kept, scores, window)
        else:
            costs = [cache.page_bytes for cache in kv.caches]
            parts = kv.tiers.mixed(self.kept, scores, window, energies(entries, held), costs)
        chosen = []
        for part, width, (k, v) in zip(parts, kv.tiers.widths, entries, strict=True):
            of_tier = whole._replace(inputs=replace(whole.inputs, keys=k, values=v))
            chosen.append(Chosen(self.prompts, part, self.entries if width is None else of_tier))
        return chosen


def of_tiers(
    chosen: Sequence[Chosen], policy: Policy, kv: TieredCache, layer: int, slots: slice
) -> list[list[Chosen]]:
    """What each tier has of a layer's prompts: :meth:`Chosen.of_tiers`."""
    of_prompts = [x.of_tiers(policy, kv, layer, slots) for x in chosen]
    return [list(of_tier) for of_tier in zip(*of_prompts, strict=True)]


def counts(chosen: Sequence[Chosen], num_kv_heads: int) -> list[int]:
    """Entries that are kept of each prompt in a layer, known to its device only: waits for it."""
    kept = [x.kept.indptr[::num_kv_heads].diff() for x in chosen]
    return [int(n) for of_prompts in kept for n in of_prompts.tolist()]


def _pinned(policy: Policy, inputs: LayerInputs, scores: Tensor | None) -> Tensor:
    assert scores is not None
    return inputs.pin_window(inputs.pin_protected(scores), policy.window)


def compact_rows(
    keys: Tensor,
    values: Tensor,
    places: Tensor,
    kept: Kept,
    view: Layer,
    page_ids: Tensor,
    page_indptr: Tensor,
    *,
    seen: Tensor,
    biases: Tensor | None = None,
) -> None:
    """:func:`adakv.ops.compact` of entries ``[E, D]`` of all rows one behind the other, with biases
    ``[E]`` float16: those that are kept lie at ``places`` ``[K]`` int32, and ``seen`` ``[B]`` int32
    tokens went by."""
    shape = (*view.lengths.shape, len(keys), -1)
    ops.compact(
        keys.expand(shape),
        values.expand(shape),
        kept,
        view,
        page_ids,
        page_indptr,
        places=places,
        seq_lens=seen,
        biases=None if biases is None else biases.expand(shape[:3]),
    )


class Held:
    """What the rows of some sequences hold in a layer, which is read out of their pages when it is
    asked for. Behind a row's length is what is of no use.

    Parameters
    ----------
    view : :class:`adakv.ops.Layer`
        Of the sequences.
    longest : int
        T: the length of the longest row, or more.
    dtype : torch.dtype
        That of entries, if pages hold codes.
    """

    def __init__(self, view: Layer, longest: int, dtype: torch.dtype) -> None:
        self.view, self.longest, self._dtype = view, longest, dtype

    @cached_property
    def _pages(self) -> Tensor:
        """``[B, Hkv, m]`` int64"""
        num_pages = max(-(-self.longest // self.view.page_positions.shape[1]), 1)
        return self.view.block_table[:, :, :num_pages].clamp(min=0).long()

    @cached_property
    def keys(self) -> Tensor:
        """``[B, Hkv, T, D]``, a copy."""
        if self.has_tails:
            return self._entries[0]
        return self._side_by_side(self.view.pages[:, 0], self.view.key_scales)

    @cached_property
    def values(self) -> Tensor:
        """``[B, Hkv, T, Dv]``, a copy."""
        if self.has_tails:
            return self._entries[1]
        return self._side_by_side(self.view.values, self.view.value_scales)

    @cached_property
    def positions(self) -> Tensor:
        """``[B, Hkv, T]`` int32, a copy."""
        return self.view.page_positions[self._pages].flatten(2)

    @property
    def lengths(self) -> Tensor:
        """``[B, Hkv]`` int32, those of the layer."""
        return self.view.lengths

    @property
    def has_tails(self) -> bool:
        """Whether keys of a page share scales: then entries don't move, they are quantised anew."""
        return self.view.tails is not None

    @cached_property
    def _entries(self) -> tuple[Tensor, Tensor]:
        return _tailed_entries(self.view, self._pages, self._dtype)

    def _side_by_side(self, held: Tensor, scales: Tensor | None) -> Tensor:
        entries = held[self._pages]  # [B, Hkv, m, P, D]
        if scales is not None:
            entries = dequantised(entries, scales[self._pages], self._dtype)
        return entries.flatten(2, 3)

    def compact(self, kept: Kept, page_ids: Tensor, page_indptr: Tensor) -> None:
        """Some of the entries stay: :func:`adakv.ops.compact` in place, or of copies with tails."""
        view = self.view
        if not self.has_tails:
            ops.compact(None, None, kept, view, page_ids, page_indptr)
            return
        held, places = self.positions.flatten(0, 1), kept.positions
        positions = held[kept.rows(len(held)), places.clamp(min=0).long()]
        moved = Kept(positions.where(places >= 0, places), kept.indptr)
        entries, pages = (self.keys, self.values), (page_ids, page_indptr)
        ops.compact(*entries, moved, view, *pages, places=places, seq_lens=view.seen.clone())


class HeldInputs(LayerInputs):
    """The same of what rows hold: keys, values and positions are read by those who ask for them."""

    def __init__(
        self,
        held: Held,
        queries: Tensor,
        layer: int,
        num_layers: int,
        *,
        attention: Attention,
        w_o: Tensor | None = None,
        carried: Tensor | None = None,
        repeat: tuple[Tensor, Tensor] | None = None,
        budgets: tuple[int, ...] = (),
    ) -> None:
        batch, heads = held.lengths.shape
        given: dict[str, Any] = {
            "shape": (batch, heads, held.longest),
            "num_kv_heads": heads,
            "length": held.longest,
            "queries": queries,
            "w_o": w_o,
            "carried": carried,
            "repeat": repeat,
            "budgets": budgets,
            "prompt_lens": (held.longest,) * batch,
            "layer": layer,
            "num_layers": num_layers,
            "seq_lens": held.lengths,
            "attention": attention,
            **dict.fromkeys(("lse", "protected", "sequence_lens", "hidden")),
            "_norms": {},
            "_candidates": {},
            "held": held,
        }
        self.__dict__.update(given)

    held: Held

    @property
    def keys(self) -> Tensor:
        """``[B, Hkv, T, D]``, copied out of the pages."""
        return self.held.keys

    @property
    def values(self) -> Tensor:
        """``[B, Hkv, T, Dv]``, copied out of the pages."""
        return self.held.values

    @property
    def positions(self) -> Tensor:
        """``[B, Hkv, T]``, those of the entries."""
        return self.held.positions

    def attended(self, count: int, *, gain: Tensor | None = None, **how: Any) -> Tensor:
        if self.held.has_tails:
            return super().attended(count, gain=gain, **how)
        if self.queries.shape[2] != count:
            self.check_window(count)
        held = self.held
        queries = self.queries if gain is None else scaled(self.queries, gain)
        return ops.score(queries, None, held.view, held.longest, **self.logits, **how)


def _tailed_entries(view: Layer, pages: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, Hkv, m * P, D]`` of pages ``[B, Hkv, m]``, and of the tails behind them
    (docs/bits.md)."""
    assert view.tails is not None and view.key_scales is not None and view.value_scales is not None
    keys = keys_of_pages(view, pages, dtype)
    codes = view.pages[pages, 1]
    bits = 8 * codes.shape[-1] // keys.shape[-1]
    values = tailed_values(codes, view.value_scales[pages], dtype, bits)
    page_size = keys.shape[3]
    in_tail = view.lengths % page_size  # [B, Hkv]
    last = view.lengths // page_size * (in_tail > 0)
    index = last[..., None, None, None].long().expand(-1, -1, 1, page_size, keys.shape[4])
    halves = view.tails[:, :, :page_size], view.tails[:, :, page_size:]
    for entries, tail in zip((keys, values), halves, strict=True):
        held = entries.gather(2, index)
        entries.scatter_(2, index, tail[:, :, None].where(in_tail[..., None, None, None] > 0, held))
    return keys.flatten(2, 3), values.flatten(2, 3)


def keys_of_pages(view: Layer, pages: Tensor, dtype: torch.dtype) -> Tensor:
    """``[..., P, D]`` in the slots of pages ``[...]`` int64; with tails, in those that are full."""
    held = view.pages[pages, 0]
    if view.key_scales is None:
        return held
    if view.tails is None:
        return dequantised(held, view.key_scales[pages], dtype)
    if view.value_pages is not None:
        raise ValueError("layer: mixed keys can't be read out of their pages again")
    return tailed_keys(held, view.key_scales[pages], dtype)


def tailed_keys(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``[..., P, D]`` of codes ``[..., P, D / 2]`` (int2: ``D / 4``) and scales ``[..., 2, D]`` of
    keys."""
    scale, zero = scales.float()[..., None, :].unbind(-3)  # [..., 1, D] each
    bits = 8 * codes.shape[-1] // scales.shape[-1]
    return (_unpacked(codes, bits).float() * scale + zero).to(dtype)


def tailed_values(codes: Tensor, scales: Tensor, dtype: torch.dtype, bits: int = 4) -> Tensor:
    """``[..., P, D]`` of codes of 4 or 2 ``bits`` ``[..., P, D * bits / 8]`` and scales
    ``[..., P, 2 Z]`` of values."""
    return dequantised(_unpacked(codes, bits), scales, dtype, VALUE_GROUPS[bits])


def _unpacked(held: Tensor, bits: int) -> Tensor:
    """``[..., D]`` codes of ``[..., D * bits / 8]`` bytes, the first in a byte's lowest bits."""
    parts = [held >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(-2)


def dequantised(
    codes: Tensor, scales: Tensor, dtype: torch.dtype, group: int = SCALE_GROUP
) -> Tensor:
    """``[..., P, D]`` of codes and the scales of groups of dimensions (docs/bits.md)."""
    head_dim = codes.shape[-1]
    if codes.dtype is torch.uint8:
        scale, zero = (
            part.repeat_interleave(group, -1)[..., :head_dim].float()
            for part in (scales[..., ::2], scales[..., 1::2])
        )
        return (codes.float() * scale + zero).to(dtype)
    scale = scales.repeat_interleave(group, -1)[..., :head_dim].float()
    return (codes.float() * scale).to(dtype)
