"""Texts that an engine's requests write: what is kept of them while they are written.

    begin()     when a prompt has ended
    choose()    in each step behind it
    ask()       which queries of a step have to be remembered, and put() them

When a text has its budget and ``every`` tokens more, the scheduler orders a choice, as it orders a
prompt to be compressed. It is made at the beginning of a step, of all texts that are due, layer by
layer: the newest queries score what rows hold, where it lies. What stays moves to lower slots of
its row, and what then lies in blocks that go back moves to the first ones, page by page (see
plan.py).

Queries are remembered from a window before a choice on, and then forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from adakv.entries import Held, HeldInputs
from adakv.ops import Kept, Layer
from adakv.policy.again import Competing
from adakv.reselection import Rule
from adakv.step import Attention
from adakv.vllm.later import Later
from adakv.vllm.plan import Plan, Scheduler, end_of_text
from adakv.vllm.rows import Rows
from adakv.vllm.steps import Asked, Batch, sent

#: Slots of a kv head, of all texts together, that a choice looks at: it may copy what they hold.
MOST_SLOTS = 65536
#: Rows of all layers that are compacted at once; CUDA's grids have no more than 65535.
MOST_ROWS = 32768


class Counts(NamedTuple):
    """Entries of a text's rows, counted together with those of others."""

    of_all: Later  # [n, L, Hkv]
    place: int

    def tolist(self) -> list[list[int]]:
        """``[L][Hkv]``"""
        of_text: list[list[int]] = self.of_all.tolist()[self.place]
        return of_text


@dataclass
class Text:
    """A request whose prompt has ended, and whose text is chosen from.

    Rows hold entries of the prompt, which stay, and behind them those of the text.
    """

    first_block: int
    blocks: list[int]  # those of its blocks, by number, that hold what is kept
    boundary: int  # tokens before the step that compressed it last, or where its prompt ended
    due: int  # tokens from which on a choice may be ordered
    of_prompt: Counts  # entries of each row
    lengths: Counts  # entries of each row at the boundary
    place: int = -1  # where its queries are remembered


class Due(NamedTuple):
    """A text that is chosen from in this step."""

    row: int  # of the batch
    text: Text
    computed: int  # its tokens before the step
    next_due: int
    of_prompt: list[list[int]]  # [L][Hkv]
    held: list[list[int]]  # [L][Hkv], entries of each row

    @property
    def longest(self) -> int:
        """Entries of its longest row."""
        return max(map(max, self.held))


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

    def begin(
        self, request: int, first_block: int, boundary: int, due: int, planned: Plan | None
    ) -> None:
        """The prompt of a request has ended, and is compressed as ``planned``, if it will be."""
        rows = self._rows
        end = end_of_text(
            boundary,
            planned,
            decode_budget=self.rule.budget,
            block_size=rows.block_size,
            num_kv_heads=rows.num_dealt_among,
        )
        gap = range(0) if planned is None else range(*planned)
        blocks = [block for block in range(end) if block not in gap]
        counts = Counts(Later(rows.begin_text(first_block, boundary)[None]), 0)
        self._texts[request] = Text(first_block, blocks, boundary, due, counts, counts)

    def choose(self, batch: Batch, requests: Mapping[int, int]) -> None:
        """Chooses from the texts of some requests, given by their rows of the batch, as far as the
        scheduler has ordered it for this step.

        Raises
        ------
        adakv.Error
            If the scheduler thinks that one was compressed last with another number of tokens.
        """
        due: dict[int, list[Due]] = {}  # by the number of new tokens
        for row, request in requests.items():
            text, computed = self._texts.get(request), batch.computed[row]
            if text is None or computed < text.due:
                continue
            order = self._scheduler.order(text.first_block, text.boundary, computed)
            if order is None or order.at != computed:
                continue
            written, of_prompt = computed - text.boundary, text.of_prompt.tolist()
            held = [[n + written for n in of_layer] for of_layer in text.lengths.tolist()]
            count = batch.query_start[row + 1] - batch.query_start[row]
            it = Due(row, text, computed, order.due, of_prompt, held)
            due.setdefault(count, []).append(it)
        for count, texts in due.items():
            for some in together(texts):
                self._choose(batch, some, count)

    def _choose(self, batch: Batch, due: Sequence[Due], new_tokens: int) -> None:
        """From texts that all have so many new tokens in this step."""
        rows = self._rows
        own = sent([it.row for it in due], batch.block_table.device)
        tables, _ = rows.tables(batch, own, new_tokens)
        kept, most = self._kept(due, rows.layers(tables))
        lengths = rows.choose(
            kept,
            most,
            tables,
            batch.block_table[own],
            [it.text.blocks for it in due],
            [it.computed for it in due],
        )
        counts = Later(lengths.transpose(0, 1).contiguous())
        for number, (_, text, computed, next_due, *_) in enumerate(due):
            text.boundary, text.due, text.lengths = computed, next_due, Counts(counts, number)
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

    def _kept(self, due: Sequence[Due], layers: Sequence[Layer]) -> tuple[list[Kept], int]:
        """What each layer keeps of texts, whose rows ``layers`` describe before the step; and at
        least as many as these are in all."""
        policy, device = self.rule.policy, layers[0].lengths.device
        heads, size = layers[0].lengths.shape[1], self._rows.block_size
        longest = -(-max(it.longest for it in due) // size) * size
        of_prompt = [[it.of_prompt[layer] for it in due] for layer in range(len(layers))]
        ends = sent(of_prompt, device)[..., None]  # [L, B, Hkv, 1]
        places = torch.arange(longest, device=device)
        computed = sent([it.computed for it in due], device).int()
        newest, queries = self._newest(due, device), self._queries
        kept: list[Kept] = []
        most = 0
        assert queries is not None
        for layer, view in enumerate(layers):
            limits = [self._limits(layer, it) for it in due]
            totals = [total for _, total in limits]
            inputs = _Inputs(
                Held(view, longest, self._dtype),
                queries[layer][newest].transpose(1, 2),
                layer,
                len(layers),
                attention=self._attentions[layer],
                w_o=self._w_o(layer) if self._w_o and "w_o" in policy.needs else None,
                budgets=tuple(total // heads for total in totals),
            ).of(computed)
            scores = policy.scorer.score(inputs)
            competing = Competing.of(policy, inputs, scores, pinned=places < ends[layer])
            shares = competing.shares(policy, inputs, tuple(budget for budget, _ in limits))
            kept.append(competing.pick(policy, inputs, shares, sum(totals)))
            most += sum(totals)
        return kept, most

    def _limits(self, layer: int, it: Due) -> tuple[int, int]:
        """Mean entries per kv head that stay of a text in a layer, and how many stay at most of all
        that its rows hold."""
        policy, held = self.rule.policy, it.held[layer]
        allocator, heads = policy.allocator, len(held)
        budget = allocator.layers.budget(
            self.rule.budget,
            window=policy.window,
            prompt_len=it.computed,
            layer=layer,
            num_layers=len(self._attentions),
        )
        most = allocator.total(budget, window=0, prompt_len=max(held), num_kv_heads=heads)
        return budget, min(sum(held), sum(it.of_prompt[layer]) + most)

    def _newest(self, due: Sequence[Due], device: torch.device) -> Tensor:
        """Where the window's queries of texts are remembered, ``[B, W]``, the oldest first."""
        window = self._window
        assert all(it.text.place >= 0 for it in due)
        places = [
            [it.text.place * window + (it.computed + i) % window for i in range(window)]
            for it in due
        ]
        return sent(places, device)

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

    num_tokens: Tensor

    def of(self, num_tokens: Tensor) -> _Inputs:
        """With the tokens ``[B]`` of each request."""
        self.__dict__["num_tokens"] = num_tokens
        return self

    @cached_property
    def positions(self) -> Tensor:
        """``[B, Hkv, T]``"""
        places = torch.arange(self.length, dtype=torch.int32, device=self.device)
        return places + (self.num_tokens[:, None] - self.held.lengths)[..., None]


def together(due: Sequence[Due]) -> Iterator[list[Due]]:
    """Texts in their order, as many at a time as one choice is made from."""
    some: list[Due] = []
    for it in due:
        slots = max(other.longest for other in [*some, it]) * (len(some) + 1)
        rows = sum(map(len, it.held)) * (len(some) + 1)
        if some and (slots > MOST_SLOTS or rows > MOST_ROWS):
            yield some
            some = []
        some.append(it)
    if some:
        yield some
