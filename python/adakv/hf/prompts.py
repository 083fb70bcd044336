"""Prompts and numbers as users give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adakv.errors import integer, short


def all_token_ids(
    model: Any, tokenizer: Any, prompts: Sequence[str | Sequence[int] | Tensor]
) -> list[Tensor]:
    """:func:`token_ids` of each prompt."""
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise ValueError(
            f"prompts must be a list of prompts, got {type(prompts).__name__}; give [prompt]"
        )
    return [
        token_ids(model, tokenizer, f"prompts[{i}]", prompt) for i, prompt in enumerate(prompts)
    ]


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
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{name} must be [T] integers of 64 bits, got {short(prompt)}") from None
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
        max_new_tokens = [integer("max_new_tokens", max_new_tokens, 1)] * num_prompts
    assert isinstance(max_new_tokens, Iterable)
    counts = [integer(f"max_new_tokens[{i}]", count, 1) for i, count in enumerate(max_new_tokens)]
    if len(counts) != num_prompts:
        raise ValueError(
            f"max_new_tokens must be one number or one for each of the {num_prompts} prompts, "
            f"got {len(counts)}"
        )
    return counts


def is_one(value: object) -> bool:
    """Whether it is no list, tensor or array of several things."""
    return (
        isinstance(value, str) or not isinstance(value, Iterable) or not getattr(value, "ndim", 1)
    )
