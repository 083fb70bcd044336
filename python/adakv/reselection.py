"""Chooses again while a text is written, so that its entries go back to their budget.

    recent = RecentQueries(...)               as many as the policy looks at
    text = Reselection(rule, prompt_lens)     when the prompts are in pages
    recent.advance(columns)                   before a step
    recent.put(layer, queries, attention)     in each layer of it: PlannedStep does
    text.advance(num_new)                     behind it
    text.choose(kv, slots, recent)            if it is due

What is chosen by is what the policy's scorer sees of the newest queries, which are kept in a ring.
The entries of a layer are read out of their pages, the policy picks, and what stays is compacted
into other pages; those of before are free again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from adakv.cache import KVCache, sequences
from adakv.entries import Held
from adakv.errors import integer
from adakv.ops import Kept
from adakv.policy import LayerInputs, Policy
from adakv.policy.again import carries, check_chooses_again, choose_again
from adakv.step import Attention


class RecentQueries:
    """The last W queries of each layer, in a ring ``[B, Hq, W, D]`` that steps write to.

    All it does in a step are operations on tensors that stay where they are, so that a step can be
    recorded in a CUDA graph.
    """

    def __init__(self, window: int, num_layers: int, device: torch.device) -> None:
        self._window = window
        self._rings: list[Tensor | None] = [None] * num_layers
        self.attention = [Attention()] * num_layers
        """How each layer attends."""
        self._next = torch.zeros(1, dtype=torch.int64, device=device)  # where the next query goes
        self._columns = self._next
        self._fresh: Tensor | None = None  # [B] int64 columns of this step that are tokens

    def advance(self, columns: int, num_new: Tensor | None = None) -> None:
        """A step of so many columns comes: counted from the right, ``num_new`` ``[B]`` of them are
        tokens of each sequence."""
        offsets = torch.arange(max(columns - self._window, 0), columns, device=self._next.device)
        self._columns = (self._next + offsets) % self._window
        self._next.add_(columns).remainder_(self._window)
        self._fresh = None if num_new is None or columns == 1 else num_new.long()

    def put(self, layer: int, queries: Tensor, attention: Attention) -> None:
        """The queries ``[B, Hq, S, D]`` of the step's columns, and how the layer attends."""
        self.attention[layer] = attention
        ring = self._rings[layer]
        if ring is None:
            batch, heads, _, head_dim = queries.shape
            ring = queries.new_zeros(batch, heads, self._window, head_dim)
            self._rings[layer] = ring
        if self._fresh is None:
            ring.index_copy_(2, self._columns, queries[:, :, -self._window :])
        else:
            ring.copy_(self._moved(ring, queries, self._fresh[:, None]))

    def _moved(self, ring: Tensor, queries: Tensor, num_new: Tensor) -> Tensor:
        """A ring in which each sequence's own last queries are, where columns may be padding."""
        columns = queries.shape[2]
        step = torch.arange(self._window, device=ring.device)
        before = ring.index_select(2, (self._next - columns + step) % self._window)
        place = num_new + (step - self._next) % self._window  # [B, W] among all tokens' queries
        place = place.where(place < self._window, place + columns - num_new)
        shape = (*ring.shape[:2], self._window, ring.shape[3])
        return torch.cat([before, queries], 2).gather(2, place[:, None, :, None].expand(shape))

    def last(self, layer: int, sequences: slice, count: int) -> Tensor:
        """The last ``count <= W`` of some sequences, ``[B, Hq, count, D]``, the oldest first."""
        ring = self._rings[layer]
        assert ring is not None
        order = (self._next - torch.arange(count, 0, -1, device=ring.device)) % self._window
        return ring[sequences].index_select(2, order)


@dataclass(frozen=True)
class Rule:
    """How entries of a text are evicted while it is written.

    Parameters
    ----------
    policy : :class:`adakv.Policy`
        One whose scorer needs no more than the newest queries, keys, values and the output
        projection, and that shares budgets out layer by layer.
    budget : int
        Mean entries per kv head that stay of the text, its newest ``policy.window`` included.
    every : int
        Tokens from one choice to the next: rows hold up to ``budget + every`` entries of the text.
    pins_prompt : bool
        Whether all that was kept of the prompt stays, besides the budget. Else prompt and text
        share as many entries as both together would have.
    """

    policy: Policy
    budget: int
    every: int = 128
    pins_prompt: bool = True

    def __post_init__(self) -> None:
        check_chooses_again(self.policy)
        least = self.policy.window + self.policy.scorer.pinned
        object.__setattr__(self, "budget", integer("decode_budget", self.budget, least))
        object.__setattr__(self, "every", integer("every", self.every, 1))

    @property
    def carries(self) -> bool:
        """Whether scores are those of before and what the new queries add."""
        return carries(self.policy)

    @property
    def num_queries(self) -> int:
        """Newest queries of each layer that a choice reads at most."""
        return max(self.policy.window, self.every if self.carries else 1)


class Reselection:
    """Texts behind some prompts, which take their steps together.

    Parameters
    ----------
    rule : :class:`Rule`
    prompt_lens : ints ``[B]``
        Tokens of the prompts, which are in pages.
    num_layers : int
    """

    def __init__(self, rule: Rule, prompt_lens: Sequence[int], num_layers: int) -> None:
        self.rule = rule
        self._num_layers = num_layers
        self._prompt_lens = list(prompt_lens)
        self._prompt_totals: list[list[int]] = []  # [L][B] entries kept of prompts
        self._carried: list[Tensor | None] = [None] * num_layers  # scores [B, Hkv, T]
        self._written = [0] * len(prompt_lens)  # tokens of the texts
        self._left = [[0] * len(prompt_lens) for _ in range(num_layers)]  # by the last choice
        self._new = [0] * len(prompt_lens)  # tokens since then
        self._unheard = 0  # tokens whose queries no score has heard

    def advance(self, num_new: Sequence[int]) -> None:
        """A step has appended ``num_new[b]`` tokens to each sequence."""
        self._new = [had + n for had, n in zip(self._new, num_new, strict=True)]
        self._written = [had + n for had, n in zip(self._written, num_new, strict=True)]
        self._unheard += max(num_new)

    @property
    def _is_full(self) -> bool:
        """Whether a row holds ``every`` entries more than its budget, on average."""
        most = self.rule.budget + self.rule.every
        return any(
            min(text, self.rule.budget + new) >= most
            for text, new in zip(self._written, self._new, strict=True)
        )

    @property
    def is_due(self) -> bool:
        """Whether :meth:`choose` has something to do."""
        return self._is_full or (self.rule.carries and self._unheard >= self.rule.every)

    def choose(self, kv: KVCache, slots: slice, recent: RecentQueries) -> None:
        """Brings the rows of some slots of ``kv`` back to their budget; ``recent`` has their
        queries in the same slots.

        Raises
        ------
        adakv.Error
            If there is no memory for what stays, beside what is held. Nothing changes.
        """
        lengths = kv.all_layers.lengths[:, slots].tolist()  # [L][B][Hkv]; waits for the device
        longest = [max(map(max, rows)) for rows in zip(*lengths, strict=True)]
        most = -(-max(longest) // kv.page_size) * kv.page_size
        if not self._is_full:
            for layer in range(self._num_layers):
                inputs, _ = self._inputs(kv, slots, layer, most, recent)
                self._carried[layer] = self.rule.policy.scorer.score(inputs)
            self._unheard = 0
            return
        self._count_prompts(lengths)
        plans = [self._plan(layer, rows, most) for layer, rows in enumerate(lengths)]
        totals = [plan.totals for plan in plans]
        page_ids, page_indptr = _begin_again(kv, totals, longest, slots.start)
        for layer, plan in enumerate(plans):
            inputs, held = self._inputs(kv, slots, layer, most, recent)
            scores = self.rule.policy.scorer.score(inputs)
            kept = choose_again(
                self.rule.policy,
                inputs,
                scores,
                tuple(plan.budgets),
                pinned=self._pinned(held),
                total=sum(plan.totals),
            )
            view = sequences(kv.layers[layer], slots)
            held.compact(kept, view, page_ids, page_indptr[layer])
            if self.rule.carries:
                self._carried[layer] = _moved(scores, kept)
            self._left[layer] = plan.left
        self._new = [0] * len(self._new)
        self._unheard = 0

    def _count_prompts(self, lengths: Sequence[Sequence[Sequence[int]]]) -> None:
        """What was kept of the prompts, before anything of the texts is evicted."""
        if not self._prompt_totals:
            self._prompt_totals = [
                [sum(row) - len(row) * n for row, n in zip(rows, self._written, strict=True)]
                for rows in lengths
            ]

    def _plan(self, layer: int, lengths: Sequence[Sequence[int]], most: int) -> _Plan:
        """What each sequence keeps in a layer, whose rows hold ``lengths`` ``[B][Hkv]``."""
        plan = _Plan([], [], [])
        allocator = self.rule.policy.allocator
        for b, row in enumerate(lengths):
            text, prompt = self._left[layer][b] + self._new[b], self._prompt_totals[layer][b]
            limit = allocator.layers.budget(
                self.rule.budget,
                window=self.rule.policy.window,
                prompt_len=self._written[b],
                layer=layer,
                num_layers=self._num_layers,
            )
            budget = limit if self.rule.pins_prompt else limit + prompt // len(row)
            budget = most if text <= limit else budget
            total = allocator.total(budget, window=0, prompt_len=max(row), num_kv_heads=len(row))
            pinned = prompt if self.rule.pins_prompt else 0
            plan.budgets.append(budget)
            plan.totals.append(min(sum(row), pinned + total))
            plan.left.append(min(text, limit))
        return plan

    def _inputs(
        self, kv: KVCache, slots: slice, layer: int, most: int, recent: RecentQueries
    ) -> tuple[LayerInputs, Held]:
        """What a layer's rows hold, as the policy takes it."""
        rule = self.rule
        held = Held.read(sequences(kv.layers[layer], slots), most, kv.dtype)
        count = min(self._unheard, rule.num_queries) if rule.carries else rule.policy.window
        attention = recent.attention[layer]
        inputs = LayerInputs(
            recent.last(layer, slots, count),
            held.keys,
            held.values,
            attention.w_o() if attention.w_o and "w_o" in rule.policy.needs else None,
            (most,) * len(held.keys),
            layer,
            self._num_layers,
            seq_lens=held.lengths,
            attention=attention,
            positions=held.positions,
            carried=self._carried_to(layer, held) if rule.carries else None,
        )
        return inputs, held

    def _carried_to(self, layer: int, held: Held) -> Tensor:
        """The scores of the last time, ``[B, Hkv, T]``, 0 of what is newer."""
        carried = held.keys.new_zeros(held.keys.shape[:3], dtype=torch.float32)
        before = self._carried[layer]
        if before is not None:
            length = min(before.shape[2], carried.shape[2])
            carried[..., :length] = before[..., :length]
        return carried

    def _pinned(self, held: Held) -> Tensor | None:
        """``[B, Hkv, T]`` bool: what always stays of what rows hold."""
        if not self.rule.pins_prompt:
            return None
        ends = torch.tensor(self._prompt_lens, dtype=torch.int32).to(held.positions.device)
        slots = torch.arange(held.positions.shape[2], device=ends.device)
        is_held = slots < held.lengths[..., None]
        return is_held & (held.positions < ends[:, None, None])


class _Plan(NamedTuple):
    """What is kept of each sequence in a layer, known to the host."""

    budgets: list[int]  # mean entries per kv head, of what competes
    totals: list[int]  # most entries, all kv heads together
    left: list[int]  # mean entries per kv head of the text


def _begin_again(
    kv: KVCache, totals: list[list[int]], longest: list[int], first_sequence: int
) -> tuple[Tensor, Tensor]:
    """Pages for what stays; the pool grows if there are too few."""
    needed = sum(
        kv.pages_for(total, 0, num_kv_heads=kv.num_kv_heads, page_size=kv.page_size)
        for of_layer in totals
        for total in of_layer
    )
    if needed > kv.num_free:
        kv.reserve(num_pages=kv.num_pages + needed - kv.num_free)
    return kv.begin_again(totals, longest, first_sequence=first_sequence)


def _moved(scores: Tensor, kept: Kept) -> Tensor:
    """Scores ``[B, Hkv, T]`` as ``[B, Hkv, T + 1]`` where their entries lie now, 0 behind them."""
    batch, heads, length = scores.shape
    rows = kept.rows(batch * heads)
    places = torch.arange(len(rows), device=rows.device) - kept.indptr[rows]
    moved = scores.new_zeros(batch * heads, length + 1)
    values = scores.view(batch * heads, length)[rows, kept.positions.clamp(min=0).long()]
    moved[rows, places.clamp(max=length)] = values.where(kept.positions >= 0, 0.0)
    return moved.view(batch, heads, length + 1)
