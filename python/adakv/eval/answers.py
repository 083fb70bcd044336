"""What a model writes from the full cache of a prompt, and how near it comes from another cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adakv.eval.metrics import Quality, compare, follow
from adakv.eval.prefill import Prefill


class FullAnswer:
    """The full cache's own answer of up to ``max_new_tokens``, at least 2, read greedily."""

    def __init__(self, model: Any, prefill: Prefill, max_new_tokens: int) -> None:
        self._model = model
        self.tokens = greedy(model, prefill.full_cache(), prefill.logits, max_new_tokens)
        # The first token comes from the prefill and is always the same: the rest is compared.
        self._compared = torch.tensor(self.tokens, device=model.device)
        self._logits = self._follow(prefill.full_cache())

    def quality_of(self, cache: Any) -> Quality:
        """How near a cache that holds the prompt, and nothing else, comes to the full one."""
        return compare(self._logits, self._follow(cache), self._compared[1:])

    def _follow(self, cache: Any) -> Tensor:
        return follow(self._model, cache, self._compared[:-1])


def greedy(model: Any, cache: Any, logits: Tensor, max_new_tokens: int) -> list[int]:
    """At least two tokens, up to the end of the text; the first is chosen from ``logits`` [V]."""
    end = model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    tokens = [int(logits.argmax())]
    while len(tokens) < max_new_tokens and (len(tokens) < 2 or tokens[-1] not in ends):
        logits = follow(model, cache, torch.tensor(tokens[-1:]))[-1]
        tokens.append(int(logits.argmax()))
    return tokens
