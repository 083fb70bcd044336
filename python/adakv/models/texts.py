"""Texts and tokens: the prompts that come in, and when what is written is over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

End = Literal["eos", "stop_string", "length"]


class Stop:
    """When a text is over."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        eos: int | Sequence[int] | None,
        strings: str | Sequence[str],
    ) -> None:
        if eos is None and model.generation_config is not None:
            eos = model.generation_config.eos_token_id
        self._eos = {eos} if isinstance(eos, int) else set(eos or ())
        self._strings = [strings] if isinstance(strings, str) else list(strings)
        if "" in self._strings:
            raise ValueError("stop_strings must not be empty")
        if self._strings and tokenizer is None:
            raise ValueError("stop_strings need a tokenizer")
        self._tokenizer = tokenizer
        # Every token but special ones is a byte at least; the first may lose a space.
        self._tail = max((len(string.encode()) for string in self._strings), default=0) + 1

    def end(self, tokens: list[int], max_new_tokens: int) -> End | None:
        """Why a text is over, if it is, after its newest token."""
        if tokens[-1] in self._eos:
            return "eos"
        if self._strings:
            tail = self._tokenizer.decode(tokens[-self._tail :])
            if any(string in tail for string in self._strings):
                return "stop_string"
        return "length" if len(tokens) == max_new_tokens else None

    def text(self, tokens: list[int]) -> str | None:
        """Of tokens, if there is a tokenizer."""
        if self._tokenizer is None:
            return None
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def token_ids(
    model: Any, tokenizer: Any, name: str, prompt: str | Sequence[int] | Tensor
) -> Tensor:
    """``[T]`` int64 on the CPU; ``name`` is what errors call the prompt."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"{name} is a string, which needs a tokenizer")
        prompt = tokenizer(prompt)["input_ids"]
    ids = torch.as_tensor(prompt, device="cpu")
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
    if isinstance(max_new_tokens, int):
        max_new_tokens = [max_new_tokens] * num_prompts
    if len(max_new_tokens) != num_prompts:
        raise ValueError(
            f"max_new_tokens must be one number or one for each of the {num_prompts} prompts, "
            f"got {len(max_new_tokens)}"
        )
    if any(count < 1 for count in max_new_tokens):
        raise ValueError(f"max_new_tokens must be at least 1, got {min(max_new_tokens)}")
    return list(max_new_tokens)
