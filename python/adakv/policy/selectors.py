"""Which entries a kv head keeps within its budget, by more than their scores.

By their scores alone: :class:`adakv.policy.base.TopScore`. The window is always among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

from torch import Tensor

from adakv import ops
from adakv.policy.base import Kept, Need
from adakv.policy.inputs import LayerInputs, check_choice, check_range, check_settings


@dataclass(frozen=True)
class TwoStage:
    """A part by score, the rest by what it does to the output (CriticalKV, arXiv 2502.03805).

    Of a head's candidates (its budget without the window) ``int(first * count)`` by score S, the
    rest by ``(S + eps) * N`` with ``N = ||v Wo||_1`` (Theorem 3.3, Algorithm 1). The first stage is
    a safety net: it makes the bound hold that the second stage minimises. ``eps`` fits scores that
    are means over the window; scores must not be negative.

    ``norm="l2_gram"`` is a cheaper N. ``counts_window`` counts the window in the first stage, as
    kvpress does (and here it is kept even where ``first * budget`` is smaller).
    """

    first: float = 0.5
    eps: float = 1e-4
    norm: ops.Norm = "l1"
    counts_window: bool = False
    needs: ClassVar[frozenset[Need]] = frozenset({"w_o"})

    def __post_init__(self) -> None:
        check_settings(self)
        check_range("first", self.first, 0, 1)
        check_range("eps", self.eps, 0)
        check_choice("norm", self.norm, get_args(ops.Norm))

    def select(
        self, scores: Tensor, budgets: Tensor, inputs: LayerInputs, *, window: int, total: int
    ) -> Kept:
        if self.counts_window:
            scores, window = inputs.pin_window(scores, window), 0
        return ops.select(
            scores,
            budgets,
            window=window,
            seq_lens=inputs.sequence_lens,
            norms=inputs.norms(self.norm),
            first=self.first,
            eps=self.eps,
            total=total,
        )
