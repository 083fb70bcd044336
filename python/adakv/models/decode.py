"""Decoding the sequences of a shared cache together, one token each a step.

    begin(slot, ...)     host: a prompt is in the slot; chooses its first token
    grow()               host: pages for the step
    step(width)          device: plan, the model's forward, choosing; over the first slots
    end(slot)            host: the pages go back, the slot is empty

``step`` is a function of tensors that stay where they are: nothing in it waits for the device, and
no Python state is another after it. So it can be recorded in a CUDA graph, or compiled as one
graph, and run again while sequences come, grow and go.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache as TransformersCache
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from adakv import ops
from adakv.cache import KVCache
from adakv.models.hf import TAG
from adakv.models.sampling import Sampling
from adakv.models.store import sequences


class Decoder:
    """Sequences in slots of a cache, and the step that writes a token of each.

    Parameters
    ----------
    model : PreTrainedModel
        Under :func:`adakv.attach` whenever it decodes.
    kv : :class:`adakv.cache.KVCache`
        With a layer for each of the model's. A prompt comes in by :meth:`adakv.Cache.fill`.
    sampling : :class:`Sampling`
    max_new_tokens : int
        Most tokens that a sequence writes.

    Attributes
    ----------
    tokens : ``[B, 1]`` int64
        The newest token of each slot.
    positions : ``[B, 1]`` int64
        Where it stands in its sequence.
    num_new : ``[B]`` int32
        1 for a slot that holds a sequence, 0 for an empty one, of which a step changes nothing.
    """

    def __init__(
        self, model: PreTrainedModel, kv: KVCache, sampling: Sampling, max_new_tokens: int
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(kv.num_sequences, *shape, dtype=dtype, device=kv.device)

        self._model = model
        self._kv = kv
        self._sampling = sampling
        self._running = [False] * kv.num_sequences
        self.tokens = zeros(1, dtype=torch.int64)
        self.positions = zeros(1, dtype=torch.int64)
        self.num_new = zeros(dtype=torch.int32)
        self._written = zeros(1, dtype=torch.int64)  # tokens of each slot
        self._uniforms = zeros(max_new_tokens, dtype=torch.float64)  # chance, for each of them
        # Models make no mask if they are given one; attend reads none.
        self._mask = zeros(1, 1, 1, dtype=kv.dtype)
        self._caches: dict[int, StepCache] = {}

    @property
    def width(self) -> int:
        """The least width of a step over all sequences."""
        return max((slot + 1 for slot, is_on in enumerate(self._running) if is_on), default=0)

    def begin(self, slot: int, logits: Tensor, prompt_len: int, uniforms: Tensor) -> None:
        """A prompt of ``prompt_len`` tokens is in the slot: chooses its first token.

        ``logits`` ``[V]`` are the prompt's last, ``uniforms`` ``[max_new_tokens]`` float64 the
        sequence's numbers in [0, 1).
        """
        self._uniforms[slot, : len(uniforms)] = uniforms.to(self._uniforms.device)
        chosen = self._sampling.choose(logits[None], self._uniforms[slot, :1])
        self.tokens[slot] = chosen
        self.positions[slot] = prompt_len
        self._written[slot] = 1
        self.num_new[slot] = 1
        self._running[slot] = True

    def end(self, slot: int) -> None:
        """Gives the slot's pages back."""
        self._kv.remove(slot)
        self._written[slot] = 0
        self.num_new[slot] = 0
        self._running[slot] = False

    def grow(self) -> None:
        """Makes room for the next step of all sequences.

        Raises
        ------
        adakv.Error
            If there are too few free pages. Nothing changes.
        """
        self._kv.grow([int(is_on) for is_on in self._running], 1)

    def step(self, width: int) -> None:
        """Appends the newest tokens of the first ``width`` slots and chooses the next ones."""
        if width not in self._caches:
            self._caches[width] = StepCache(self._kv, self.num_new, width)
        cache = self._caches[width]
        cache.plan()
        output = self._model(
            input_ids=self.tokens[:width],
            attention_mask=self._mask[:width],
            position_ids=self.positions[:width],
            past_key_values=cache,
            use_cache=True,
        )
        cache.forget_plan()
        written, num_new = self._written[:width], self.num_new[:width, None]
        uniforms = self._uniforms[:width].gather(1, written)[:, 0]
        chosen = self._sampling.choose(output.logits[:, -1], uniforms)
        self.tokens[:width] = chosen[:, None]
        self.positions[:width] += num_new
        written += num_new


class StepCache(TransformersCache):
    """The first slots of a cache, as a model's forward over one token of each takes them."""

    def __init__(self, kv: KVCache, num_new: Tensor, width: int) -> None:
        self.num_new = num_new[:width]
        self.schedules: tuple[Tensor, ...] = ()
        self._all_layers = ops.Layer(
            *kv.all_layers[:2], *(tensor[:, :width] for tensor in kv.all_layers[2:])
        )
        self._page_size = kv.page_size
        super().__init__(
            layers=[
                StepLayer(self, index, sequences(kv.layer(index), slice(0, width)))
                for index in range(kv.num_layers)
            ]
        )

    def plan(self) -> None:
        """Shares out the step's work, for all layers."""
        layers = self._all_layers
        self.schedules = ops.plan(
            layers.lengths,
            layers.block_table,
            layers.fresh_pages,
            num_new=self.num_new,
            page_size=self._page_size,
        ).unbind()

    def forget_plan(self) -> None:
        """It is good for one step."""
        self.schedules = ()


class StepLayer(CacheLayerMixin):
    """One layer of a :class:`StepCache`."""

    is_compileable = True
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: StepCache, index: int, view: ops.Layer) -> None:
        super().__init__()
        self._cache = cache
        self._index = index
        self._view = view

    def lazy_initialization(self, *args: Any) -> None:
        """Nothing to do: the pages are there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values, tagged."""
        setattr(key_states, TAG, self)
        return key_states, value_states

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
        """What the attention function does with tagged keys: append and attend."""
        sinks = kwargs.get("s_aux")
        out, _ = ops.attend(
            query,
            self._view,
            self._cache.schedules[self._index],
            keys=key,
            values=value,
            num_new=self._cache.num_new,
            sinks=None if sinks is None else sinks.float(),
            scale=kwargs.get("scaling"),
            softcap=kwargs.get("softcap"),
        )
        return out.transpose(1, 2), None

    def get_seq_length(self) -> int:
        """Of no use, as slots differ, but the same in every step."""
        return 0

    def get_mask_sizes(self, queries: int | Tensor) -> tuple[int, int]:
        """As for a cache that holds nothing."""
        return (queries if isinstance(queries, int) else queries.shape[0]), 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length  # its name in 4.57
