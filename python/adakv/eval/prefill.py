"""One forward over a prompt, from which any number of caches is filled.

A policy acts after a layer's prefill attention and does not change it. So queries, keys and values
of a prompt are the same for every policy, and reading the prompt once serves them all.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers import Cache as TransformersCache
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import adakv
from adakv import policy as policies
from adakv.hf import Cache, hidden
from adakv.hf.attachment import CACHE, cache_layers, decoder_of
from adakv.hf.layers import AttendingLayer, attend_to_prompt
from adakv.hf.looking import read_beside
from adakv.policy import Need, Policy
from adakv.reading import Part


class _RecordingLayer(AttendingLayer):
    """A full-attention layer that remembers all that any policy asks of a prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: tuple[Part, ...] = ()

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
        """The model's own attention."""
        needs = frozenset({"all_queries"})
        result, part = attend_to_prompt(inner, module, query, key, value, mask, needs, **kwargs)
        self.parts += (part._replace(hidden=self.hidden),)
        self.hidden = None
        return result

    def get_seq_length(self) -> int:
        return sum(part.queries.shape[2] for part in self.parts)

    def part(self) -> Part:
        """The prompt as if it had come at once."""
        if len(self.parts) == 1:
            return self.parts[0]
        queries = torch.cat([part.queries for part in self.parts], 2)
        known = [part.hidden for part in self.parts if part.hidden is not None]
        hidden = torch.cat(known, 1) if len(known) == len(self.parts) else None
        return self.parts[-1]._replace(queries=queries, lse=None, hidden=hidden)


class _Recorder(TransformersCache):
    """A cache that remembers one prompt, with the queries; it may begin as another one ended."""

    def __init__(
        self, model: PreTrainedModel, needs: Collection[Need], before: _Recorder | None = None
    ) -> None:
        own = cache_layers(decoder_of(model))
        if any(
            not isinstance(layer, DynamicLayer) or hasattr(layer, "conv_states") for layer in own
        ):
            raise ValueError(
                f"model: {type(model).__name__} has layers with states, which one reading of a "
                "prompt can't give to many caches"
            )
        layers = [_RecordingLayer() if type(layer) is DynamicLayer else layer for layer in own]
        self.entries: dict[int, tuple[Tensor, Tensor]] = {}  # [1, Hkv, T, D] keys and values
        super().__init__(layers=layers)
        recording = [i for i, x in enumerate(layers) if isinstance(x, _RecordingLayer)]
        hidden.tell(self, needs, decoder_of(model), recording)
        if before is not None:
            self.entries |= before.entries
            for layer, ended in zip(layers, before.layers, strict=True):
                layer.parts = ended.parts

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx in self.entries:
            before = self.entries[layer_idx]
            key_states = torch.cat([before[0], key_states], 2)
            value_states = torch.cat([before[1], value_states], 2)
        self.entries[layer_idx] = key_states, value_states
        # A view, as what is handed back may be tagged.
        return super().update(key_states[:], value_states, layer_idx, *args, **kwargs)


class Prefill:
    """A prompt that a model has read, for filling caches.

    Holds queries, keys and values of all layers: ``(Hq + 2 Hkv) * D`` numbers a token and layer.

    Parameters
    ----------
    model : PreTrainedModel
        Under :func:`adakv.attach`, here and whenever one of the caches is used.
    prompt : ``[1, T]`` int64
        Its tokens.
    needs : needs of policies, optional
        :attr:`adakv.Policy.needs` of those that will choose from it. Only for one that needs
        "hidden" more has to be remembered than said above: E numbers a token and layer.

    Attributes
    ----------
    logits : ``[V]``
        Of the token after the prompt.
    """

    def __init__(
        self, model: PreTrainedModel, prompt: Tensor, *, needs: Collection[Need] = ()
    ) -> None:
        self._model = model
        self._needs = needs
        self._recorder = _Recorder(model, needs)
        self._prompt = torch.empty(1, 0, dtype=torch.int64, device=model.device)
        self._read(prompt)

    def followed_by(self, more: Tensor) -> Prefill:
        """The prompt with ``[1, S]`` more tokens behind it, of which only these are read.

        Raises
        ------
        ValueError
            If the model has layers without full attention.
        """
        if not all(isinstance(layer, _RecordingLayer) for layer in self._recorder.layers):
            raise ValueError(
                f"model: {type(self._model).__name__} has layers without full attention, which "
                "read a prompt as a whole"
            )
        longer = copy.copy(self)
        longer._recorder = _Recorder(self._model, self._needs, self._recorder)
        longer._read(more)
        return longer

    def _read(self, tokens: Tensor) -> None:
        if tokens.dim() != 2 or tokens.shape[0] != 1 or tokens.shape[1] == 0:
            raise ValueError(f"prompt must be [1, T] with T > 0, got {list(tokens.shape)}")
        tokens = tokens.to(self._model.device)
        with torch.inference_mode():
            output = self._model(
                tokens, logits_to_keep=1, use_cache=True, **{CACHE: self._recorder}
            )
        self.logits: Tensor = output.logits[0, -1]
        self._prompt = torch.cat([self._prompt, tokens], 1)

    def full_cache(self) -> DynamicCache:
        """transformers' own cache, holding the whole prompt."""
        cache = DynamicCache(config=self._model.config)
        with torch.inference_mode():
            for index, entries in self._recorder.entries.items():
                cache.update(*entries, index)
        return cache

    def cache(
        self,
        policy: str | Policy,
        budget: int | None = None,
        ratio: float | None = None,
        *,
        budget_bytes: int | str | None = None,
        kv_dtype: str | None = None,
        max_new_tokens: int = 4096,
        protect: Any = None,
        classes: Any = None,
        read: Any = None,
    ) -> Cache:
        """A cache holding what the policy keeps of the prompt: as if the model had read it there.

        Parameters and errors are those of :class:`adakv.Cache`. A policy that has the prompt
        repeated reads it once more, without an instruction to do so.
        """
        settings: dict[str, Any] = {"kv_dtype": kv_dtype, "max_new_tokens": max_new_tokens}
        settings |= {
            "budget_bytes": budget_bytes,
            "protect": protect,
            "classes": classes,
            "read": read,
        }
        cache = adakv.Cache(self._model, policy, budget, ratio, **settings)
        with torch.inference_mode():
            for index, (keys, values) in self._recorder.entries.items():
                cache.update(keys[:], values, index)
                recorded = self._recorder.layers[index]
                if isinstance(recorded, _RecordingLayer):
                    cache.layers[index].take(recorded.part(), None)
        if "repeat" in policies.get(policy).needs:
            with torch.inference_mode():
                cache.repeat(self._prompt)
        read_beside(cache, self._prompt)
        return cache
