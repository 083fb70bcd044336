"""One forward over a prompt, from which any number of caches is filled.

A policy acts after a layer's prefill attention and does not change it. So queries, keys and values
of a prompt are the same for every policy, and reading the prompt once serves them all.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import adakv
from adakv import policy as policies
from adakv.models import Cache
from adakv.models.hf import FullAttentionLayer
from adakv.policy import Policy


@dataclass
class _Layer:
    """What a layer handed to the cache and, if it is not a sliding one, took of its prompt."""

    keys: Tensor  # [1, Hkv, T, D]
    values: Tensor  # [1, Hkv, T, D]
    module: torch.nn.Module | None = None
    queries: Tensor | None = None  # [1, Hq, T, D]
    rest: tuple[Any, ...] = ()  # more of take_prompt's arguments: mask, lse
    options: dict[str, Any] = field(default_factory=dict)


class _Recorder(Cache):
    """A cache that keeps everything of one prompt, with the queries."""

    def __init__(self, model: PreTrainedModel) -> None:
        # A policy that is handed all that any is. In chunks: the prompt waits for more.
        super().__init__(model, "h2o", ratio=1.0, chunked_prefill=True)
        self.recorded: list[_Layer] = []
        for layer in self.layers:
            if isinstance(layer, FullAttentionLayer):
                layer.__dict__["take_prompt"] = functools.partial(self._take, layer.take_prompt)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.recorded.append(_Layer(key_states, value_states))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _take(
        self,
        take_prompt: Any,
        module: torch.nn.Module,
        query: Tensor,
        *keys_values_rest: Any,
        **options: Any,
    ) -> None:
        layer = self.recorded[-1]
        layer.module, layer.queries = module, query
        layer.rest, layer.options = keys_values_rest[2:], options
        take_prompt(module, query, *keys_values_rest, **options)


class Prefill:
    """A prompt that a model has read, for filling caches.

    Holds queries, keys and values of all layers: ``(Hq + 2 Hkv) * D`` numbers a token and layer.

    Parameters
    ----------
    model : PreTrainedModel
        Under :func:`adakv.attach`, here and whenever one of the caches is used.
    prompt : ``[1, T]`` int64
        Its tokens.

    Attributes
    ----------
    logits : ``[V]``
        Of the token after the prompt.
    """

    def __init__(self, model: PreTrainedModel, prompt: Tensor) -> None:
        if prompt.dim() != 2 or prompt.shape[0] != 1 or prompt.shape[1] == 0:
            raise ValueError(f"prompt must be [1, T] with T > 0, got {list(prompt.shape)}")
        recorder = _Recorder(model)
        with torch.inference_mode():
            output = model(
                prompt.to(model.device), past_key_values=recorder, logits_to_keep=1, use_cache=True
            )
        self.logits: Tensor = output.logits[0, -1]
        self._model = model
        self._prompt = prompt.to(model.device)
        self._layers = recorder.recorded

    def full_cache(self) -> DynamicCache:
        """transformers' own cache, holding the whole prompt."""
        cache = DynamicCache(config=self._model.config)
        with torch.inference_mode():
            for index, layer in enumerate(self._layers):
                cache.update(layer.keys, layer.values, index)
        return cache

    def cache(
        self,
        policy: str | Policy,
        budget: int | None = None,
        ratio: float | None = None,
        *,
        max_new_tokens: int = 4096,
    ) -> Cache:
        """A cache holding what the policy keeps of the prompt: as if the model had read it there.

        Parameters and errors are those of :class:`adakv.Cache`. A policy that has the prompt
        repeated reads it once more, without an instruction to do so.
        """
        cache = adakv.Cache(self._model, policy, budget, ratio, max_new_tokens=max_new_tokens)
        with torch.inference_mode():
            for index, layer in enumerate(self._layers):
                # Views, because a cache may note something on the tensors that it is given.
                keys, values = cache.update(layer.keys[:], layer.values[:], index)
                if layer.module is not None:
                    cache.layers[index].take_prompt(
                        layer.module, layer.queries, keys, values, *layer.rest, **layer.options
                    )
        if "repeat" in policies.get(policy).needs:
            with torch.inference_mode():
                cache.repeat(self._prompt)
        return cache
