"""Allocators between layers: each gets a share that follows from how its scores are spread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adakv import ops
from adakv.policy.allocators import Adaptive, Flat, for_sequences
from adakv.policy.base import LayerSchedule
from adakv.policy.inputs import LayerInputs, check_range, check_settings

_ROUNDING = 1e-4  # a skewness that may be 0
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
        weights = self.weights(of_layers.flatten(2))
        dealt = _dealt(of_layers, weights, budgets, window=window).flatten(1, 2)
        return Adaptive(floor=self.floor).allocate(dealt, inputs, budgets, window=window)

    def weights(self, scores: Tensor) -> Tensor:
        """``[B, L]`` float64, e, from ``[B, L, n]``; what is infinite doesn't compete."""
        mass = _finite(scores)
        total = mass.sum(-1).clamp(min=1e-300)
        count = scores.isfinite().count_nonzero(-1).clamp(min=2)
        logs = mass.clamp(min=1e-300).log_()  # of 0 as large as you like
        entropy: Tensor = total.log() - (mass * logs).sum(-1) / total
        entropy = entropy.clamp(min=0) * (total > 1e-300)
        return entropy / count.log()

    def total(self, budget: int, *, window: int, prompt_len: int, num_kv_heads: int) -> int:
        return num_kv_heads * min(budget, prompt_len)


@dataclass(frozen=True)
class StrengthSkew:
    """Layers in proportion to how strong and how uneven their scores are (AirCache, arXiv
    2503.23956).

    A layer's weight is ``(sum / mean(sum) + skew / mean(skew)) / 2``, of the scores that compete in
    it, the mean over its kv heads, and the means over the layers; ``skew`` is the unbiased sample
    skewness, ``n / ((n - 1) (n - 2)) * sum(((S - mean(S)) / std(S)) ** 3)``. Every kv head of a
    layer keeps as much. Dealt out as by :class:`LayerEntropy`, over layers, and as exact;
    ``of_heads`` takes each kv head by itself, which is not in the paper.

    From a note of the paper, which doesn't say how layers are made comparable (here by their mean),
    nor what becomes of a negative skewness (here it counts as 0).

    Scores must not be negative. All layers' prompts wait for the last one.
    """

    of_heads: bool = False
    layers: ClassVar[LayerSchedule] = Flat()
    is_model_wide: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self)

    def allocate(
        self, scores: Tensor, inputs: LayerInputs, budgets: tuple[int, ...], *, window: int
    ) -> Tensor:
        of_layers = _by_layer(scores, inputs, window)  # [B, L, Hkv, T]
        batch, num_layers, heads, length = of_layers.shape
        shape = (batch, -1, 1, length) if self.of_heads else (batch, num_layers, heads, length)
        of_rows = of_layers.reshape(shape).mean(2)  # [B, L or L * Hkv, T]
        weights = self.weights(of_rows)
        dealt = _dealt(of_rows[:, :, None], weights, budgets, window=window)[:, :, 0]
        shares = Adaptive(floor=0.0).allocate(dealt, inputs, budgets, window=window)
        return shares if self.of_heads else shares.repeat_interleave(heads, 1)

    def weights(self, scores: Tensor) -> Tensor:
        """``[B, L]`` float64, from ``[B, L, n]``; what is infinite doesn't compete."""
        competes, x = scores.isfinite(), _finite(scores)
        count, sums = competes.sum(-1), x.sum(-1)
        apart = (x - (sums / count.clamp(min=1))[..., None]).masked_fill(~competes, 0)
        deviation = (apart.square().sum(-1) / (count - 1).clamp(min=1)).sqrt()
        cubes = (apart / deviation.clamp(min=1e-30)[..., None]).pow(3).sum(-1)
        skew = cubes * count / ((count - 1) * (count - 2)).clamp(min=1) * (count > 2)
        return (_of_mean(sums) + _of_mean(skew.where(skew > _ROUNDING, 0))) / 2

    def total(self, budget: int, *, window: int, prompt_len: int, num_kv_heads: int) -> int:
        return num_kv_heads * min(budget, prompt_len)


def _finite(scores: Tensor) -> Tensor:
    """float64, at least 0; 0 for what is infinite."""
    return scores.double().where(scores.isfinite(), 0).clamp_(min=0)


def _of_mean(x: Tensor) -> Tensor:
    """``[B, n]`` over their mean; 1 for all of a row that is nothing but 0."""
    mean = x.mean(-1, keepdim=True)
    return (x / mean.clamp(min=1e-300)).where(mean > 0, torch.ones_like(x))


def _by_layer(scores: Tensor, inputs: LayerInputs, window: int) -> Tensor:
    """``[B, L, Hkv, T]``: ``+inf`` for what stays anyway, ``-inf`` for what doesn't compete."""
    candidates = scores.masked_fill(~inputs.candidates(window) | scores.isnan(), -torch.inf)
    batch, rows, length = scores.shape
    return candidates.view(batch, inputs.num_layers, rows // inputs.num_layers, length)


def _dealt(scores: Tensor, weights: Tensor, budgets: tuple[int, ...], *, window: int) -> Tensor:
    """Scores ``[B, L, Hkv, T]`` as 1 for entries that get a part of the budgets and 0 for others:
    layers get some in proportion to weights ``[B, L]``, as Webster and Sainte-Lague deal seats.

    Within a layer the best: of equal ones those at lower positions, then in lower heads.
    """
    batch, num_layers, heads, length = scores.shape
    of_layer = scores.transpose(2, 3).flatten(2)  # [B, L, T * Hkv]
    competes = of_layer.isfinite()
    num_pinned = (of_layer == torch.inf).count_nonzero(2)[..., None]
    num_there = num_pinned + competes.count_nonzero(2)[..., None]
    # What each further seat of a layer is worth, whoever takes it.
    seats = torch.arange(0.5, length * heads, device=scores.device)
    quotients = weights.clamp(min=_LEAST)[..., None] / (seats - num_pinned)
    quotients = quotients.float().masked_fill(seats < num_pinned, torch.inf)
    quotients = quotients.masked_fill(seats > num_there, -torch.inf)
    shared = tuple(heads * (budget - window) for budget in budgets)

    def deal(sequences: slice, budget: int) -> Tensor:
        return ops.allocate(quotients[sequences], budget, window=0, floor=0.0)

    total = num_layers * sum(shared)
    kept = ops.select(of_layer, for_sequences(deal, shared), window=0, total=total)
    takes = of_layer.new_zeros(batch * num_layers, 1 + length * heads)  # behind the last one is -1
    takes[kept.rows(len(takes)), kept.positions.long() + 1] = takes.new_ones(())
    dealt = takes[:, 1:].view(of_layer.shape).where(competes, of_layer)
    return dealt.view(batch, num_layers, length, heads).transpose(2, 3)
