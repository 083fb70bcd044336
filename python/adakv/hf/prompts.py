"""Prompts and numbers as users give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adakv.errors import integer, short


class Requests(NamedTuple):
    """Prompts to be written behind, which may share what they begin with."""

    ids: list[Tensor]  #: ``[T]`` int64 of each, behind the prefix
    counts: list[int]  #: most new tokens of each
    prefix: Tensor | None  #: ``[T]`` int64

    @classmethod
    def given(
        cls,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[str | Sequence[int] | Tensor],
        max_new_tokens: int | Sequence[int],
        prefix: str | Sequence[int] | Tensor | None,
    ) -> Requests:
        """From what users give. Raises ``ValueError`` if that makes no sense."""
        begins = None if prefix is None else token_ids(model, tokenizer, "prefix", prefix)
        ids = all_token_ids(model, tokenizer, prompts, go_on=prefix is not None)
        return cls(ids, new_token_counts(max_new_tokens, len(ids)), begins)

    @property
    def chosen_from(self) -> list[Tensor]:
        """What is read and compressed: the prefix, or each prompt."""
        return self.ids if self.prefix is None else [self.prefix]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt, with the prefix."""
        before = 0 if self.prefix is None else len(self.prefix)
        return [before + len(prompt) for prompt in self.ids]


def all_token_ids(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int] | Tensor],
    *,
    go_on: bool = False,
) -> list[Tensor]:
    """:func:`token_ids` of each prompt, which may ``go_on`` behind others."""
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise ValueError(
            f"prompts must be a list of prompts, got {type(prompts).__name__}; give [prompt]"
        )
    return [
        token_ids(model, tokenizer, f"prompts[{i}]", prompt, goes_on=go_on)
        for i, prompt in enumerate(prompts)
    ]


def token_ids(
    model: Any,
    tokenizer: Any,
    name: str,
    prompt: str | Sequence[int] | Tensor,
    *,
    goes_on: bool = False,
) -> Tensor:
    """``[T]`` int64 on the CPU; ``name`` is what errors call the prompt. A string that ``goes_on``
    behind other tokens has no special ones of its own."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"{name} is a string, which needs a tokenizer")
        special = {"add_special_tokens": False} if goes_on else {}
        prompt = tokenizer(prompt, **special)["input_ids"]
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
