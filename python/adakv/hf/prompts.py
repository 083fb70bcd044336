"""Prompts and numbers as users give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from adakv.errors import integer, short
from adakv.hf import families
from adakv.hf.attachment import CACHE
from adakv.policy import Budget, Protection, TokenClasses

if TYPE_CHECKING:
    from adakv.hf.cache import Cache

Given = str | Sequence[int] | Tensor | Mapping[str, Any]


class Requests(NamedTuple):
    """Prompts to be written behind, which may share what they begin with."""

    ids: list[Tensor]  #: ``[T]`` int64 of each, behind the prefix
    inputs: list[Mapping[str, Any]]  #: what the model takes beside them, such as images
    counts: list[int]  #: most new tokens of each
    prefix: Tensor | None  #: ``[T]`` int64
    prefix_inputs: Mapping[str, Any]
    protection: Protection = Protection()  #: of what is chosen from
    classes: TokenClasses = TokenClasses()

    @classmethod
    def given(
        cls,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Given],
        max_new_tokens: int | Sequence[int],
        prefix: Given | None,
    ) -> Requests:
        """From what users give. Raises ``ValueError`` if that makes no sense."""
        begins, beside = None, dict[str, Any]()
        if prefix is not None:
            tokens, beside = apart("prefix", prefix)
            begins = token_ids(model, tokenizer, "prefix", tokens)
        if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
            raise ValueError(
                f"prompts must be a list of prompts, got {type(prompts).__name__}; give [prompt]"
            )
        ids, inputs = [], list[Mapping[str, Any]]()
        for i, prompt in enumerate(prompts):
            name = f"prompts[{i}]"
            if prefix is not None and isinstance(prompt, Mapping):
                raise ValueError(
                    f"{name} must be a string or token ids behind a prefix, which is the one that "
                    f"may be a mapping; got {short(prompt)}"
                )
            tokens, others = apart(name, prompt)
            ids.append(token_ids(model, tokenizer, name, tokens, goes_on=prefix is not None))
            inputs.append(others)
        return cls(ids, inputs, new_token_counts(max_new_tokens, len(ids)), begins, beside)

    @property
    def chosen_from(self) -> list[Tensor]:
        """What is read and compressed: the prefix, or each prompt."""
        return self.ids if self.prefix is None else [self.prefix]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt, with the prefix."""
        before = 0 if self.prefix is None else len(self.prefix)
        return [before + len(prompt) for prompt in self.ids]

    def check(self, budget: Budget, num_layers: int) -> None:
        """Raises ``ValueError`` if more must stay than a budget holds, or if there are no classes
        for a policy that reads them."""
        lengths = [len(prompt) for prompt in self.chosen_from]
        name = "prompts[{}]" if self.prefix is None else "prefix"
        self.protection.check(budget, lengths, num_layers, name=name)
        stays = self.protection.spans(lengths)
        self.classes.check(budget, lengths, num_layers, stays, name=name)


def apart(name: str, prompt: Given) -> tuple[Any, dict[str, Any]]:
    """A prompt's tokens, and what a processor gave beside them."""
    if not isinstance(prompt, Mapping):
        return prompt, {}
    others = {key: value for key, value in prompt.items() if key != "input_ids"}
    ids, mask = prompt.get("input_ids"), others.get("attention_mask")
    ids = ids[0] if isinstance(ids, Tensor) and ids.dim() == 2 and len(ids) == 1 else ids
    if not isinstance(ids, Tensor) or ids.dim() != 1:
        raise ValueError(
            f"{name} must have the input_ids [1, T] of one prompt, as a processor gives them with "
            f"return_tensors='pt', got {short(ids)}"
        )
    if mask is not None and not bool(torch.as_tensor(mask).all()):
        raise ValueError(f"{name} must have no padding: have the processor read each prompt alone")
    return ids, others


@torch.no_grad()
def read(
    model: Any, ids: Tensor, inputs: Mapping[str, Any], cache: Cache, first: int | None = None
) -> tuple[Tensor, int]:
    """Has a model read a prompt ``[T]``, with what there is beside it, into a cache.

    Returns the logits ``[V]`` of its last token, and the position of the next one. ``first`` is
    that of its first token, if something is before it.
    """
    device = families.input_device(model)
    given = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in inputs.items()}
    if first is None:
        first = families.FIRST_POSITION.get(model.config.model_type, 0)
    else:
        given["position_ids"] = torch.arange(first, first + len(ids), device=device)[None]
    # They say how far positions are ahead of tokens behind the last prompt with images that was
    # read, if these stand in two dimensions (M-RoPE): most often they are behind.
    shifting = [x for x in model.modules() if "rope_deltas" in vars(x)]
    before = [x.rope_deltas for x in shifting]
    output = model(
        ids[None].to(device), use_cache=True, logits_to_keep=1, **given, **{CACHE: cache}
    )
    # What was there before is of another prompt.
    found = [
        int(x.rope_deltas) for x, y in zip(shifting, before, strict=True) if x.rope_deltas is not y
    ]
    return output.logits[0, -1], first + len(ids) + sum(found[:1])


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
