"""vLLM's own manager of blocks over one compressed layer, for tests of the scheduler's half."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

from adakv.vllm.spec import CompressedSpec

BLOCK, HEADS, BUDGET = 16, 4, 64


def block_manager(
    ledger: str, num_blocks: int, *, enable_caching: bool = False, **numbers: Any
) -> KVCacheManager:
    """``numbers`` are more of :class:`CompressedSpec`'s."""
    base = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=HEADS, head_size=64, dtype=torch.bfloat16
    )
    spec = CompressedSpec.of(base, budget=BUDGET, ledger=ledger, **numbers)
    config = KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    return KVCacheManager(
        config,
        max_model_len=4096,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
        enable_caching=enable_caching,
        max_in_flight_tokens=8192,
    )
