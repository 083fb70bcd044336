"""What one model's cache holds, whatever the framework: prompts come in, pages and tokens follow.

    prompt:             begin_prompt()   once, in the first layer: who has how many tokens
                        hold()           in every layer: its keys and values so far
                        compact()        policy.choose, then into pages
    later, each step:   begin_step()     once, in the first layer: pages and schedules
                        attend()         in every layer: append and attend

Sequences are numbered 0 .. B - 1 and stay until reset(). Only full-attention layers are counted.
After fill() prompts go into slots of a cache that others share; their steps are decode.py's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from adakv import ops
from adakv.cache import KVCache, sequences
from adakv.errors import Error
from adakv.models.budget import Budget
from adakv.models.deal import advance, begin
from adakv.models.padded_step import PaddedStep
from adakv.models.padding import align, new_tokens
from adakv.models.prompt import Attention, Prompt
from adakv.models.reserve import Reserve, Whole
from adakv.policy import LayerInputs

_logger = logging.getLogger("adakv")


class Store:
    """Prompts, pages and the running step of one cache.

    Parameters
    ----------
    budget : :class:`Budget`
        With the policy.
    num_layers : int
    max_new_tokens : int
        Tokens after the prompt that pages are reserved for.
    page_size : int
    is_chunked : bool
        Whether prompts come in several forwards.
    """

    def __init__(
        self,
        budget: Budget,
        *,
        num_layers: int,
        max_new_tokens: int,
        page_size: int,
        is_chunked: bool,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.policy = budget.policy
        self._budget = budget
        self._num_layers = num_layers
        self._max_new_tokens = max_new_tokens
        self._page_size = page_size
        self.is_chunked = is_chunked or "repeat" in budget.policy.needs
        self.reset()

    def reset(self) -> None:
        """Forgets everything and gives the memory back."""
        self.seen: list[int] = []  # tokens of each sequence, without padding
        self.is_prompt = True
        self.is_repeating = False  # the model reads its prompts once more
        self.is_attending = False  # between handing a layer's keys out and attending to them
        self._signature: tuple[object, ...] | None = None
        self._num_forwards = 0
        self._prompts: list[Prompt | None] = [None] * self._num_layers
        self._waiting: list[list[Whole | Reserve]] = [[] for _ in range(self._num_layers)]
        self._kv: KVCache | None = None
        self._first = 0  # slot of sequence 0
        self._groups: list[slice] = []
        self._totals: list[list[int]] = []  # [B][L]
        self._order: Tensor | None = None  # [B, T], puts the prompts' padding in front
        self._step: PaddedStep | None = None  # that is running

    def fill(self, kv: KVCache, first: int) -> None:
        """Forgets everything; the next prompts go into the slots of ``kv`` from ``first`` on."""
        self.reset()
        self._kv, self._first = kv, first

    def begin_forward(self, keys: Tensor) -> None:
        """Finds what would go wrong with new keys ``[B, Hkv, S, D]`` before any layer is changed.

        Raises
        ------
        ValueError
            If the keys don't fit to those of the prompt.
        adakv.Error
            If there are too few pages for S tokens in every sequence. The cache goes on working.
        """
        self.check_attended()
        batch, heads, columns, head_dim = keys.shape
        signature = (batch, heads, head_dim, keys.dtype, keys.device)
        if self._signature not in (None, signature):
            raise ValueError(
                "batch, kv heads, head dim, dtype and device must stay what they were for the "
                f"prompt, {self._signature}, got {signature}"
            )
        if self._kv is not None and not self.is_prompt:
            needed, free = self._kv.pages_to_grow([columns] * batch), self._kv.num_free
            if needed > free:
                raise Error(
                    f"the cache is full: {needed} pages needed for {columns} new tokens, {free} "
                    f"free; it was made for max_new_tokens={self._max_new_tokens}"
                )
            if columns > 1 and self._num_forwards == 1 and not self.is_chunked:
                _logger.warning(
                    "%d more tokens right after the prompt are taken for a second turn and are not "
                    "compressed; if they are of the prompt, give Cache(chunked_prefill=True)",
                    columns,
                )
        if self._num_layers == 0:  # nobody will count the padding
            self.seen = [n + columns for n in self.seen or [0] * batch]
        self._signature = signature
        self._num_forwards += 1

    def check_attended(self) -> None:
        """Raises ``adakv.Error`` if keys that were handed out did not come back to be attended to.

        Nothing was stored then: the cache can be used again.
        """
        if self.is_attending:
            self.is_attending = False
            raise Error("the last forward was stopped, or was of another model that isn't attached")

    def prompt(self, layer: int) -> Prompt | None:
        """The prompt that waits to be compacted."""
        return self._prompts[layer]

    def begin_prompt(self, mask: Tensor | None, batch: int, columns: int) -> None:
        """Counts the tokens of prompts as far as they have come, from the model's mask."""
        self.seen, self._order = new_tokens(mask, [0] * batch, columns)
        if self._order is not None and self.is_chunked:
            raise ValueError("attention_mask: prompts in chunks must be padded on the left")

    def hold(self, layer: int, prompt: Prompt) -> None:
        """Takes a layer's prompt as far as it has come; the queries are those that are new."""
        before = self._prompts[layer]
        if self._order is not None:
            queries, keys, values = (align(x, self._order) for x in prompt[:3])
            prompt = prompt._replace(queries=queries, keys=keys, values=values)
        queries = prompt.queries
        if before is not None:
            queries = torch.cat([before.queries, queries], dim=2)
        if "all_queries" not in self.policy.needs:
            # A copy, so that the other queries can be freed.
            queries = queries[:, :, max(queries.shape[2] - self.policy.window, 0) :].clone()
        self._prompts[layer] = prompt._replace(queries=queries)

    def take_repeat(self, layer: int, queries: Tensor, keys: Tensor) -> None:
        """Scores a layer by the queries that repeat its prompts, and compacts it.

        Keys are those of the prompts and of the repetition.
        """
        prompt = self._held(layer)
        more = keys[:, :, prompt.keys.shape[2] :]
        inputs = replace(self._inputs(prompt, slice(None), layer), repeat=(queries, more))
        self._prompts[layer] = prompt._replace(scores=self.policy.scorer.score(inputs))
        self.compact(layer)

    def compact(self, layer: int) -> None:
        """Moves what the policy keeps of the layer's prompt into pages and drops the rest.

        With a model-wide policy nothing happens before the last layer, and then in all of them.
        """
        if not self.policy.is_model_wide:
            return self._compact([layer])
        self._wait(layer)
        if layer == self._num_layers - 1:
            self._compact(list(range(self._num_layers)))

    def _wait(self, layer: int) -> None:
        """Scores a layer for a model-wide policy, and drops what isn't needed until the last."""
        if self._waiting[layer]:
            raise Error("an earlier forward stopped midway: reset() the cache")
        for whole in self._take(layer):
            budget = self._budget.of(whole.inputs.length)
            if self.policy.reserves:
                self._waiting[layer].append(Reserve.take(self.policy, whole, budget))
            else:
                self._waiting[layer].append(whole.scored(self.policy, budget))

    def _compact(self, layers: list[int]) -> None:
        """:meth:`compact` of layers that are chosen from together."""
        held: dict[int, Sequence[Whole | Reserve]]
        if self.policy.is_model_wide:
            held = dict(enumerate(self._waiting))
            self._waiting = [[] for _ in layers]
        else:
            held = {layer: self._take(layer) for layer in layers}
        kv = self._kv
        assert kv is not None
        choices = [self._choose(parts) for parts in zip(*held.values(), strict=True)]
        totals = [[total[layer] for total in self._totals] for layer in layers]
        page_ids, next_page = begin(kv, layers, totals, self.seen, first_sequence=self._first)
        for i, layer in enumerate(layers):
            parts, view = held.pop(layer), sequences(kv.layer(layer), self._slots)
            for group, part, kept in zip(self._groups, parts, choices, strict=True):
                starts = next_page[group.start : group.stop + 1]
                part.compact(kept[i], sequences(view, group), page_ids, starts)
            if held:
                advance(next_page, view.lengths, self._page_size)
        self.is_prompt = layers[-1] < self._num_layers - 1

    def _take(self, layer: int) -> list[Whole]:
        """A layer's prompts, group by group; from now on they are the caller's to hold."""
        prompt = self._held(layer)
        self._prompts[layer] = None
        if not self._totals:
            self._begin_pages(prompt)
        self._kv = self._kv or self._allocate(prompt)
        scores = prompt.scores
        return [
            Whole(
                prompt.inputs(group, self.seen[group], layer, self._num_layers),
                None if scores is None else scores[group],
            )
            for group in self._groups
        ]

    def _choose(self, parts: Sequence[Whole | Reserve]) -> list[ops.Kept]:
        """What the policy keeps of some of the sequences, for each of the layers."""
        inputs = [part.inputs for part in parts]
        scores = [part.scores for part in parts if part.scores is not None] or None
        budget = self._budget.of(inputs[0].length)
        if self.policy.is_model_wide:
            return self.policy.choose_all(inputs, budget, scores=scores)
        return [self.policy.choose(inputs[0], budget, scores=scores and scores[0])]

    def _held(self, layer: int) -> Prompt:
        prompt = self._prompts[layer]
        if prompt is None:
            raise Error("an earlier forward stopped midway: reset() the cache")
        return prompt

    def compact_all(self) -> None:
        """:meth:`compact` of all layers, for a prompt that came in chunks."""
        for layer in range(self._num_layers):
            self.compact(layer)

    def pages(self) -> KVCache:
        """What is held, for others to go on with; a prompt in chunks is complete now."""
        if self.is_prompt:
            self.compact_all()
        assert self._kv is not None
        return self._kv

    def advance(self, num_tokens: int) -> None:
        """Others appended tokens of every sequence."""
        self.seen = [n + num_tokens for n in self.seen]

    def _begin_pages(self, prompt: Prompt) -> None:
        """What is kept of each prompt, and which of them are compacted together."""
        batch, heads, length, _ = prompt.keys.shape
        if 0 in self.seen:
            raise ValueError(f"attention_mask: prompt {self.seen.index(0)} is nothing but padding")
        if len(set(self.seen)) == 1 and self.seen[0] == length:
            self._groups = [slice(0, batch)]
        else:  # unequal: one by one, so that padding can be cut off without copying
            self._groups = [slice(b, b + 1) for b in range(batch)]
        self._totals = [
            self._budget.totals(n, num_kv_heads=heads, num_layers=self._num_layers)
            for n in self.seen
        ]

    def _allocate(self, prompt: Prompt) -> KVCache:
        """Pages for what is kept of the prompts in all layers, and for the tokens to come."""
        batch, heads, _, head_dim = prompt.keys.shape
        size, more = self._page_size, self._max_new_tokens
        pages = sum(
            KVCache.pages_for(total, more, num_kv_heads=heads, page_size=size)
            for totals in self._totals
            for total in totals
        )
        return KVCache(
            num_layers=self._num_layers,
            num_sequences=batch,
            num_kv_heads=heads,
            head_dim=head_dim,
            num_pages=pages,
            max_row_pages=(max(self.seen) + more) // size + 2,  # the pool decides what is full
            page_size=size,
            dtype=prompt.keys.dtype,
            device=prompt.keys.device,
        )

    @property
    def _slots(self) -> slice:
        return slice(self._first, self._first + len(self.seen))

    def _inputs(self, prompt: Prompt, group: slice, layer: int) -> LayerInputs:
        return prompt.inputs(group, self.seen[group], layer, self._num_layers)

    def begin_step(self, mask: Tensor | None, columns: int) -> None:
        """Makes room for a step in all layers and plans it, before its first :meth:`attend`."""
        assert self._kv is not None
        self._step = PaddedStep(self._kv, mask, self.seen, columns)
        self.seen = self._step.seen

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, attention: Attention
    ) -> Tensor:
        """Appends a step's keys and values to a layer and attends: ``[B, S, Hq, D]``."""
        assert self._step is not None
        return self._step.attend(layer, queries, keys, values, attention)

    @property
    def pages_used(self) -> int:
        """Pages that its sequences own, of all layers."""
        return 0 if self._kv is None else self._kv.pages_used

    @property
    def bytes(self) -> int:
        """Of the pages in use."""
        return 0 if self._kv is None else self._kv.pages_used * self._kv.page_bytes

    @property
    def full_bytes(self) -> int:
        """What keys and values of all tokens would take."""
        if self._kv is None:
            return 0
        entry = 2 * self._kv.head_dim * self._kv.dtype.itemsize
        return sum(self.seen) * self._num_layers * self._kv.num_kv_heads * entry

    def lengths(self, num_kv_heads: int) -> Tensor:
        """``[L, B, Hkv]`` int32 on the CPU."""
        if self._kv is None:
            return torch.zeros(self._num_layers, len(self.seen), num_kv_heads, dtype=torch.int32)
        return self._kv.all_layers.lengths[:, self._slots].cpu()

    def positions(self, layer: int) -> list[list[Tensor]]:
        """Per sequence and kv head the positions that are held, ``[length]`` int32, ascending."""
        return [] if self._kv is None else self._kv.positions(layer, self._slots)
