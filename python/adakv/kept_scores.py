"""What the entries of prompts scored stays beside those that were kept, so that less of them can be
kept later (:mod:`adakv.shrinking`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adakv.entries import Whole
from adakv.ops import Kept
from adakv.policy import Policy
from adakv.policy.again import moved_scores


class KeptScores:
    """Those of the prompts that a :class:`adakv.reading.Reader` reads."""

    def __init__(self) -> None:
        self._layers: list[Tensor] = []  # [B, Hkv, T + 1] of what stays
        self._waiting: list[list[Tensor]] = []  # [L][groups] of what may still stay

    def put(self, policy: Policy, layer: int, wholes: Sequence[Whole]) -> None:
        """A layer's prompts, with their scores."""
        self._waiting[layer:] = [[whole.pinned(policy) for whole in wholes]]

    def keep(self, layer: int, kept: Sequence[Kept]) -> None:
        """Says what stays of a layer, of each group."""
        scores, self._waiting[layer] = self._waiting[layer], []
        groups = [moved_scores(*pair, behind=-torch.inf) for pair in zip(scores, kept, strict=True)]
        longest = max(x.shape[2] for x in groups)
        self._layers.append(torch.cat([fitting(x, longest) for x in groups]))

    def of(self, lengths: Tensor) -> list[Tensor]:
        """``[B, Hkv, M]`` float32 of each layer, slot by slot, with no more slots than its rows of
        ``lengths`` ``[L, B, Hkv]`` have: ``+inf`` for what always stays, ``-inf`` behind a row."""
        longest = lengths.amax((1, 2)).tolist()
        return [x[..., :n].clone() for x, n in zip(self._layers, longest, strict=True)]


def fitting(scores: Tensor, length: int) -> Tensor:
    """``[B, Hkv, length]``, ``-inf`` behind what there is."""
    return F.pad(scores, (0, length - scores.shape[2]), value=-torch.inf)
