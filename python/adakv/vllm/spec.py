"""The scheduler's half: a cache spec that carries the plan's numbers, and the manager that gives
blocks back by it.

A request's boundary is its number of tokens when it is first scheduled behind its prompt. The
manager learns it from the one call that names the tokens of the step about to run, in-flight steps
included, and frees only when that step has been processed: until then workers read the blocks.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec
from vllm.v1.request import Request

from adakv.vllm.ledger import Ledger, remove_at_exit, remove_unused
from adakv.vllm.plan import Plan, most_kept_blocks, plan
from adakv.vllm.prefix import PrefixManager

# vLLM registers its own specs only while there are none: before ours.
register_all_kvcache_specs(None)


class CompressedManager(PrefixManager):
    """Blocks of requests whose prompts are compressed by workers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._begun: set[str] = set()
        self._prompts: dict[str, int] = {}
        self._admitted: dict[str, int] = {}  # tokens when it came, or came back
        self._boundaries: dict[str, int] = {}
        self._is_cut: set[str] = set()
        spec = self.kv_cache_spec
        self.own_blocks = most_kept_blocks(
            budget=spec.budget, block_size=self.block_size, num_kv_heads=spec.rows_of_layer
        )
        remove_unused()
        name = spec.ledger
        self._ledger = Ledger.open(name, self.block_pool.num_gpu_blocks)
        remove_at_exit(name)

    def plan(self, boundary: int) -> Plan | None:
        """What a request with that boundary keeps; as the workers compute it."""
        spec = self.kv_cache_spec
        return plan(
            boundary,
            budget=spec.budget,
            block_size=self.block_size,
            num_kv_heads=spec.rows_of_layer,
        )

    def boundary(self, request_id: str) -> int | None:
        """Where the prompt of a running request ended, once a step behind it was planned."""
        return self._boundaries.get(request_id)

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Frees what a compressed request gave up, once the step that did it has been processed."""
        if num_prompt_tokens is None:
            return
        self._prompts[request_id] = num_prompt_tokens
        boundary = self._boundaries.get(request_id)
        if boundary is None or processed_computed_tokens <= boundary or request_id in self._is_cut:
            return
        self._is_cut.add(request_id)
        blocks = self.req_to_blocks[request_id]
        self._ledger.check_done(blocks[0].block_id, boundary)
        planned = self.plan(boundary)
        if planned is not None:
            free = self.block_pool.get_num_free_blocks()
            self._remove_blocks_in_range(request_id, planned.kept_blocks, planned.tail)
            given_back = self.block_pool.get_num_free_blocks() - free
            self._ledger.add(requests_compressed=1, blocks_given_back=given_back)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Any,
        total_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Also notes the boundary: ``total_computed_tokens`` are those before the next step."""
        if kwargs.get("apply_admission_cap"):
            self._admitted[request_id] = num_tokens
        elif request_id in self._prompts and request_id not in self._boundaries:
            prompt = self._prompts[request_id]
            if self.kv_cache_spec.reads_outputs_again:
                prompt = max(prompt, self._admitted.get(request_id, 0))
            if total_computed_tokens >= prompt:
                self._boundaries[request_id] = total_computed_tokens
                first_block = self.req_to_blocks[request_id][0].block_id
                self._ledger.plan(first_block, total_computed_tokens)
        needed: int = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
        )
        return needed

    def allocate_new_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> Any:
        """Also tells workers of a request before its first step: what they know of no scheduler
        only warms them up."""
        new = super().allocate_new_blocks(request_id, *args, **kwargs)
        if request_id not in self._begun and (blocks := self.req_to_blocks.get(request_id)):
            self._begun.add(request_id)
            self._ledger.begin(blocks[0].block_id)
        return new

    def num_whole_tokens(self, request: Request, num_tokens: int) -> int:
        """Those of its prompt, if it is compressed."""
        boundary = self._boundaries.get(request.request_id)
        if boundary is None or self.plan(boundary) is None:
            return num_tokens
        return min(num_tokens, boundary)

    def cache_blocks(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Also has the cache go on with copies of what workers are about to compress."""
        super().cache_blocks(request, *args, **kwargs)
        boundary = self._boundaries.get(request.request_id)
        if boundary is None or request.request_id in self._is_cut:
            return
        if (planned := self.plan(boundary)) is not None:
            self.change_first_blocks(request.request_id, planned.kept_blocks)

    def pop_blocks_for_free(self, request_id: str) -> Any:
        """The request has finished, or is preempted and will start again."""
        request, blocks = self._requests.get(request_id), super().pop_blocks_for_free(request_id)
        for notes in (self._prompts, self._admitted, self._boundaries):
            notes.pop(request_id, None)
        self._is_cut.discard(request_id)
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
    """

    budget: int
    ledger: str
    reads_outputs_again: bool
    window: int | None = None
    spans_layers: bool = False

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
