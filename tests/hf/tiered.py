"""What caches with several formats in one row, or entries in another form, are asked alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import adakv
from hf.families import VOCAB
from hf.test_hf import GREEDY, prompts


def texts_of_loops(model: Any, kv_dtype: str) -> list[Tensor]:
    """Those of transformers' own loop, and of the one over slots."""
    texts, batch = [], prompts(150, (0, 33))
    with adakv.attach(model):
        for loop in ({}, {"custom_generate": adakv.cuda_graph_sample}):
            cache = adakv.Cache(model, "snapkv", budget=64, kv_dtype=kv_dtype)
            given = {"past_key_values": cache, **GREEDY, "max_new_tokens": 40}
            texts.append(model.generate(**batch, **given, **loop))
    return texts


def given_to_batches(policy: str, kv_dtype: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Prompts of unequal length, and the settings of a batch of them."""
    given = [torch.randint(3, VOCAB, (length,)) for length in (170, 60, 140, 90, 40)]
    settings: dict[str, Any] = {"policy": policy, "budget": 64, "max_new_tokens": 40}
    return given, {**settings, "kv_dtype": kv_dtype}


def written_alone(model: Any, prompt: Tensor, settings: dict[str, Any]) -> list[int]:
    """The tokens behind a prompt ``[T]`` that a cache of its own gets."""
    with adakv.attach(model):
        text = model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            past_key_values=adakv.Cache(model, **settings),
            **GREEDY | {"max_new_tokens": 40},
        )
    tokens: list[int] = text[0, len(prompt) :].tolist()
    return tokens


class Branched:
    """Two prompts in a cache, in a fork and in a copy that was moved, before a turn of 5 tokens.
    The model is attached."""

    def __init__(self, model: Any, kv_dtype: str) -> None:
        self._model, self._kv_dtype = model, kv_dtype
        self.batch = prompts(150, (0, 33))
        self.cache = self._new_cache()
        model(**self.batch, past_key_values=self.cache)
        self.fork, self.moved = self.cache.fork(2)
        self.moved.move_to("cpu")
        turn = torch.ones(2, 5, dtype=torch.int64)
        self.mask = torch.cat([self.batch["attention_mask"], turn], 1)
        self.turn = torch.randint(3, VOCAB, (2, 5))

    def _new_cache(self) -> adakv.Cache:
        return adakv.Cache(self._model, "snapkv", budget=64, kv_dtype=self._kv_dtype)

    def logits(self, cache: adakv.Cache) -> Tensor:
        """Those of the turn, behind one of the caches."""
        given = {"attention_mask": self.mask, "past_key_values": cache}
        found: Tensor = self._model(self.turn, **given).logits
        return found

    def beams(self) -> Tensor:
        """Texts of three beams behind the prompts."""
        given = {"past_key_values": self._new_cache(), **GREEDY, "num_beams": 3}
        texts: Tensor = self._model.generate(**self.batch, **given)
        return texts
