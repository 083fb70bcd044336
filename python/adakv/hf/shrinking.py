"""Caches that hold less than before: see :meth:`adakv.Cache.shrink`."""

from __future__ import annotations

from typing import Any

import torch

from adakv.hf import families
from adakv.hf.layers import FullAttentionLayer
from adakv.moving import moved
from adakv.policy import Budget
from adakv.shrinking import check_shrinks, shrunk
from adakv.step import Attention
from adakv.tiered_cache import TieredCache


def shrink(cache: Any, smaller: Budget) -> None:
    """:meth:`adakv.Cache.shrink`."""
    check_shrinks(smaller.policy)
    if cache.eviction.text is not None:
        raise ValueError("shrink: texts are evicted from (decode_budget), which has moved entries")
    if cache._kv is None:
        return
    if isinstance(cache._kv, TieredCache):
        raise ValueError(
            f"shrink: entries stay in the tier that they are in, got {cache._kv.kv_dtype!r}"
        )
    if cache.kept_scores is None:
        raise ValueError(
            "shrink: what its entries scored isn't known: make the cache with keep_scores=True"
        )
    kv = moved(cache._kv, cache._kv.device, 1)  # with pages of its own, of each layer its own
    scores = shrunk(kv, smaller, cache.kept_scores, cache.prompt_lens, _attention(cache))
    cache._kv, cache.kept_scores = moved(kv, kv.device, cache._allocation.new_tokens), scores
    if cache._reader is not None:
        cache._reader.forget()


def _attention(cache: Any) -> list[Attention]:
    """How layers attend, with their output projections if the policy needs them: those of a cache
    from a file have not been told yet."""
    layers: list[Attention] = [layer.attention for layer in cache._full]
    if "w_o" not in cache.budget.policy.needs:
        return layers
    full = [i for i, x in enumerate(cache.layers) if isinstance(x, FullAttentionLayer)]
    width = int(cache.model_config.num_attention_heads) * cache._kv.value_dim
    like = torch.empty(0, dtype=cache._kv.dtype, device=cache.model.device)
    projections = families.output_projections(cache.model, full, width, like)
    return [x._replace(w_o=w_o) for x, w_o in zip(layers, projections, strict=True)]
