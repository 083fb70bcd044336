"""Allocators between layers: each gets a share that follows from how its scores are spread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adakv.policy.allocators import Adaptive, Flat
from adakv.policy.base import LayerSchedule
from adakv.policy.inputs import LayerInputs, check_range, check_settings

_LEAST = 1e-6  # weight of a layer that would have none, so that its entries keep their order


@dataclass(frozen=True)
class LayerEntropy:
    """Layers in proportion to the entropy of their scores (LAVa, arXiv 2509.09754).

    A layer whose scores are spread gets more than one that looks at few entries: its weight is
    ``e = H(S / sum(S)) / log(n)``, the entropy of its n scores, those of all its kv heads together.
    Within a layer the best entries stay, whichever heads they are of. ``floor`` of the mean budget
    is given to every head of every layer, and the rest by that rule: 0 is the paper's formula, 0.2
    what its code does in its own measurements.

    Candidates are dealt out one by one, each to the layer with the largest ``e / (count + 0.5)``,
    which is a share rounded to the nearest number; the total, ``L * Hkv * budget``, is exact. A
    layer that comes later takes some from those before it and gives none back: so budgets that are
    made anew after every layer, as the paper has it, keep the same entries in the end.

    Scores must not be negative. All layers' prompts wait for the last one, which takes the memory
    of a full cache for a moment.
    """

    floor: float = 0.2
    layers: ClassVar[LayerSchedule] = Flat()
    is_model_wide: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self)
        check_range("floor", self.floor, 0, 1)

    def allocate(
        self, scores: Tensor, inputs: LayerInputs, budgets: tuple[int, ...], *, window: int
    ) -> Tensor:
        of_layers = _by_layer(scores, inputs, window)  # [B, L, Hkv, T]
        competes = of_layers.isfinite()
        mass = of_layers.clamp(min=0).masked_fill(~competes, 0).flatten(2).double()
        p = mass / mass.sum(-1, keepdim=True).clamp(min=1e-300)
        count = competes.flatten(2).sum(-1)
        weights = torch.special.entr(p).sum(-1) / count.clamp(min=2).log()
        dealt = _dealt(of_layers, weights).flatten(1, 2)
        return Adaptive(floor=self.floor).allocate(dealt, inputs, budgets, window=window)

    def total(self, budget: int, *, window: int, prompt_len: int, num_kv_heads: int) -> int:
        return num_kv_heads * min(budget, prompt_len)


def _by_layer(scores: Tensor, inputs: LayerInputs, window: int) -> Tensor:
    """``[B, L, Hkv, T]``: ``+inf`` for what stays anyway, ``-inf`` for what doesn't compete."""
    candidates = scores.masked_fill(~inputs.candidates(window) | scores.isnan(), -torch.inf)
    batch, rows, length = scores.shape
    return candidates.view(batch, inputs.num_layers, rows // inputs.num_layers, length)


def _dealt(scores: Tensor, weights: Tensor) -> Tensor:
    """Scores ``[B, L, Hkv, T]`` float32 by whose order layers get entries in proportion to weights
    ``[B, L]``, as Webster and Sainte-Lague deal seats.

    Within a layer by its own scores: equal ones lower position first, then lower head.
    """
    batch, num_layers, heads, length = scores.shape
    of_layer = scores.transpose(2, 3).flatten(2)  # [B, L, T * Hkv]
    order = of_layer.sort(dim=2, descending=True, stable=True).indices
    places = torch.arange(length * heads, device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(2, order, places)
    rank = rank - (of_layer == torch.inf).sum(2, keepdim=True)  # among those that compete
    quotients = weights.clamp(min=_LEAST)[..., None].double() / (rank + 0.5)
    dealt = quotients.float().where(of_layer.isfinite(), of_layer)
    return dealt.view(batch, num_layers, length, heads).transpose(2, 3)
