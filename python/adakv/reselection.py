"""Chooses again while a text is written, so that its entries go back to their budget.

    text = Reselection(rule, prompt_lens, attention)    when the prompts are in pages
    text.begin_step(num_new, columns)                   before a step
    text.recent.put(layer, queries)                     in each layer of it: PlannedStep does
    text.choose(kv, slots)                              behind it, if it is due

What is chosen by is what the policy's scorer sees of the newest queries, which are kept in a ring.
The policy scores the entries where they lie and picks; what stays moves to lower slots of the same
pages, and those that are left over are free again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adakv.cache import KVCache, sequences
from adakv.entries import Held, HeldInputs
from adakv.errors import Error, integer
from adakv.policy import EveryTokens, Policy, get
from adakv.policy.again import (
    Competing,
    carries,
    check_chooses_again,
    check_unfolded,
    moved_scores,
    shares_of_all,
)
from adakv.policy.protection import Spans, mask_of
from adakv.recent import Recent, RecentQueries
from adakv.shape import Shape
from adakv.step import Attention

#: Has something read behind what the sequences in some slots hold, at most so many entries in a
#: row, and nothing of it stays. Gives its queries and keys in each layer, as
#: :attr:`adakv.policy.LayerInputs.repeat`.
Ask = Callable[[KVCache, slice, int], Sequence[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Rule:
    """How entries of a text are evicted while it is written.

    Parameters
    ----------
    policy : :class:`adakv.Policy`
        One whose scorer needs no more than the newest queries, keys, values and the output
        projection.
    budget : int
        Mean entries per kv head that stay of the text, its newest ``policy.window`` included.
    every : int
        Tokens from one choice to the next: rows hold up to ``budget + every`` entries of the text.
    pins_prompt : bool
        Whether all that was kept of the prompt stays, besides the budget. Else prompt and text
        share as many entries as both together would have.
    name : str
        What messages call the budget.
    """

    policy: Policy
    budget: int
    every: int = EveryTokens.every
    pins_prompt: bool = True
    name: str = "decode_budget"

    def __post_init__(self) -> None:
        check_chooses_again(self.policy, self.name)
        least = self.policy.window + self.policy.scorer.pinned
        object.__setattr__(self, "budget", integer(self.name, self.budget, least))
        object.__setattr__(self, "every", integer("every", self.every, 1))

    @classmethod
    def given(
        cls,
        policy: Policy,
        decode_policy: str | Policy | None,
        budget: int | None,
        every: int | None,
        pin_prompt: bool,
    ) -> Rule | None:
        """From what users give, ``policy`` for the prompt; None if all of a text stays, which is so
        without a budget."""
        chosen = get(policy if decode_policy is None else decode_policy)
        if not isinstance(pin_prompt, bool):
            raise ValueError(f"pin_prompt must be True or False, got {pin_prompt!r}")
        if budget is None:
            if chosen.when is not None or every is not None or decode_policy is not None:
                raise ValueError("decode_budget must be given if a text is to be chosen from")
            return None
        check_unfolded(policy, "decode_budget")
        if every is None:
            every = EveryTokens.every if chosen.when is None else chosen.when.every
        return cls(chosen, budget, every, pin_prompt)

    @property
    def arguments(self) -> dict[str, Any]:
        """What :meth:`given` makes it of, by the names that users give."""
        return {
            "decode_policy": self.policy,
            "decode_budget": self.budget,
            "every": self.every,
            "pin_prompt": self.pins_prompt,
        }

    @property
    def most(self) -> int:
        """Tokens of a text that rows hold at most, all kv heads on average."""
        return self.budget + self.every

    def most_in_row(self, shape: Shape) -> int:
        """Tokens of a text that one row holds at most: all that stays of it where one budget is
        shared out, and what is new."""
        return self.shared(shape.num_kv_heads, shape.num_layers) + self.every

    def shared(self, num_kv_heads: int, num_layers: int) -> int:
        """Entries of a text that are shared out among the rows of a layer, or of the model."""
        layers = num_layers if self.policy.is_model_wide else 1
        return layers * num_kv_heads * self.budget

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
    attention : one :class:`adakv.step.Attention` for each layer
    written : ints ``[B]``, optional
        Tokens of the texts that were read and chosen from already. Default: none.
    protected : spans of each sequence, optional
        Tokens that stay, counted from the beginning of the sequence.
    ask : callable, optional
        For policies that need "repeat". Then ``written`` were not chosen from yet.
    """

    def __init__(
        self,
        rule: Rule,
        prompt_lens: Sequence[int],
        attention: Sequence[Attention],
        *,
        written: Sequence[int] = (),
        protected: Sequence[Spans] = (),
        ask: Ask | None = None,
    ) -> None:
        num_layers = len(attention)
        self.rule = rule
        self.recent: Recent = RecentQueries(rule.num_queries, num_layers)
        """The newest queries of the texts."""
        self._ask = ask
        self._attention = attention
        self._num_layers = num_layers
        self._protected = protected if any(protected) else ()
        self._prompt_lens = list(prompt_lens)
        self._prompt_totals: list[list[int]] = []  # [L][B] entries kept of prompts
        self._prompt_rows: list[int] = []  # [B] most that a row may hold of them
        self._carried: list[Tensor | None] = [None] * num_layers  # [B, Hkv, T, ...]
        self._written = [*written] or [0] * len(prompt_lens)  # tokens of the texts
        # By the last choice, in each layer.
        most = max(self._written) if ask else rule.budget
        self._left = [[min(n, most) for n in self._written] for _ in attention]
        if written:
            self._prompt_totals = [[0] * len(prompt_lens) for _ in attention]
            self._prompt_rows = [0] * len(prompt_lens)
        self._held = list(self._left[0])  # entries of a text, mean over heads and layers
        self._new = [0] * len(prompt_lens)  # tokens since then
        self._unheard = 0  # tokens whose queries no score has heard

    def of_branches(self, sources: Sequence[int]) -> Reselection:
        """The texts ``sources``, which go on by themselves."""
        branches, lists = copy.copy(self), ("_prompt_lens", "_written", "_held", "_new")
        for name in lists:
            setattr(branches, name, [getattr(self, name)[b] for b in sources])
        branches._prompt_rows = [self._prompt_rows[b] for b in sources if self._prompt_rows]
        for name in ("_prompt_totals", "_left"):
            setattr(branches, name, [[x[b] for b in sources] for x in getattr(self, name)])
        branches._protected = [self._protected[b] for b in sources] if self._protected else ()
        branches._carried = [None if x is None else x[list(sources)] for x in self._carried]
        assert isinstance(self.recent, RecentQueries)
        branches.recent = self.recent.of_branches(sources)
        return branches

    def to(self, device: torch.device) -> Reselection:
        """The same texts, whose pages are on another device now."""
        there = copy.copy(self)
        there._carried = [None if x is None else x.to(device) for x in self._carried]
        assert isinstance(self.recent, RecentQueries)
        there.recent = self.recent.to(device)
        return there

    def begin_step(self, num_new: Sequence[int], columns: int) -> None:
        """A step comes whose last ``num_new[b]`` columns are tokens of each sequence."""
        self.recent.advance(num_new, columns)
        self._new, self._written, self._held = (
            [had + n for had, n in zip(counts, num_new, strict=True)]
            for counts in (self._new, self._written, self._held)
        )
        self._unheard += max(num_new)

    @property
    def num_sequences(self) -> int:
        """How many texts there are."""
        return len(self._prompt_lens)

    @property
    def _is_full(self) -> bool:
        """Whether a text holds ``every`` entries more than its budget."""
        return self.num_until_full <= 0

    @property
    def num_until_full(self) -> int:
        """Tokens until a text holds ``every`` more than its budget."""
        return self.rule.most - max(self._held, default=0)

    @property
    def is_due(self) -> bool:
        """Whether :meth:`choose` has something to do."""
        return self._is_full or (self.rule.carries and self._unheard >= self.rule.every)

    def choose(self, kv: KVCache, slots: slice) -> None:
        """Brings the rows of the texts, which lie in some slots of ``kv``, back to their budget.

        Raises
        ------
        ValueError
            If more is protected than a budget has room for. Nothing changes.
        adakv.Error
            If there is no memory for pages that come to those held, where hardly anything leaves.
            Nothing changes.
        """
        lengths = kv.all_layers.lengths[:, slots].tolist()  # [L][B][Hkv]; waits for the device
        longest = [max(map(max, rows)) for rows in zip(*lengths, strict=True)]
        most = -(-max(longest) // kv.page_size) * kv.page_size
        if not self._is_full:
            for layer in range(self._num_layers):
                self._carried[layer] = self._scores(self._inputs(kv, slots, layer, most))[1]
            self._unheard = 0
            return
        self._count_prompts(lengths)
        if not self.rule.pins_prompt:
            self._check_room(kv.num_kv_heads)
        policy = self.rule.policy
        plans = [self._plan(layer, rows, most) for layer, rows in enumerate(lengths)]
        asked = None if self._ask is None else self._ask(kv, slots, max(longest))

        def inputs_of(layer: int) -> HeldInputs:
            means = tuple(total // kv.num_kv_heads for total in plans[layer].totals)
            repeat = None if asked is None else asked[layer]
            return self._inputs(kv, slots, layer, most, budgets=means, repeat=repeat)

        totals = [plan.totals for plan in plans]
        scored: list[_Scored] = []
        shares: list[Tensor] = []
        if policy.is_model_wide:
            scored = [self._scored(inputs_of(layer)) for layer in range(len(plans))]
            layers = [of_layer.competing for of_layer in scored]
            shares = shares_of_all(policy, layers, tuple(plans[0].budgets))
            totals = torch.stack(shares).sum(-1).tolist()  # waits for the device
        shared = self.rule.shared(kv.num_kv_heads, self._num_layers)
        after = [min(n, row + shared) for n, row in zip(longest, self._prompt_rows, strict=True)]
        page_ids, page_indptr = begin_again(kv, totals, after, slots.start)
        for layer, plan in enumerate(plans):
            inputs = inputs_of(layer)
            competing, carried = scored[layer] if scored else self._scored(inputs)
            if shares:
                share = shares[layer]
            else:
                share = competing.shares(policy, inputs, tuple(plan.budgets))
            kept = competing.pick(policy, inputs, share, sum(totals[layer]))
            inputs.held.compact(kept, page_ids, page_indptr[layer])
            if carried is not None:
                self._carried[layer] = moved_scores(carried, kept)
            self._left[layer] = plan.left
        self._held = [min(n, self.rule.budget) for n in self._held]
        self._new = [0] * len(self._new)
        self._unheard = 0

    def _scored(self, inputs: HeldInputs) -> _Scored:
        """What rows hold, with its scores."""
        policy, held = self.rule.policy, inputs.held
        scores, carried = self._scores(inputs)
        marks = {"pinned": self._pinned(held), "protected": self._marked(held)}
        competing = Competing.of(policy, inputs, scores, **marks)
        return _Scored(competing, carried)

    def _scores(self, inputs: HeldInputs) -> tuple[Tensor, Tensor | None]:
        """``[B, Hkv, T]``, and what the scorer wants to be handed the next time."""
        scorer: Any = self.rule.policy.scorer
        return scorer.carry(inputs) if self.rule.carries else (scorer.score(inputs), None)

    def _count_prompts(self, lengths: Sequence[Sequence[Sequence[int]]]) -> None:
        """What was kept of the prompts, before anything of the texts is evicted."""
        if not self._prompt_totals:
            self._prompt_totals = [
                [sum(row) - len(row) * n for row, n in zip(rows, self._written, strict=True)]
                for rows in lengths
            ]
            for b, written in enumerate(self._written):
                row = max(max(rows[b]) for rows in lengths) - written
                totals = [of_layer[b] for of_layer in self._prompt_totals]
                if not self.rule.pins_prompt:  # one row may get all that is shared out
                    row = sum(totals) if self.rule.policy.is_model_wide else max(totals)
                self._prompt_rows.append(row)

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
            budget = limit
            if not self.rule.pins_prompt:
                budget += self._of_prompt(layer, b) // len(row)
            budget = most if text <= limit else budget
            total = allocator.total(budget, window=0, prompt_len=max(row), num_kv_heads=len(row))
            pinned = prompt if self.rule.pins_prompt else 0
            plan.budgets.append(budget)
            plan.totals.append(min(sum(row), pinned + total))
            plan.left.append(min(text, limit))
        return plan

    def _of_prompt(self, layer: int, b: int) -> int:
        """Entries kept of a prompt for which a layer has room if they may leave: its own, or the
        mean over the layers if these share."""
        totals = [of_layer[b] for of_layer in self._prompt_totals]
        is_wide = self.rule.policy.is_model_wide
        return sum(totals) // self._num_layers if is_wide else totals[layer]

    def _inputs(self, kv: KVCache, slots: slice, layer: int, most: int, **known: Any) -> HeldInputs:
        """What a layer's rows hold, as the policy takes it, with what else is ``known``."""
        rule, attention = self.rule, self._attention[layer]
        held = Held(sequences(kv.layers[layer], slots), most, kv.dtype)
        count = min(self._unheard, rule.num_queries) if rule.carries else rule.policy.window
        return HeldInputs(
            held,
            self.recent.last(layer, count),
            layer,
            self._num_layers,
            attention=attention,
            w_o=attention.w_o() if attention.w_o and "w_o" in rule.policy.needs else None,
            carried=self._carried_to(layer, held) if rule.carries else None,
            **known,
        )

    def _carried_to(self, layer: int, held: Held) -> Tensor | None:
        """What the scorer knew the last time, ``[B, Hkv, T, ...]``, 0 of what is newer."""
        before = self._carried[layer]
        if before is None:
            return None
        carried = before.new_zeros(*held.lengths.shape, held.longest, *before.shape[3:])
        length = min(before.shape[2], held.longest)
        carried[:, :, :length] = before[:, :, :length]
        return carried

    def _pinned(self, held: Held) -> Tensor | None:
        """``[B, Hkv, T]`` bool: what always stays of what rows hold."""
        if not self.rule.pins_prompt:
            return None
        ends = torch.tensor(self._prompt_lens, dtype=torch.int32).to(held.positions.device)
        return held.positions < ends[:, None, None]

    def _check_room(self, num_kv_heads: int) -> None:
        """Raises ``ValueError`` if more is protected than a kv head has room for."""
        for b, spans in enumerate(self._protected):
            of_prompt = min(self._of_prompt(x, b) for x in range(self._num_layers)) // num_kv_heads
            room = self.rule.budget + of_prompt
            seen = self._prompt_lens[b] + self._written[b]
            count = sum(max(min(end, seen) - begin, 0) for begin, end in spans)
            least = self.rule.policy.window + self.rule.policy.scorer.pinned + count
            if count and least > room:
                raise ValueError(
                    f"protect: sequence {b} has {count} protected tokens; with what always stays "
                    f"{least} must stay in every kv head, and {self.rule.name} leaves room for "
                    f"{room}: protect less, or give a larger one"
                )

    def _marked(self, held: Held) -> Tensor | None:
        """``[B, Hkv, T]`` bool: what is protected of what rows hold."""
        if not self._protected:
            return None
        length = 1 + max(map(sum, zip(self._prompt_lens, self._written, strict=True)))
        mask = mask_of(self._protected, length, held.positions.device)
        places = held.positions.clamp(0, length - 1).long()
        return mask[:, None].expand(-1, places.shape[1], -1).gather(2, places)


class _Scored(NamedTuple):
    """What rows of a layer hold, with its scores."""

    competing: Competing
    carried: Tensor | None  # what the scorer wants to be handed again


class _Plan(NamedTuple):
    """What is kept of each sequence in a layer, known to the host."""

    budgets: list[int]  # mean entries per kv head, of what competes
    totals: list[int]  # most entries, all kv heads together
    left: list[int]  # mean entries per kv head of the text


def begin_again(
    kv: KVCache, totals: list[list[int]], longest: list[int], first_sequence: int
) -> tuple[Tensor, Tensor]:
    """Pages for what stays. The pool grows if there are too few, as may be where little leaves."""
    try:
        return kv.begin_again(totals, longest, first_sequence=first_sequence)
    except Error:
        missing = sum(
            max(kv.pages_for(n, 0, num_kv_heads=kv.num_kv_heads, page_size=kv.page_size) - owned, 0)
            for layer, of_layer in enumerate(totals)
            for n, owned in zip(of_layer, kv.num_owned(layer, first_sequence), strict=False)
        )
        if missing <= kv.num_free:
            raise
    kv.reserve(num_pages=kv.num_pages + missing - kv.num_free)
    return kv.begin_again(totals, longest, first_sequence=first_sequence)
