"""The scheduler's half: a cache spec that carries the plan's numbers, and the manager that gives
blocks back by it.

A request's boundary is its number of tokens when it is first scheduled behind its prompt. The
manager learns it from the one call that names the tokens of the step about to run, in-flight steps
included. There it also gives the order to compress the request: in that step, or, under pressure,
in a later one, when running requests or one that waits will be short of blocks. It frees only when
the step that compresses has been processed: until then workers read the blocks.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec
from vllm.v1.request import Request

from adakv.vllm.ledger import Ledger, remove_at_exit, remove_unused
from adakv.vllm.notes import Cut, Notes
from adakv.vllm.plan import Order, Plan, end_of_text, most_kept_blocks, plan
from adakv.vllm.prefix import PrefixManager
from adakv.vllm.requests import Limits, Wishes

_logger = logging.getLogger("adakv")

# vLLM registers its own specs only while there are none: before ours.
register_all_kvcache_specs(None)


class CompressedManager(PrefixManager):
    """Blocks of requests whose prompts are compressed by workers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._begun: set[str] = set()
        self._is_queue = False  # a request could not come in
        self._notes: defaultdict[str, Notes] = defaultdict(Notes)
        spec = self.kv_cache_spec
        self.own_blocks = most_kept_blocks(
            budget=spec.budget, block_size=self.block_size, num_kv_heads=spec.rows_of_layer
        )
        remove_unused()
        name = spec.ledger
        self._ledger = Ledger.open(name, self.block_pool.num_gpu_blocks)
        remove_at_exit(name)

    def plan(self, boundary: int, budget: int | None = None) -> Plan | None:
        """What a request with that boundary keeps; as the workers compute it."""
        spec = self.kv_cache_spec
        return plan(
            boundary,
            budget=spec.budget if budget is None else budget,
            block_size=self.block_size,
            num_kv_heads=spec.rows_of_layer,
        )

    def boundary(self, request_id: str) -> int | None:
        """Where the prompt of a running request ended, once a step behind it was planned."""
        return self._notes[request_id].boundary if request_id in self._notes else None

    def compressed_at(self, request_id: str) -> int | None:
        """Tokens of a running request before the step that compressed it, once it is planned."""
        return self._notes[request_id].at if request_id in self._notes else None

    def last_choice(self, request_id: str) -> int | None:
        """Tokens of a running request before the step that chose from its text last."""
        notes = self._notes[request_id] if request_id in self._notes else Notes()
        return notes.last if notes.last != notes.boundary else None

    def new_step_starts(self) -> None:
        """Under pressure, has requests compressed before the running ones are short of blocks."""
        super().new_step_starts()
        if not self.kv_cache_spec.under_pressure:
            return
        if asked := self._ask(self._to_come() - self._free_soon()):
            self._ledger.add(preemptions_avoided=asked)

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Frees what a compressed request gave up, once the step that did it has been processed."""
        if num_prompt_tokens is None:
            return
        notes = self._notes[request_id]
        notes.prompt = num_prompt_tokens
        cut = notes.cut
        if cut is None or processed_computed_tokens <= cut.at:
            return
        self._ledger.check_done(self.req_to_blocks[request_id][0].block_id, cut.boundary)
        notes.cut, notes.gain = None, 0.0
        free = self.block_pool.get_num_free_blocks()
        self._remove_blocks_in_range(request_id, cut.blocks.start, cut.blocks.stop)
        is_prompt = not cut.is_text and notes.planned is not None
        self._ledger.add(
            requests_compressed=int(is_prompt),
            texts_compressed=int(cut.is_text),
            blocks_given_back=self.block_pool.get_num_free_blocks() - free,
            compressed_under_pressure=int(is_prompt and self.kv_cache_spec.under_pressure),
        )

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Any,
        total_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Also gives orders: ``total_computed_tokens`` are those before the next step.

        For a request that wants to come in, with the blocks that running ones will need.
        """
        is_coming = bool(kwargs.get("apply_admission_cap"))
        notes = self._notes[request_id]
        if is_coming:
            notes.admitted = num_tokens
        elif request_id in self._begun:
            self._give_order(request_id, notes, total_computed_tokens)
        needed: int = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
        )
        return needed + self._reserved(needed) if is_coming else needed

    def _give_order(self, request_id: str, notes: Notes, computed: int) -> None:
        """What workers have to know of a request in its next step."""
        prompt = notes.prompt
        if self.kv_cache_spec.reads_outputs_again:
            prompt = max(prompt, notes.admitted)
        is_new = notes.boundary is None and computed >= prompt
        if is_new:
            notes.boundary, notes.wishes = computed, self._wishes(request_id)
            notes.last = computed
            if notes.wishes.policy is None:
                notes.planned = self.plan(computed, notes.wishes.budget)
                notes.chooses = self.kv_cache_spec.every > 0
            if not self.kv_cache_spec.under_pressure and not notes.is_whole:
                self._ask_for(request_id, notes)
        first_block = self.req_to_blocks[request_id][0].block_id
        if notes.due and notes.cut is None and computed >= notes.due:
            self._choose_text(first_block, notes, computed)
            return
        is_done = notes.at is not None or notes.due > 0
        if notes.is_whole or is_done or not (is_new or notes.is_asked):
            return
        assert notes.boundary is not None
        spec, budget = self.kv_cache_spec, 0
        if notes.is_asked:
            planned = notes.planned or Plan(0, 0)
            notes.cut = Cut(computed, notes.boundary, slice(*planned), planned.kept_blocks)
            if notes.chooses:  # a window has to be heard first
                heard = computed + spec.decode_window
                notes.due = max(notes.boundary + spec.most_of_text, heard)
            if notes.planned is not None:
                notes.at, budget = computed, notes.wishes.budget or spec.budget
        wishes = notes.wishes
        order = Order(computed, notes.boundary, budget, wishes.spans, notes.due, wishes.class_spans)
        self._ledger.give_order(first_block, order)

    def _choose_text(self, first_block: int, notes: Notes, computed: int) -> None:
        """Has a text chosen from in its next step."""
        spec = self.kv_cache_spec
        assert notes.boundary is not None and notes.last is not None
        blocks = self._behind_text(notes, computed)
        in_prompt = -(-notes.boundary // self.block_size)
        notes.cut = Cut(computed, computed, blocks, in_prompt, is_text=True)
        last_end = max(blocks.start, notes.last // self.block_size)
        notes.gain = float(max(0, blocks.stop - last_end))
        notes.due = computed + spec.every
        order = Order(computed, notes.last, spec.decode_budget, due=notes.due)
        notes.last = computed
        self._ledger.give_order(first_block, order)

    def _behind_text(self, notes: Notes, computed: int) -> slice:
        """Blocks behind all that stays of a request if its text is chosen from now."""
        assert notes.boundary is not None
        end = end_of_text(
            notes.boundary,
            notes.planned,
            decode_budget=self.kv_cache_spec.decode_budget,
            block_size=self.block_size,
            num_kv_heads=self.kv_cache_spec.rows_of_layer,
        )
        return slice(end, computed // self.block_size)

    def _num_behind_text(self, request_id: str, notes: Notes) -> int:
        """Blocks that come back if a whole text is chosen from."""
        if not notes.chooses or not self.kv_cache_spec.under_pressure:
            return 0
        computed = self._requests[request_id].num_computed_tokens
        blocks = self._behind_text(notes, computed)
        return max(0, blocks.stop - blocks.start)

    def _wishes(self, request_id: str) -> Wishes:
        """What the request asks for. It stays whole if that can't be done, which the process that
        took it should have said."""
        params = self._requests[request_id].sampling_params
        spec = self.kv_cache_spec
        try:
            wishes = Wishes.of(params and params.extra_args)
            wishes.check(Limits(spec.budget, spec.least, spec.protects, spec.reads_classes))
        except ValueError as error:
            _logger.warning("request %s is not compressed: %s", request_id, error)
            return Wishes(policy="off")
        return wishes

    def _ask_for(self, request_id: str, notes: Notes) -> None:
        """Has a request compressed in its next step."""
        notes.is_asked = True
        if notes.planned is not None:
            blocks = self.req_to_blocks[request_id][slice(*notes.planned)]
            notes.gain = sum(1 / block.ref_cnt for block in blocks)
        else:
            notes.gain = float(self._num_behind_text(request_id, notes))

    def _ask(self, short: float) -> int:
        """Has the longest prompts compressed, and after them the longest texts, until so many
        blocks come back; how many requests that are."""
        if short <= 0:
            return 0
        whole = sorted(
            (
                (0 if notes.planned is None else notes.planned.tail, behind, request_id)
                for request_id, notes in self._notes.items()
                if (behind := self._num_behind_text(request_id, notes)) or notes.planned is not None
                if not notes.is_asked
            ),
            reverse=True,
        )
        for count, (*_, request_id) in enumerate(whole):
            if short <= 0:
                return count
            notes = self._notes[request_id]
            self._ask_for(request_id, notes)
            short -= notes.gain
        return len(whole)

    def _free_soon(self) -> float:
        """Free blocks, with those that compressions will have given back in some steps."""
        coming = sum(notes.gain for notes in self._notes.values())
        return self.block_pool.get_num_free_blocks() + coming

    def _reserved(self, needed: int) -> int:
        """How many blocks have to stay free if a request that needs some comes in now: those that
        running ones need before anything can be given back, if there are any.

        Under pressure, has others compressed for it, and, as requests seem to queue, for one more.
        """
        if not self._begun or needed >= self.block_pool.num_gpu_blocks:
            return 0
        reserved = self._to_come()
        if self.kv_cache_spec.under_pressure:
            fits = needed + reserved <= self.block_pool.get_num_free_blocks()
            if not fits or self._is_queue:
                self._ask((1 + fits) * needed + reserved - self._free_soon())
            self._is_queue = not fits
        return reserved

    def _to_come(self) -> int:
        """Blocks that running requests need for what is known of their text, and one each to go on
        in, which is as much as they write until something is given back."""
        return sum(map(self.blocks_to_come, self._requests.values()))

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *args: Any
    ) -> None:
        self._ledger.add(prefix_tokens_found=len(new_computed_blocks) * self.block_size)
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args)

    def allocate_new_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> Any:
        """Also tells workers of a request before its first step: what they know of no scheduler
        only warms them up."""
        new = super().allocate_new_blocks(request_id, *args, **kwargs)
        if request_id not in self._begun and (blocks := self.req_to_blocks.get(request_id)):
            self._begun.add(request_id)
            self._ledger.begin(blocks[0].block_id)
        return new

    def num_whole_tokens(self, request: Request, num_tokens: int) -> int:
        """Those of its prompt, if it is compressed, or may be: what is behind it will move."""
        notes = self._notes[request.request_id]
        if notes.boundary is None or notes.is_whole:
            return num_tokens
        return min(num_tokens, notes.boundary)

    def cache_blocks(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Also has the cache go on with copies of what workers are about to compress."""
        super().cache_blocks(request, *args, **kwargs)
        notes = self._notes[request.request_id]
        if notes.cut is not None and notes.cut.changed:
            self.change_first_blocks(request.request_id, notes.cut.changed)

    def pop_blocks_for_free(self, request_id: str) -> Any:
        """The request has finished, or is preempted and will start again."""
        notes = self._notes[request_id]
        if notes.at is None and notes.last == notes.boundary:
            notes.planned, notes.chooses = None, False  # all of it is whole
        request, blocks = self._requests.get(request_id), super().pop_blocks_for_free(request_id)
        del self._notes[request_id]
        if request_id in self._begun:
            self._begun.remove(request_id)
            self._ledger.free(blocks[0].block_id)
        if request is not None and not self.kv_cache_spec.reads_outputs_again:
            # It may be cached up to a place from which on nothing counts as its prompt.
            request.skip_reading_prefix_cache = True
        return blocks


@register_kv_cache_spec(manager_class=CompressedManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class CompressedSpec(FullAttentionSpec):
    """The cache of a full-attention layer whose prompts are compressed.

    Parameters
    ----------
    budget : int
        Mean entries per kv head.
    ledger : str
        Name of the engine's :class:`adakv.vllm.ledger.Ledger`.
    reads_outputs_again : bool
        Whether the engine's model runner counts what was generated before a preemption as a part of
        the prompt (its second version does).
    window : int, optional
        The last tokens of a prompt, whose queries the policy hears; None: it hears all queries.
    spans_layers : bool
        Whether layers keep unequally much: :func:`adakv.vllm.pages.spans_layers`.
    under_pressure : bool
        Whether requests are compressed only when blocks run short.
    least, protects, reads_classes
        See :class:`adakv.vllm.requests.Limits`.
    decode_budget, every
        See :class:`adakv.vllm.config.Settings`; ``every`` is 0 if all of a text stays.
    decode_window : int
        Newest queries by which a text is chosen from.
    """

    budget: int
    ledger: str
    reads_outputs_again: bool
    window: int | None = None
    spans_layers: bool = False
    under_pressure: bool = False
    least: int = 1
    decode_window: int = 0
    protects: bool = True
    reads_classes: bool = False
    decode_budget: int | None = None
    every: int = 0

    @property
    def most_of_text(self) -> int:
        """Tokens of a text that are held at most."""
        return (self.decode_budget or 0) + self.every

    @property
    def rows_of_layer(self) -> int | None:
        """Among which the pages of a layer are dealt, as :func:`adakv.vllm.plan.plan` takes it."""
        return None if self.spans_layers else self.num_kv_heads

    @classmethod
    def of(cls, spec: FullAttentionSpec, **numbers: Any) -> CompressedSpec:
        """A layer's own spec, with the numbers of above."""
        same = {f.name: getattr(spec, f.name) for f in fields(spec) if f.init}
        return cls(**same, **numbers)

    @classmethod
    def merge(cls, specs: list[CompressedSpec]) -> CompressedSpec:
        """One spec for a group. (The base class lists the fields by name, and would lose ours.)"""
        if any(spec != specs[0] for spec in specs):
            raise ValueError(f"the layers of a group must have the same cache spec, got {specs}")
        return copy.deepcopy(specs[0])
