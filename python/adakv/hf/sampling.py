"""How the next token is chosen from logits: the largest, or by chance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from adakv.policy.inputs import check_settings


class Chooser(Protocol):
    """What a decode step ends with. It must not wait for the device."""

    def choose(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """``[B]`` int64 tokens from logits ``[B, V]`` and numbers in [0, 1), ``[B]`` float64."""


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 takes the most likely token; ``top_k`` 0 and ``top_p`` 1 are off.

    Chance comes in as numbers from outside, one per token, so that choosing has no state.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.is_greedy and (self.top_k or self.top_p < 1):
            raise ValueError("temperature must be above 0 where top_k or top_p is given, got 0")

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature == 0

    def choose(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """``[B]`` int64 tokens from logits ``[B, V]`` and numbers in [0, 1), ``[B]`` float64."""
        scores = logits.float()
        if self.is_greedy:
            return scores.argmax(-1)
        for warper in self._warpers:
            scores = warper(None, scores)
        # In float64, so that rounding leaves no room for a token of probability 0.
        ends = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
        return torch.searchsorted(ends, uniforms[:, None] * ends[:, -1:], right=True)[:, 0]

    @property
    def _warpers(self) -> list[Callable[[Tensor | None, Tensor], Tensor]]:
        warpers: list[Any] = [TemperatureLogitsWarper(self.temperature)]
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers
