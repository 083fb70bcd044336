"""A scorer that joins two rankings: what was looked at, and what is unlike the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adakv.policy.inputs import LayerInputs, check_range, pin_first
from adakv.policy.prompt_scorers import ColumnMax, Columns, WeighBy
from adakv.policy.scorers import KeyDiff


@dataclass(frozen=True)
class RankFusion(ColumnMax):
    """Entries that one of two rankings holds high: by :class:`ColumnMax`, or by :class:`KeyDiff`.
    A scorer of this library.

    ``V[h]`` are the scores B of :class:`ColumnMax` without the window's weight, from high to low,
    and ``rank`` counts from 0, both among the candidates of a head::

        J[h, t] = V[h][min(rank_B(t), rank_KeyDiff(t))]
        S[h, t] = max(J[h, t], window_weight * W[h, t] ** window_power * N[h, t])

    What a prompt looked at misses what nothing in it asked for, and keys that are unlike the others
    miss what was asked for. A rank says how an entry stands among those of its head, whatever the
    scale of the scores, so the two need no weights. As J takes its values from B alone, heads and
    layers are compared as if nothing had been joined. W is what the window's queries look at, a
    question that is there already: it comes on top, and its power keeps down what hardly any of
    them looks at.
    """

    stride: int = 4
    weigh_by: WeighBy = "all"
    window_weight: float = 4.0
    window_power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("window_power", self.window_power, 1)

    def _joined(self, prompt: Columns, inputs: LayerInputs) -> Tensor:
        candidates = inputs.candidates(self.window)  # [B or 1, 1, T]
        looked_at = self._with_floor(prompt.columns, inputs)
        rank, values = _ranked(looked_at, candidates)
        unlike, _ = _ranked(KeyDiff(window=self.window).score(inputs), candidates)
        scores = values.gather(2, rank.minimum(unlike))
        if self.window_weight:
            asked = self._asked(prompt, inputs) ** self.window_power
            scores = scores.maximum(self.window_weight * asked * inputs.norms(self.norm))
        return pin_first(scores, self.pinned)


def _ranked(scores: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """The rank of each entry ``[B, Hkv, T]`` int64 among the candidates of its head, which come
    before all others, and the scores from high to low; lower positions first where they are equal.
    """
    scores = scores.masked_fill(~candidates, -torch.inf)
    values, order = scores.sort(dim=2, descending=True, stable=True)
    places = torch.arange(scores.shape[2], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(2, order, places), values
