"""What requests share: prefix caching where prompts are compressed in place.

A request's first blocks are compressed when its prompt has been read, and until then they are its
prompt's. They must never be another's, so the cache gets the copy, and the request keeps its
blocks::

    a hit           of its first ``own_blocks`` the request takes those that only the cache holds,
                    and gets copies of those that others use; the rest is shared, as ever
    being read      a block is offered when a step has written it: copies are made before a step
    the end         what the cache has of the request's first blocks moves to copies, made at the
                    beginning of the step that compresses them

The copies are vLLM's own: pairs of blocks that workers copy first in a step, all at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request


@dataclass
class _Writing:
    """What the step that is being scheduled will have written."""

    hashes: set[BlockHash] = field(default_factory=set)
    is_awaited: bool = False  # it would make the hit that was looked up last longer


#: By pool: lookups are class methods, and know nothing else of a scheduler.
_writing: weakref.WeakKeyDictionary[BlockPool, _Writing] = weakref.WeakKeyDictionary()


class PrefixManager(FullAttentionManager):
    """Blocks of requests that own their first ones and share the others.

    Its spec has a ``window``: the last tokens of a prompt, which are read whatever is cached, as
    the policy hears their queries; None: it hears all, and so nothing is found.
    """

    enable_caching: bool
    #: First blocks of a request that are no other's.
    own_blocks: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._requests: dict[str, Request] = {}  # that run
        # vLLM shows requests to managers that cache only.
        self._caches = self.enable_caching
        self.enable_caching = True
        self._to_copy: dict[str, list[int]] = {}  # places of a hit's blocks that others use
        self._step = _writing.setdefault(self.block_pool, _Writing())

    def new_step_starts(self) -> None:
        """The step before has been scheduled: it is known what it writes."""
        self._step.hashes.clear()
        self._step.is_awaited = False

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """What is cached of a prompt of ``max_length + 1`` tokens, up to its window.

        A prompt that goes on as another does that the same step reads should wait for the next
        step, which can copy what this one writes.
        """
        if kv_cache_spec.window is None:
            return tuple([] for _ in kv_cache_group_ids), 0
        max_length = max(0, max_length + 1 - kv_cache_spec.window)
        blocks, length = super().find_longest_cache_hit(
            block_hashes=block_hashes,
            max_length=max_length,
            kv_cache_group_ids=kv_cache_group_ids,
            block_pool=block_pool,
            kv_cache_spec=kv_cache_spec,
            **kwargs,
        )
        size, found = kv_cache_spec.block_size, len(blocks[0])
        if (step := _writing.get(block_pool)) is not None:
            step.is_awaited = (found + 1) * size <= max_length and (
                resolve_block_hashes(block_hashes, block_pool.hash_block_size, size)[found]
                in step.hashes
            )
        return blocks, length

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """With the copies of a hit's blocks; more than there are for a request that should wait."""
        if kwargs.get("apply_admission_cap") and self._step.is_awaited:
            self._step.is_awaited = False
            return int(self.block_pool.num_gpu_blocks)
        needed: int = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, *args, **kwargs
        )
        return needed + len(self._used_by_others(new_computed_blocks))

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *args: Any
    ) -> None:
        """A request begins with a hit."""
        if to_copy := self._used_by_others(new_computed_blocks):
            self._to_copy[request_id] = to_copy
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args)

    def allocate_new_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> Any:
        """Also makes the copies of its hit, now that all hits of all groups are held."""
        if places := self._to_copy.pop(request_id, None):
            blocks = self.req_to_blocks[request_id]
            sources = [blocks[place] for place in places]
            copies = self.block_pool.get_new_blocks(len(places))
            self._copy(sources, copies)
            self.block_pool.free_blocks(sources)
            for place, block in zip(places, copies, strict=True):
                blocks[place] = block
        return super().allocate_new_blocks(request_id, *args, **kwargs)

    def num_whole_tokens(self, request: Request, num_tokens: int) -> int:
        """How many of a request's first ``num_tokens`` are read, or written, while it is whole."""
        return num_tokens

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Offers what steps before this one have written of a request's first ``num_tokens``."""
        self._requests[request.request_id] = request
        if not self._caches or self.kv_cache_spec.window is None:
            return
        self._offer(request)
        hashes = resolve_block_hashes(
            request.block_hashes, self.block_pool.hash_block_size, self.block_size
        )
        offered = self.num_cached_block.get(request.request_id, 0)
        num_full = self.num_whole_tokens(request, num_tokens) // self.block_size
        self._step.hashes.update(hashes[index] for index in range(offered, num_full))

    def change_first_blocks(self, request_id: str, count: int) -> None:
        """The step that is being scheduled changes a request's first ``count`` blocks: the cache
        gets copies, as far as the pool has blocks that no running request is about to need."""
        if not self._caches:
            return
        pool = self.block_pool
        cached = [b for b in self.req_to_blocks[request_id][:count] if b.block_hash is not None]
        find = pool.cached_block_hash_to_block.get_one_block
        only = [block for block in cached if find(block.block_hash) is block]
        needed = sum(map(self.blocks_to_come, self._requests.values()))
        only = only[: max(0, pool.get_num_free_blocks() - needed)]
        copies = pool.get_new_blocks(len(only))
        for block, copied in zip(only, copies, strict=True):
            pool.move_block_hashes(block, copied)
        self._copy(only, copies)
        pool.free_blocks(copies)
        pool.evict_blocks({block.block_id for block in cached} - {b.block_id for b in only})

    def pop_blocks_for_free(self, request_id: str) -> Any:
        """Also offers what the request's last step has written."""
        self._to_copy.pop(request_id, None)
        request = self._requests.pop(request_id, None)
        if request is not None and self._caches and self.kv_cache_spec.window is not None:
            self._offer(request)
        return super().pop_blocks_for_free(request_id)

    def _offer(self, request: Request) -> None:
        computed = min(request.num_computed_tokens, request.num_tokens)  # steps in flight included
        # Not FullAttentionManager's, which also offers a block that isn't full.
        super(FullAttentionManager, self).cache_blocks(
            request, self.num_whole_tokens(request, computed), replay_boundaries=()
        )

    def _used_by_others(self, hit: Sequence[KVCacheBlock]) -> list[int]:
        return [place for place, block in enumerate(hit[: self.own_blocks]) if block.ref_cnt > 0]

    def blocks_to_come(self, request: Request) -> int:
        """That a running request needs for what is known of its text, and a block to go on in, if
        it may write so much."""
        held = len(self.req_to_blocks[request.request_id])
        most = max(request.num_tokens, request.num_prompt_tokens + request.max_tokens)
        num_tokens = min(request.num_tokens + self.block_size, most)
        return max(0, -(-num_tokens // self.block_size) - held)

    def _copy(self, sources: Iterable[KVCacheBlock], copies: Sequence[KVCacheBlock]) -> None:
        """At the beginning of the step that is being scheduled; holds both ends until then.

        All copies of a step are made at once, so that none sees what another one writes.
        """
        written = {copied.block_id: source for source, copied in self._pending_cow_copies}
        read = [written.get(source.block_id, source) for source in sources]
        self.block_pool.touch([*read, *copies])
        self._pending_cow_copies += zip(read, copies, strict=True)
