"""Prompts that are read twice: what the model looks at while it repeats them says what stays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache as TransformersCache

from adakv.errors import Error
from adakv.hf.attachment import CACHE, TAG, AttendingLayer, eagerly, inner_attention

if TYPE_CHECKING:
    from adakv.hf.cache import Cache


class Repetition:
    """The repetition of a :class:`Cache`'s prompts, if its policy asks for one.

    Its methods raise ``ValueError`` if it doesn't.
    """

    def __init__(self, cache: Cache, *, is_needed: bool) -> None:
        self._cache = cache
        self._is_needed = is_needed
        self._waiting: Tensor | None = None  # [B, R], for after the prompt

    def wait_for(self, input_ids: Tensor) -> None:
        """:meth:`Cache.repeat_after_prompt`."""
        self._check()
        if self._cache.seen:
            raise Error("the prompt has been read: call repeat() now")
        self._waiting = input_ids

    def read_waiting(self) -> None:
        """What comes next isn't of the prompt any more."""
        reading = self._cache.reading
        if not self._is_needed or reading is None or not reading.is_begun:
            return
        if self._waiting is None:
            raise ValueError(
                "repeat must be given: call Cache.repeat after the prompt, before other tokens, or "
                "Cache.repeat_after_prompt before it (give Cache(chunked_prefill=True) if the "
                "prompt comes in several forwards)"
            )
        self.read(self._waiting)

    def read(self, input_ids: Tensor) -> None:
        """:meth:`Cache.repeat`."""
        self._check()
        cache = self._cache
        if cache.reading is None or not cache.reading.is_begun:
            raise Error("a prompt can be repeated once, right after it was read")
        columns = cache.get_seq_length()
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
            raise ValueError(f"input_ids must be a tensor [B, R], got {type(input_ids).__name__}")
        if input_ids.shape[0] != len(cache.seen) or {*cache.seen} != {columns}:
            raise ValueError(
                f"input_ids must repeat the {len(cache.seen)} prompts, all of one length and "
                f"without padding, got {input_ids.shape[0]} for prompts of {cache.seen} tokens"
            )
        cache.reading.check_complete()
        num_layers = cache.reading.num_layers
        repetition = TransformersCache(layers=[RepeatLayer(cache, i) for i in range(num_layers)])
        cache.model.base_model(input_ids, use_cache=True, **{CACHE: repetition})

    def _check(self) -> None:
        self._cache.check_recordable("its layers without full attention can't forget a repetition")
        if not self._is_needed:
            raise ValueError("policy: it doesn't score what a repetition looks at")


class RepeatLayer(AttendingLayer):
    """A layer of what the model looks at while it repeats its prompts: of that nothing is kept."""

    def __init__(self, cache: Cache, index: int) -> None:
        super().__init__()
        self._cache = cache
        self._index = index
        self._length = cache.get_seq_length()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Behind the prompts' own."""
        if torch.compiler.is_compiling():
            return eagerly(self.update, key_states, value_states, *args, **kwargs)
        assert self._cache.reading is not None
        keys, values = self._cache.reading.joined(self._index)
        new_keys, new_values = key_states.to(keys.dtype), value_states.to(values.dtype)
        return super().update(torch.cat([keys, new_keys], 2), torch.cat([values, new_values], 2))

    def attend(
        self,
        inner: str,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The model's own attention; then the layer's prompts are chosen from."""
        if torch.compiler.is_compiling():
            return eagerly(self.attend, inner, module, query, key, value, mask, **kwargs)
        delattr(key, TAG)
        result = inner_attention(inner, module, query, key, value, mask, **kwargs)
        self._cache.finish(self._index, repeat=(query.to(key.dtype), key[:, :, self._length :]))
        return result

    def get_seq_length(self) -> int:
        return self._length
