"""Reads prompts: a layer's queries, keys and values come in by parts; what is kept comes out.

    reader = Reader(budget, num_layers)
    for every part of the prompts:
        reader.begin(lengths, columns)       how long each prompt is with it
        reader.take(layer, part)             in each layer: remembers what the policy will ask for
    then, in each layer:
        chosen = reader.finish(layer)        scores, allocates and selects
        reader.compact(chosen, kv)           moves the choice into pages

A prompt that comes in one part needs no ``take``: ``finish(layer, part)`` reads it. A model-wide
policy chooses from all layers together when the last one finishes; until then ``finish`` gives
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adakv import ops
from adakv.basis import ORDERS
from adakv.cache import KVCache, sequences
from adakv.devices import AnyCache, SplitCache
from adakv.entries import Chosen as Chosen
from adakv.entries import (
    Entries,
    GrowingEntries,
    Observed,
    Reserve,
    Whole,
    all_hidden,
    compact_rows,
    counts,
    of_tiers,
)
from adakv.entries import Part as Part
from adakv.errors import Error
from adakv.kept_scores import KeptScores
from adakv.policy import (
    Budget,
    LayerBudget,
    LayerInputs,
    PartwiseScorer,
    Protection,
    TokenClasses,
)
from adakv.policy.protection import mask_of
from adakv.tiered_cache import TieredCache
from adakv.tiers import Tiers


class Reader:
    """Prompts on their way through the layers of a model.

    Parameters
    ----------
    budget : :class:`adakv.policy.Budget`
        With the policy.
    num_layers : int
        How many layers are compressed.
    holds_entries : bool
        Whether the layers of a model-wide policy hold keys and values while they wait for the last
        one: False where these stay where they are, so that of what is chosen ``kept`` is enough.
    protection : :class:`adakv.policy.Protection`, optional
        What must stay of the prompts.
    classes : :class:`adakv.policy.TokenClasses`, optional
        What their tokens are of, for policies that read it.
    keeps_scores : bool
        Whether :attr:`kept_scores` are there.
    tiers : :class:`adakv.tiers.Tiers`, optional
        Where what is kept goes, by its scores. For both, prompts that fit are scored, too.
    """

    def __init__(
        self,
        budget: Budget,
        num_layers: int,
        *,
        holds_entries: bool = True,
        protection: Protection | None = None,
        classes: TokenClasses | None = None,
        keeps_scores: bool = False,
        tiers: Tiers | None = None,
    ) -> None:
        self.policy = budget.policy
        self.num_layers = num_layers
        self.lengths: list[int] = []
        """Tokens of each prompt so far, without padding."""
        self.num_compacted = 0
        """Layers that are in pages."""
        self.kept_scores = KeptScores() if keeps_scores else None
        """What the entries scored that stay."""
        self._scores_all = keeps_scores or tiers is not None
        # Tiers whose channels have an order look at the prompts' newest queries, as folding does.
        self._tiers = tiers if tiers is not None and tiers.kind in ORDERS else None
        self._budget, self._holds_entries = budget, holds_entries
        self._protection = protection or None
        self._protected: list[Tensor] = []  # [B, T] bool of each group
        self._classes = classes or TokenClasses()
        self._numbers: list[Tensor] = []  # [B, T] uint8 of each group, if classes are read
        self._first_scores: list[Tensor | None] = []  # of each group, if they are those of all
        scorer = self.policy.scorer
        self._partwise = scorer if isinstance(scorer, PartwiseScorer) else None
        self._groups: list[slice] = []  # prompts of one length, which are worked on together
        self._observed: list[Observed | None] = [None] * num_layers
        self._joined: dict[int, GrowingEntries] = {}
        self.waiting: list[list[Whole | Reserve]] = []
        """What the layers of a model-wide policy hold until the last one has finished."""
        self._num_finished = 0
        self._budgets: list[tuple[LayerBudget, ...]] = []  # see budgets()

    def change(
        self,
        budget: Budget,
        protection: Protection | None = None,
        classes: TokenClasses | None = None,
    ) -> None:
        """Has another budget from now on, protects something else, and has other classes if some
        are given. Its policy's scorer must remember of parts what that of the first one does."""
        self.policy, self._budget, self._budgets = budget.policy, budget, []
        self._protection, self._protected = protection or None, []
        if classes is not None:
            self._classes, self._numbers = classes, []
        if self._partwise is not None and isinstance(budget.policy.scorer, PartwiseScorer):
            self._partwise = budget.policy.scorer

    @property
    def is_begun(self) -> bool:
        """Whether a part has come."""
        return bool(self.lengths)

    def begin(self, lengths: Sequence[int], columns: int, *, is_complete: bool = False) -> None:
        """Says how many tokens each prompt has with the next part, and columns with padding.

        With ``is_complete``, that of :meth:`check_complete` is found before anything is changed.
        """
        if is_complete:
            self._check(lengths)
        if not self._groups and 0 not in lengths:
            if all(n == columns for n in lengths):
                self._groups = [slice(0, len(lengths))]
            else:  # unequal: one by one, so that padding can be cut off without copying
                self._groups = [slice(b, b + 1) for b in range(len(lengths))]
        self.lengths, self._budgets, self._protected, self._numbers = list(lengths), [], [], []

    def check_complete(self) -> None:
        """Raises ``ValueError`` if there is a prompt without a token, or with more that must stay
        than its budget holds."""
        self._check(self.lengths)

    def _check(self, lengths: Sequence[int]) -> None:
        if 0 in lengths:
            raise ValueError(f"attention_mask: prompt {lengths.index(0)} is nothing but padding")
        self._budget.check(lengths)
        if self._protection is not None:
            self._protection.check(self._budget, lengths, self.num_layers)
        stays = (self._protection or Protection()).spans(lengths)
        self._classes.check(self._budget, lengths, self.num_layers, stays)

    def side_by_side(self, layer: int) -> GrowingEntries:
        """Where adapters whose attention wants a prompt's entries in one piece put those of a
        layer's parts; until the layer finishes."""
        return self._joined.setdefault(layer, GrowingEntries())

    def take(self, layer: int, part: Part) -> None:
        """Remembers what the policy will have to know of a part's queries.

        That is those of its window, what a :class:`adakv.policy.PartwiseScorer` makes of all of
        them, or, for other scorers of all queries, the queries; and its hidden states, if the
        policy needs them and no scorer takes parts. None does before a prompt is longer than
        its budget, so that short ones don't pay for it. The part's memory may be used for something
        else afterwards.
        """
        before = self._observed[layer] or Observed(part)
        asks = self.policy.fold or self._tiers
        last = None if asks is None else asks.newest(part.queries, before.last)
        newest = part._replace(queries=part.queries[:, :, :0].clone(), lse=None, hidden=None)
        if "hidden" not in self.policy.needs:
            part = part._replace(hidden=None)
        parts: tuple[Part, ...] = (*before.parts, part)
        if self._partwise is not None and self._groups and self._is_long:
            observed = Observed(newest, parts, before.taken, last)
            self._observed[layer] = self._take_parts(layer, observed)
            return
        if self._partwise is None and "all_queries" not in self.policy.needs:
            window = self._asked(torch.cat([self._asked(x.queries) for x in parts], 2)).clone()
            parts = (newest._replace(queries=window, hidden=all_hidden(parts)),)
        else:
            parts = (*before.parts, part.copied())
        self._observed[layer] = Observed(newest, parts, before.taken, last)

    def finish(
        self,
        layer: int,
        part: Part | None = None,
        *,
        repeat: tuple[Tensor, Tensor] | None = None,
    ) -> dict[int, list[Chosen]]:
        """Chooses what is kept of a layer's prompts, which are complete.

        Parameters
        ----------
        layer : int
            Layers finish in order.
        part : :class:`Part`, optional
            The prompts' last part, or only one, if it wasn't taken.
        repeat : tuple of ``[B, Hq, R, D]`` and ``[B, Hkv, R, D]``, optional
            As :attr:`adakv.policy.LayerInputs.repeat`.

        Returns
        -------
        chosen : dict of :class:`Chosen` lists by layer
            This layer's; for a model-wide policy those of all layers after the last, else none.

        Raises
        ------
        adakv.Error
            If the layers before have not finished: a forward was stopped midway.
        """
        if part is not None and self._observed[layer] is not None:
            self.take(layer, part)
            part = None
        observed = self._observed[layer] if part is None else Observed(part, last=part.queries)
        if layer != self._num_finished or observed is None:
            raise Error("an earlier forward stopped midway: reset() the cache")
        wholes = self._wholes(layer, observed, repeat)
        if self._scores_all:
            wholes = [whole.with_scores(self.policy) for whole in wholes]
        if self.kept_scores is not None:
            self.kept_scores.put(self.policy, layer, wholes)
        self._observed[layer] = None
        self._joined.pop(layer, None)
        self._num_finished += 1
        if not self.policy.is_model_wide:
            kept = [self.policy.choose(x.inputs, x.budgets, scores=x.scores) for x in wholes]
            return {layer: list(map(Chosen, self._groups, kept, wholes))}
        self.waiting.append(list(map(self._held, wholes)))
        return {} if self._num_finished < self.num_layers else self._choose_all()

    def finish_alike(self, layers: range, entries: Entries) -> list[Chosen]:
        """:meth:`finish` of several layers of a prompt, as of as many prompts ``[n]`` of one layer.

        For layers that attend alike, and policies that neither span layers nor need anything.
        """
        parts = [x.joined() for x in self._observed[layers.start : layers.stop] if x is not None]
        assert layers.start == self._num_finished and len(parts) == len(layers)
        self._observed[layers.start : layers.stop] = [None] * len(layers)
        self._num_finished = layers.stop
        alike = Reader(self._budget, 1, holds_entries=False, protection=self._protection)
        alike.begin(self.lengths * len(layers), *self.lengths)
        queries = torch.cat([part.queries for part in parts])
        return alike.finish(0, parts[0]._replace(queries=queries, entries=entries))[0]

    def compact(
        self, chosen: dict[int, list[Chosen]], kv: AnyCache, *, first_sequence: int = 0
    ) -> None:
        """Moves what :meth:`finish` chose into pages of ``kv``, and drops the rest.

        The prompts are those of the sequences from ``first_sequence`` on. ``chosen`` is emptied
        layer by layer, so that memory is freed on the way.
        """
        layers = list(chosen)
        if not layers:
            return
        is_split = isinstance(kv, SplitCache)
        is_mixed = isinstance(kv, TieredCache) and kv.tiers.mean is not None
        if (is_split or is_mixed) and len(layers) > 1:
            for layer in layers:
                self.compact({layer: chosen.pop(layer)}, kv, first_sequence=first_sequence)
            return
        if is_split and self.policy.is_model_wide:
            totals = [counts(chosen[layer], kv.num_kv_heads) for layer in layers]
        else:
            budgets = self.budgets(kv.num_kv_heads)
            totals = [[x.total for x in budgets[layer]] for layer in layers]
        slots = slice(first_sequence, first_sequence + len(self.lengths))
        where: Any = {"first_sequence": first_sequence}
        tiers: Sequence[Sequence[Chosen]] = ()
        caches: Sequence[KVCache | SplitCache]
        if isinstance(kv, TieredCache):
            heads, window = kv.num_kv_heads, self.policy.window
            if is_mixed:
                tiers = of_tiers(chosen[layers[0]], self.policy, kv, layers[0], slots)
                of_caches = [[counts(x, heads)] for x in tiers]
            else:
                model_wide = self.policy.is_model_wide
                of_caches = kv.tiers.totals(totals, heads, window, model_wide=model_wide)
            caches, pages = kv.caches, kv.begin_layers(layers, of_caches, self.lengths, **where)
        else:
            caches, pages = (kv,), [kv.begin_layers(layers, totals, self.lengths, **where)]
        for layer in layers:
            if self.kept_scores is not None:
                self.kept_scores.keep(layer, [x.kept for x in chosen[layer]])
            of_layer = chosen.pop(layer)
            if isinstance(kv, TieredCache) and not is_mixed:
                tiers = of_tiers(of_layer, self.policy, kv, layer, slots)
            for cache, (page_ids, next_page), of_tier in zip(
                caches, pages, tiers or [of_layer], strict=True
            ):
                view = cache.layers[layer]
                if len(self.lengths) < cache.num_sequences:
                    view = sequences(view, slots)
                for prompts, kept, entries in of_tier:
                    starts = next_page[prompts.start : prompts.stop + 1]
                    rows = view if len(self._groups) == 1 else sequences(view, prompts)
                    compact(kept, entries, rows, page_ids, starts)
                if chosen and isinstance(cache, KVCache):
                    cache.advance_pages(next_page, view.lengths)
        self.num_compacted += len(layers)

    def totals(self, num_kv_heads: int) -> list[list[int]]:
        """``[L][B]``: most entries that a layer keeps of each prompt, all its kv heads together."""
        return [[budget.total for budget in layer] for layer in self.budgets(num_kv_heads)]

    def budgets(self, num_kv_heads: int) -> list[tuple[LayerBudget, ...]]:
        """``[L][B]``: how much a layer keeps of each prompt."""
        if not self._budgets:
            of_lengths = {
                n: self._budget.of_layers(n, num_kv_heads=num_kv_heads, num_layers=self.num_layers)
                for n in set(self.lengths)
            }
            self._budgets = list(zip(*(of_lengths[n] for n in self.lengths), strict=True))
        return self._budgets

    @property
    def _is_long(self) -> bool:
        """Whether not all that came of the prompts will be kept."""
        return any(n > self._budget.of(n) for n in self.lengths)

    def _take_parts(self, layer: int, observed: Observed) -> Observed:
        """With all queries taken."""
        assert self._partwise is not None
        part = observed.joined()
        before = observed.taken or (None,) * len(self._groups)
        inputs = self._inputs(layer, part, part.queries.contiguous(), None)
        taken = tuple(self._partwise.take(*pair) for pair in zip(before, inputs, strict=True))
        return observed._replace(parts=(), taken=taken)

    def _wholes(
        self, layer: int, observed: Observed, repeat: tuple[Tensor, Tensor] | None
    ) -> list[Whole]:
        """A layer's prompts, group by group, with scores if queries were taken."""
        if observed.taken and observed.parts:
            observed = self._take_parts(layer, observed)
        part, w_o = observed.joined() if observed.parts else observed.newest, None
        if "w_o" in self.policy.needs and part.w_o is not None:
            w_o = part.w_o()
        inputs = self._inputs(layer, part, self._asked(part.queries), w_o)
        if repeat is not None:
            inputs = [
                replace(x, repeat=(repeat[0][group], repeat[1][group]))
                for x, group in zip(inputs, self._groups, strict=True)
            ]
        if self._protection is not None:
            inputs = self._with_protected(inputs, self._protection)
        budgets = self.budgets(inputs[0].num_kv_heads)[layer]
        wholes = [Whole(x, budgets[g], None) for x, g in zip(inputs, self._groups, strict=True)]
        asks = self.policy.fold or self._tiers
        if asks is not None and observed.last is not None:
            asked = self._inputs(layer, part, asks.newest(observed.last), None)
            wholes = [x.asked(asks, of) for x, of in zip(wholes, asked, strict=True)]
        if layer > 0 and self.policy.scores_once:
            return [
                whole._replace(scores=None if scores is None else scores.to(whole.inputs.device))
                for whole, scores in zip(wholes, self._first_scores, strict=True)
            ]
        if self._partwise is not None and observed.taken:
            wholes = [
                whole
                if self._keeps_all_of(group, whole)
                else whole._replace(scores=self._partwise.finish(taken, whole.inputs))
                for group, whole, taken in zip(self._groups, wholes, observed.taken, strict=True)
            ]
        if self.policy.scores_once:
            wholes = [
                whole
                if whole.scores is not None or self._keeps_all_of(group, whole)
                else whole._replace(scores=self.policy.score(whole.inputs, whole.budgets))
                for group, whole in zip(self._groups, wholes, strict=True)
            ]
            self._first_scores = [whole.scores for whole in wholes]
        return wholes

    def _keeps_all_of(self, group: slice, whole: Whole) -> bool:
        """Whether nothing is to be scored of some prompts: in their layer, or in any of those whose
        scores it has."""
        if self._scores_all:
            return whole.inputs.length <= self.policy.window
        if not self.policy.scores_once:
            return whole.budgets[0].keeps_everything
        layers = self.budgets(whole.inputs.num_kv_heads)
        return all(x.keeps_everything for layer in layers for x in layer[group])

    def _with_protected(
        self, inputs: Sequence[LayerInputs], protection: Protection
    ) -> list[LayerInputs]:
        """With the mask of what must stay, which is made once for all layers."""
        if not self._protected:
            spans = protection.spans(self.lengths)
            self._protected = [
                mask_of(spans[group], x.length, x.keys.device)
                for x, group in zip(inputs, self._groups, strict=True)
            ]
        return [
            replace(x, protected=mask.to(x.keys.device, non_blocking=True))
            for x, mask in zip(inputs, self._protected, strict=True)
        ]

    def _with_classes(self, inputs: Sequence[LayerInputs]) -> list[LayerInputs]:
        """With what tokens are of, which is found once for all layers."""
        if not self._numbers:
            self._numbers = [
                self._classes.numbers(self.lengths, group, x.length, x.keys.device)
                for x, group in zip(inputs, self._groups, strict=True)
            ]
        return [
            replace(x, classes=numbers.to(x.keys.device, non_blocking=True))
            for x, numbers in zip(inputs, self._numbers, strict=True)
        ]

    def _held(self, whole: Whole) -> Whole | Reserve:
        """What a layer of a model-wide policy holds of some prompts until the last one is there."""
        if self.policy.reserves and whole.folding is not None:  # what leaves is still to be read
            return whole.reserved(self.policy)
        if self.policy.reserves:
            held = Reserve.take(self.policy, whole)
            return held if self._holds_entries else Whole(held.inputs, held.budgets, held.scores)
        scored = whole.scored(self.policy)
        return scored if self._holds_entries else scored.without_entries(self.policy)

    def _asked(self, queries: Tensor) -> Tensor:
        """The last of the queries, ``[B, Hq, W, D]``, unless the policy asks for all."""
        if "all_queries" in self.policy.needs:
            return queries
        return queries[:, :, max(queries.shape[2] - self.policy.window, 0) :]

    def _inputs(
        self, layer: int, part: Part, queries: Tensor, w_o: Tensor | None
    ) -> list[LayerInputs]:
        """The prompts as a policy takes them, group by group: views, without padding."""
        keys, values = part.entries()
        inputs = []
        for group in self._groups:
            lengths = tuple(self.lengths[group])
            start = keys.shape[2] - lengths[0]
            padding = max(queries.shape[2] - lengths[0], 0)
            hidden = part.hidden
            if hidden is not None:
                hidden = hidden[group, max(hidden.shape[1] - lengths[0], 0) :]
            inputs.append(
                LayerInputs(
                    queries[group, :, padding:],
                    keys[group, :, start:],
                    values[group, :, start:],
                    w_o,
                    lengths,
                    layer,
                    self.num_layers,
                    attention=part.attention,
                    lse=None if part.lse is None else part.lse[group, :, padding:],
                    hidden=hidden,
                )
            )
        return self._with_classes(inputs) if "classes" in self.policy.needs else inputs

    def _choose_all(self) -> dict[int, list[Chosen]]:
        """What a model-wide policy keeps, of all layers."""
        finished, self.waiting = self.waiting, []
        kept = []  # [groups][L]
        for parts in zip(*finished, strict=True):
            scores = [part.scores for part in parts if part.scores is not None] or None
            inputs = [part.inputs for part in parts]
            kept.append(self.policy.choose_all(inputs, parts[0].budgets, scores=scores))
        return {
            layer: [
                Chosen(group, of_group[layer], entries)
                for group, of_group, entries in zip(self._groups, kept, layers, strict=True)
            ]
            for layer, layers in enumerate(finished)
        }


def compact(
    kept: ops.Kept, entries: Whole | Reserve, rows: ops.Layer, page_ids: Tensor, page_indptr: Tensor
) -> None:
    """:func:`adakv.ops.compact` of what is kept of some prompts' entries in a layer."""
    if isinstance(entries, Reserve):  # the entries of all rows lie one behind the other
        places, seen = entries.places_of(kept), torch.full_like(rows.seen, entries.inputs.length)
        pages = page_ids, page_indptr
        compact_rows(entries.keys, entries.values, places, kept, rows, *pages, seen=seen)
        return
    keys, values, biases = entries.inputs.keys, entries.inputs.values, None
    if entries.folding is not None:  # what leaves becomes a part of what stays
        values, biases = entries.folding.fold(keys, values, kept)
    ops.compact(keys, values, kept, rows, page_ids, page_indptr, biases=biases)
