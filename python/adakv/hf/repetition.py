"""Prompts that are read twice: what the model looks at while it repeats them says what stays.

Behind the chunks of a prompt an instruction is read instead of a repetition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache as TransformersCache

from adakv.cache import KVCache, sequences
from adakv.entries import Held, HeldInputs
from adakv.errors import Error
from adakv.hf.attachment import CACHE
from adakv.hf.layers import TAG, AttendingLayer, attention_of, eagerly, inner_attention
from adakv.policy.attention import attention

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

    def read_waiting(self, batch: int) -> None:
        """What comes next isn't of the prompts any more, or is the first chunk of so many."""
        reading = self._cache.reading
        if not self._is_needed or reading is None:
            return
        shape = list(getattr(self._waiting, "shape", []))
        if not self._cache.waits and (len(shape) != 2 or shape[0] != batch):
            raise ValueError(
                f"repeat must be given: call Cache.repeat_after_prompt with instructions [{batch}, "
                f"R] before prompts in chunks, got {shape or None}"
            )
        if not reading.is_begun:
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
        self._check_tokens(input_ids)
        cache.reading.check_complete()
        num_layers = cache.reading.num_layers
        repetition = TransformersCache(layers=[RepeatLayer(cache, i) for i in range(num_layers)])
        cache.model.base_model(input_ids, use_cache=True, **{CACHE: repetition})

    def read_behind(
        self, kv: KVCache, slots: slice, longest: int
    ) -> Sequence[tuple[Tensor, Tensor]]:
        """Has the model read the instruction behind the chunks so far, and forgets it.

        Gives its queries ``[B, Hq, R, D]`` and keys ``[B, Hkv, R, D]`` in each layer. No row holds
        more than ``longest`` entries.
        """
        assert self._waiting is not None
        self._check_tokens(self._waiting)
        layers = [
            InstructionLayer(
                Held(sequences(layer, slots), longest, kv.dtype),
                index,
                self._cache.get_seq_length(),
            )
            for index, layer in enumerate(kv.layers)
        ]
        instruction = TransformersCache(layers=layers)
        self._cache.model.base_model(self._waiting, use_cache=True, **{CACHE: instruction})
        return [layer.read for layer in layers]

    def _check_tokens(self, input_ids: Tensor) -> None:
        """Raises ``ValueError`` unless there are some to read behind each prompt."""
        seen, columns = self._cache.seen, self._cache.get_seq_length()
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
            raise ValueError(f"input_ids must be a tensor [B, R], got {type(input_ids).__name__}")
        if input_ids.shape[0] != len(seen) or {*seen} != {columns}:
            raise ValueError(
                f"input_ids must repeat the {len(seen)} prompts, all of one length and "
                f"without padding, got {input_ids.shape[0]} for prompts of {seen} tokens"
            )

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
        keys, values = self._cache.reading.side_by_side(self._index).view()
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


class InstructionLayer(AttendingLayer):
    """A layer of an instruction behind what rows of pages hold: of that nothing is kept."""

    read: tuple[Tensor, Tensor]  #: its queries and keys

    def __init__(self, held: Held, index: int, length: int) -> None:
        super().__init__()
        self._held = held
        self._index = index
        self._length = length

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
        """Attends to what rows hold, and to the instruction itself."""
        if torch.compiler.is_compiling():
            return eagerly(self.attend, inner, module, query, key, value, mask, **kwargs)
        delattr(key, TAG)
        query, key = query.to(value.dtype), key.to(value.dtype)
        self.read = query, key
        held = HeldInputs(
            self._held, query, self._index, self._index + 1, attention=attention_of(kwargs)
        )
        both = held.followed_by(query, key, value)
        p = attention(both, slice(None))  # [B, Hkv, G, R, T + R]
        out = (p @ both.values[:, :, None].float()).flatten(1, 2)
        return out.transpose(1, 2).to(query.dtype), None

    def get_seq_length(self) -> int:
        return self._length

    def get_mask_sizes(self, queries: int | Tensor) -> tuple[int, int]:
        """The mask is that of the instruction alone, and nobody reads it."""
        return super().get_mask_sizes(queries)[0] - self._length, self._length
