"""Prompts and numbers as users give them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from adakv.policy.inputs import as_integer


def token_ids(
    model: Any, tokenizer: Any, name: str, prompt: str | Sequence[int] | Tensor
) -> Tensor:
    """``[T]`` int64 on the CPU; ``name`` is what errors call the prompt."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"{name} is a string, which needs a tokenizer")
        prompt = tokenizer(prompt)["input_ids"]
    try:
        ids = torch.as_tensor(prompt, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} must be [T] integers of 64 bits: {error}") from error
    if ids.numel() == 0:
        raise ValueError(f"{name} is empty")
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be [T] integers, got {ids.dtype} {list(ids.shape)}")
    vocabulary = model.get_input_embeddings().num_embeddings
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(
            f"{name} must hold tokens from 0 to {vocabulary - 1}, "
            f"got {int(ids.min())} to {int(ids.max())}"
        )
    return ids.long()


def new_token_counts(max_new_tokens: int | Sequence[int], num_prompts: int) -> list[int]:
    """``max_new_tokens`` of each prompt."""
    if is_one(max_new_tokens):
        count = as_integer("max_new_tokens", max_new_tokens, bits=64)
        max_new_tokens = [count] * num_prompts
    assert isinstance(max_new_tokens, Iterable)
    max_new_tokens = [
        as_integer(f"max_new_tokens[{i}]", count, bits=64) for i, count in enumerate(max_new_tokens)
    ]
    if len(max_new_tokens) != num_prompts:
        raise ValueError(
            f"max_new_tokens must be one number or one for each of the {num_prompts} prompts, "
            f"got {len(max_new_tokens)}"
        )
    if any(count < 1 for count in max_new_tokens):
        raise ValueError(f"max_new_tokens must be at least 1, got {min(max_new_tokens)}")
    return max_new_tokens


def is_one(value: object) -> bool:
    """Whether it is no list, tensor or array of several things."""
    return (
        isinstance(value, str) or not isinstance(value, Iterable) or not getattr(value, "ndim", 1)
    )
