"""Tokens, and what a model says of them with a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adakv.hf.attachment import CACHE
from hf.families import VOCAB


def ids(length: int, batch: int = 1) -> Tensor:
    """``[B, length]``, random."""
    return torch.randint(3, VOCAB, (batch, length))


def logits(model: PreTrainedModel, tokens: Tensor, cache: Any, **settings: Any) -> Tensor:
    """``[B, length, V]`` of tokens that come behind what the cache holds."""
    with torch.no_grad():
        out: Tensor = model(tokens, **{CACHE: cache}, use_cache=True, **settings).logits
    return out
