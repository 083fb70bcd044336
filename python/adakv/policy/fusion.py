"""A scorer that joins two rankings: what was looked at, and what is unlike the rest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from adakv.policy.inputs import LayerInputs, check_range
from adakv.policy.prompt_scorers import ColumnMax, Columns, WeighBy
from adakv.policy.scorers import KeyDiff


@dataclass(frozen=True)
class RankFusion(ColumnMax):
    """Entries that one of two rankings holds high: by :class:`ColumnMax`, or by :class:`KeyDiff`.
    A scorer of this library.

    ``V[h]`` are the scores of :class:`ColumnMax` from high to low, and ``rank`` counts from 0, both
    among the candidates of a head; with f = ``key_factor``::

        S[h, t] = V[h][min(rank_ColumnMax(t), f * (rank_KeyDiff(t) + 1) - 1)]

    What a prompt looked at misses what nothing in it asked for, and keys that are unlike the others
    miss what was asked for. A rank says how an entry stands among those of its head, whatever the
    scale of the scores. With f = 2 two entries of three come by the first ranking and one by the
    second, as far as they differ. As all values are those of :class:`ColumnMax`, heads and layers
    are compared as if nothing had been joined.
    """

    stride: int = 4
    weigh_by: WeighBy = "all"
    window_weight: float = 4.0
    key_factor: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("key_factor", self.key_factor, 1)

    def _joined(self, prompt: Columns, inputs: LayerInputs) -> Tensor:
        scores, unlike = (
            inputs.fill_others(x, self.window, -torch.inf)
            for x in (super()._joined(prompt, inputs), self._keys.score(inputs))
        )
        # V falls: of two ranks the lower one has the higher value, and the first one's is the score
        # itself. Of the ranking by keys every place in the first T / f lifts an entry.
        ranked = torch.stack([scores, unlike]).sort(dim=3, descending=True, stable=True)
        lifts = ranked.values[0, ..., self.key_factor - 1 :: self.key_factor]
        order = ranked.indices[1, ..., : lifts.shape[2]]
        return scores.scatter_reduce_(2, order, lifts, "amax")

    @cached_property
    def _keys(self) -> KeyDiff:
        return KeyDiff(window=self.window)
