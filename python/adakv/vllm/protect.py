"""A scorer around another one: every head keeps some spans of a prompt, whatever they score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adakv.policy import FoldingScorer, LayerInputs
from adakv.policy.base import Need, Scorer, needs_of


@dataclass(frozen=True)
class Protected:
    """Scores of ``+inf`` in ``spans`` ``(begin, end)``, as far as a prompt reaches.

    The budget must have room for them beside the window and the scorer's own pinned entries.
    """

    scorer: Scorer
    spans: tuple[tuple[int, int], ...]

    @property
    def window(self) -> int:
        return self.scorer.window

    @property
    def pinned(self) -> int:
        return self.scorer.pinned

    @property
    def needs(self) -> frozenset[Need]:
        """What ``scorer`` needs."""
        return needs_of(self.scorer)

    def score(self, inputs: LayerInputs) -> Tensor:
        return self._pin(self.scorer.score(inputs))

    def fold(self, folded: Any, part: LayerInputs) -> Any:
        """For a scorer that folds."""
        assert isinstance(self.scorer, FoldingScorer)
        return self.scorer.fold(folded, part)

    def finish(self, folded: Any, inputs: LayerInputs) -> Tensor:
        """For a scorer that folds."""
        assert isinstance(self.scorer, FoldingScorer)
        return self._pin(self.scorer.finish(folded, inputs))

    def _pin(self, scores: Tensor) -> Tensor:
        for begin, end in self.spans:
            scores[..., begin:end] = torch.inf
        return scores
