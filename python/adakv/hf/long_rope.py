"""LongRoPE (Phi-3): a text longer than the model was first trained for has other frequencies.

Keys that were read with one set don't fit queries of the other, so that a text may not grow across.
transformers' ``generate`` then starts a cache of its own and reads everything again; unnoticed,
nothing would be compressed from there on.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adakv.errors import Error

#: Caches of models with a limit, any of which ``generate`` may leave for one of its own.
_watched: weakref.WeakSet[Any] = weakref.WeakSet()


def limit_of(config: Any) -> int | None:
    """Tokens from which on a model has other frequencies, or is taken to by ``generate``."""
    limit = getattr(config, "original_max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) == "longrope":
        limit = rope.get("original_max_position_embeddings", limit)
    return limit


def check_growth(limit: int | None, before: int, after: int, *, what: str) -> None:
    """Raises ``ValueError`` if a text of ``before`` tokens grows across the limit.

    ``what`` begins the message.
    """
    if limit is not None and 0 < before <= limit < after:
        raise ValueError(
            f"{what} crosses {limit} tokens, where the model's RoPE changes: what was read before "
            "doesn't fit what comes after; read all of the text into a new cache"
        )


def check_batch(
    config: Any, lengths: Sequence[int], counts: Sequence[int], prefix_len: int = 0
) -> None:
    """Raises ``ValueError`` if prompts and the tokens after them aren't on one side; or a prefix
    that they share, whose tokens ``lengths`` count, too."""
    limit = limit_of(config)
    if limit is None:
        return
    for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        what = f"max_new_tokens: prompts[{i}] has {length} tokens, and its text of {count} more"
        read = length + count - 1  # without the last one
        check_growth(limit, prefix_len or length, read, what=what)
    is_long = [length > limit for length in lengths]
    if any(is_long) and not all(is_long):
        raise ValueError(
            f"prompts[{is_long.index(False)}] has at most {limit} tokens and "
            f"prompts[{is_long.index(True)}] more, so that the model's RoPE differs: give them "
            "apart"
        )


def watch(cache: Any) -> None:
    """Has :func:`check_dropped` know of a cache, if its model has a limit."""
    if cache.rope_limit is not None:
        _watched.add(cache)


def check_dropped(module: Any, query: Tensor) -> None:
    """Raises ``adakv.Error`` if queries ``[B, Hq, S, D]`` that come without a cache of ours are
    those of a text that ``generate`` was to read with one."""
    for cache in list(_watched):
        if cache.is_left_out(module.config, query.shape[2]):
            raise Error(
                "transformers' generate reads this text into a cache of its own, uncompressed, as "
                f"the model's RoPE changes at {cache.rope_limit} tokens; for prompts beyond that "
                "give custom_generate=adakv.cuda_graph_sample, or use adakv.generate_batch"
            )
