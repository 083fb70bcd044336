"""A scorer with settings to try out, for finding one that serves every question."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from adakv import ops
from adakv.policy.base import Need
from adakv.policy.inputs import LayerInputs, check_choice, check_range, check_scorer, pin_first
from adakv.policy.prompt_scorers import ExpectedAttention, _last_queries, _mean

Boost = Literal["all", "new", "excess", "peak", "surprise"]


@dataclass(frozen=True)
class Evidence:
    """The best evidence for an entry: of the queries before the window, of the window's, and of
    those to be expected.

    With C the maxima over the queries before the window, W those over the window's and E the
    expected attention::

        S = max(C, B, expected_weight * E, their mean) * N

        B = w * W                                boost="all"
        B = w * W where W > C, elsewhere W       boost="new"
        B = W + (w - 1) * max(W - C, 0)          boost="excess"
        B = (1 + (w - 1) * max over t of W) * W  boost="peak"
        B = (1 + (w - 1) * s) * W, where s is the share of sum W above C   boost="surprise"
    """

    window: int = 32
    distance: int = 32
    window_weight: float = 4.0
    boost: Boost = "all"
    prompt_weight: float = 1.0
    expected_weight: float = 0.0
    normalised: bool = False
    share_norms: bool = False
    pool: ops.Pool = "max"
    pool_width: int = 7
    pinned: int = 4
    needs: ClassVar[frozenset[Need]] = frozenset({"all_queries", "w_o", "rotate"})

    def __post_init__(self) -> None:
        check_scorer(self)
        check_range("window_weight", self.window_weight, 0)
        check_choice("boost", self.boost, get_args(Boost))

    def score(self, inputs: LayerInputs) -> Tensor:
        candidates = inputs.candidates(self.window)
        before = self._before(inputs).masked_fill(~candidates, 0) * self.prompt_weight
        asked = self._asked(inputs).masked_fill(~candidates, 0)
        if self.normalised:
            before, asked = self._per_layer(before), self._per_layer(asked)
        scores = before.maximum(self._boosted(before, asked))
        if self.expected_weight:
            foreseen = self._expected.score(inputs)
            foreseen = foreseen.masked_fill(~candidates | foreseen.isinf(), 0)
            if self.normalised:
                foreseen = self._per_layer(foreseen)
            scores = scores.maximum(self.expected_weight * foreseen)
        norms = inputs.norms("l2_gram").masked_fill(~candidates, 0)
        if self.share_norms:
            norms = norms / _mean(norms, candidates)
        return pin_first(scores.maximum(_mean(scores, candidates)) * norms, self.pinned)

    def _per_layer(self, x: Tensor) -> Tensor:
        return x / x.mean((1, 2), keepdim=True).clamp(min=1e-30)

    def _boosted(self, before: Tensor, asked: Tensor) -> Tensor:
        more = self.window_weight - 1
        if self.boost == "all":
            return self.window_weight * asked
        if self.boost == "new":
            return torch.where(asked > before, self.window_weight * asked, asked)
        excess = (asked - before).clamp(min=0)
        if self.boost == "excess":
            return asked + more * excess
        if self.boost == "peak":
            return asked * (1 + more * asked.amax(-1, keepdim=True).clamp(max=1))
        surprise = excess.sum(-1, keepdim=True) / asked.sum(-1, keepdim=True).clamp(min=1e-30)
        return asked * (1 + more * surprise)

    def _before(self, inputs: LayerInputs) -> Tensor:
        """Maxima over the queries before the window; prompts of one length, without padding."""
        count = inputs.length - self.window
        columns = ops.score(
            inputs.queries[:, :, :count].contiguous(),
            inputs.keys[:, :, :count].contiguous(),
            **inputs.attention.logits,
            window_reduce="max",
            group_reduce="max",
            pool="none",
            window=0,
            distance=self.distance,
        )
        return F.pad(columns, (0, self.window))

    def _asked(self, inputs: LayerInputs) -> Tensor:
        return ops.score(
            _last_queries(inputs, self.window),
            inputs.keys,
            seq_lens=inputs.seq_lens,
            **inputs.attention.logits,
            window_reduce="max",
            group_reduce="max",
            pool=self.pool,
            pool_width=self.pool_width,
        )

    @cached_property
    def _expected(self) -> ExpectedAttention:
        return ExpectedAttention(value_norm=False)
