"""Texts that an engine's requests write: what is kept of them while they are written.

    begin()     when a prompt has ended
    follow()    in each step behind it
    ask()       which queries of a step have to be remembered, and put() them

When a text has its budget and ``every`` tokens more, the scheduler orders a choice, as it orders a
prompt to be compressed. It is made at the beginning of a step: the newest queries of each layer
score what rows hold, where it lies. What is kept of the prompt stays. Then all that is kept is
dealt anew to the first blocks of the request (see plan.py).

Queries are remembered from a window before a choice on, and then forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adakv.entries import Held, HeldInputs
from adakv.ops import Kept, Layer
from adakv.policy.again import Competing
from adakv.reselection import Rule
from adakv.step import Attention
from adakv.vllm.later import Later
from adakv.vllm.plan import Scheduler
from adakv.vllm.rows import Rows
from adakv.vllm.steps import Asked, Batch, sent


@dataclass
class Text:
    """A request whose prompt has ended, and whose text is chosen from.

    Rows hold entries of the prompt, which stay, and behind them those of the text.
    """

    first_block: int
    boundary: int  # tokens before the step that compressed it last, or where its prompt ended
    due: int  # tokens from which on a choice may be ordered
    of_prompt: Later  # [L * Hkv], entries of each row
    lengths: Later  # [L * Hkv], entries of each row at the boundary
    place: int = -1  # where its queries are remembered


class Chosen(NamedTuple):
    """What is kept of a request's rows."""

    kept: list[Kept]  # of each layer, places in the rows in the place of positions
    totals: list[int]  # at most so many of a layer


class Texts:
    """The texts of a group of layers.

    Parameters
    ----------
    rule : :class:`adakv.reselection.Rule`
    rows : :class:`adakv.vllm.rows.Rows`
    scheduler : :class:`adakv.vllm.plan.Scheduler`
    attentions : one :class:`adakv.step.Attention` for each layer
    w_o : callable, optional
        As :class:`adakv.vllm.engine_cache.EngineCache` takes it.
    dtype : torch.dtype
        That of keys and values.
    """

    def __init__(
        self,
        rule: Rule,
        rows: Rows,
        scheduler: Scheduler,
        attentions: Sequence[Attention],
        w_o: Callable[[int], Tensor] | None,
        dtype: torch.dtype,
    ) -> None:
        self.rule, self._rows, self._scheduler = rule, rows, scheduler
        self._texts: dict[int, Text] = {}  # by request
        self._attentions, self._w_o, self._dtype = attentions, w_o, dtype
        self._window = rule.policy.window
        self._queries: Tensor | None = None  # [L, places * W, Hq, D]
        self._free: list[int] = []
        self._num_places = 0

    def __len__(self) -> int:
        return len(self._texts)

    def begin(self, request: int, first_block: int, boundary: int, due: int) -> None:
        """The prompt of a request has ended, and is compressed if it will be."""
        counts = Later(self._rows.begin_text(first_block, boundary).flatten())
        self._texts[request] = Text(first_block, boundary, due, counts, counts)

    def follow(self, batch: Batch, row: int, request: int) -> None:
        """Chooses from a request's text, if the scheduler has ordered it for this step.

        Raises
        ------
        adakv.Error
            If the scheduler thinks that it was compressed last with another number of tokens.
        """
        text, computed = self._texts.get(request), batch.computed[row]
        if text is None or computed < text.due:
            return
        order = self._scheduler.order(text.first_block, text.boundary, computed)
        if order is None or order.at != computed:
            return
        own, new_tokens = slice(row, row + 1), batch.query_start[row + 1] - batch.query_start[row]
        tables, _ = self._rows.tables(batch, own, new_tokens)
        chosen = self._chosen(text, computed, self._rows.layers(tables))
        given = batch.block_table[own], tables.block_table, *chosen
        lengths = self._rows.deal_again(text.first_block, computed, *given)
        text.boundary, text.due, text.lengths = computed, order.due, Later(lengths.flatten())
        self._leave(text)
        self._scheduler.done(text.first_block, computed)

    def forget(self, is_gone: Callable[[int], bool], begun: Container[int] = ()) -> None:
        """Forgets texts that no scheduler has, by their first blocks, and those of requests in
        whose place others have ``begun``."""
        for request, text in list(self._texts.items()):
            if request in begun or is_gone(text.first_block):
                self._leave(text)
                del self._texts[request]

    def ask(self, batch: Batch, requests: Sequence[int]) -> Asked | None:
        """Which of a step's queries have to be remembered, for choices that are near."""
        tokens: list[int] = []
        into: list[int] = []
        for row, request in enumerate(requests):
            text = self._texts.get(request)
            if text is None:
                continue
            begin, end = batch.query_start[row : row + 2]
            first, count = batch.computed[row], end - begin
            if count == 0 or first + count <= text.due - self._window:
                continue
            if text.place < 0:
                text.place = self._take_place()
            for token in range(max(count - self._window, 0), count):
                tokens.append(begin + token)
                into.append(text.place * self._window + (first + token) % self._window)
        device = batch.block_table.device
        return Asked(sent(tokens, device), sent(into, device)) if tokens else None

    def put(self, asked: Asked, queries: Tensor, layer: int | None = None) -> None:
        """Remembers some of a step's queries ``[tokens, Hq, D]`` of a layer, or ``[L, tokens, Hq,
        D]`` of all of them."""
        shape = len(self._attentions), self._num_places * self._window, *queries.shape[-2:]
        if self._queries is None or self._queries.shape[1] < shape[1]:
            before, self._queries = self._queries, queries.new_zeros(shape)
            if before is not None:
                self._queries[:, : before.shape[1]] = before
        ring = self._queries if layer is None else self._queries[layer]
        ring.index_copy_(-3, asked.into, queries.index_select(-3, asked.tokens))

    def _chosen(self, text: Text, computed: int, layers: Sequence[Layer]) -> Chosen:
        """What is kept of a request, whose rows ``layers`` describe before a step, and which then
        has ``computed`` tokens."""
        heads, new = layers[0].lengths.shape[1], computed - text.boundary
        rows = [[n + new for n in row] for row in _by_layer(text.lengths, heads)]
        of_prompt = _by_layer(text.of_prompt, heads)
        size = layers[0].page_positions.shape[1]
        longest = -(-max(map(max, rows)) // size) * size
        ends = sent(of_prompt, layers[0].lengths.device)[..., None]  # [L, Hkv, 1]
        places = torch.arange(longest, device=ends.device)
        chosen = Chosen([], [])
        for layer, (view, held, pinned) in enumerate(zip(layers, rows, of_prompt, strict=True)):
            budget, total = self._budget(layer, held, pinned, computed)
            inputs = self._inputs(layer, view, longest, text, computed, total // heads)
            kept = self._choose(inputs, (places < ends[layer])[None], budget, total)
            chosen.kept.append(kept)
            chosen.totals.append(total)
        return chosen

    def _choose(self, inputs: HeldInputs, pinned: Tensor, budget: int, total: int) -> Kept:
        """Of a layer; ``pinned`` ``[1, Hkv, T]`` bool."""
        policy = self.rule.policy
        scores = policy.scorer.score(inputs)
        competing = Competing.of(policy, inputs, scores, pinned=pinned)
        shares = competing.shares(policy, inputs, (budget,))
        return competing.pick(policy, inputs, shares, total)

    def _budget(
        self, layer: int, held: Sequence[int], pinned: Sequence[int], computed: int
    ) -> tuple[int, int]:
        """Mean entries per kv head that stay of the text in a layer, and how many stay at most of
        all that its rows hold."""
        allocator, heads = self.rule.policy.allocator, len(held)
        budget = allocator.layers.budget(
            self.rule.budget,
            window=self.rule.policy.window,
            prompt_len=computed,
            layer=layer,
            num_layers=len(self._attentions),
        )
        most = allocator.total(budget, window=0, prompt_len=max(held), num_kv_heads=heads)
        return budget, min(sum(held), sum(pinned) + most)

    def _inputs(
        self, layer: int, view: Layer, longest: int, text: Text, computed: int, mean: int
    ) -> HeldInputs:
        attention, policy = self._attentions[layer], self.rule.policy
        w_o = self._w_o(layer) if self._w_o and "w_o" in policy.needs else None
        return _Inputs(
            Held(view, longest, self._dtype),
            self._newest(layer, text, computed),
            layer,
            len(self._attentions),
            attention=attention,
            w_o=w_o,
            budgets=(mean,),
        ).of(computed)

    def _newest(self, layer: int, text: Text, computed: int) -> Tensor:
        """The window's queries ``[1, Hq, W, D]``, the oldest first."""
        begin, oldest = text.place * self._window, computed % self._window
        assert self._queries is not None and text.place >= 0
        newest = self._queries[layer, begin : begin + self._window].roll(-oldest, 0)
        return newest.transpose(0, 1)[None]

    def _take_place(self) -> int:
        if not self._free:
            self._free = list(range(self._num_places, 2 * self._num_places + 1))
            self._num_places += len(self._free)
        return self._free.pop()

    def _leave(self, text: Text) -> None:
        if text.place >= 0:
            self._free.append(text.place)
            text.place = -1
        if len(self._free) == self._num_places:
            self._queries, self._free, self._num_places = None, [], 0


class _Inputs(HeldInputs):
    """What a row holds in an engine, whose pages have no positions: an entry's is its place, as
    many further on as have left the row."""

    num_tokens: int

    def of(self, num_tokens: int) -> _Inputs:
        """With the tokens of the request."""
        self.__dict__["num_tokens"] = num_tokens
        return self

    @cached_property
    def positions(self) -> Tensor:
        """``[B, Hkv, T]``"""
        places = torch.arange(self.length, dtype=torch.int32, device=self.device)
        return places + (self.num_tokens - self.held.lengths)[..., None]


def _by_layer(counts: Later, num_kv_heads: int) -> list[list[Any]]:
    flat = counts.tolist()
    return [flat[i : i + num_kv_heads] for i in range(0, len(flat), num_kv_heads)]
