"""An allocator between layers: each keeps the same share of what its scores sum up to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adakv.policy.allocators import Adaptive, Flat
from adakv.policy.base import LayerSchedule
from adakv.policy.inputs import LayerInputs, check_settings


@dataclass(frozen=True)
class MassShare:
    """One share of mass for all layers (PrefixKV, arXiv 2412.03409).

    A layer's scores are sorted, the mean over its kv heads is taken rank by rank, and as many
    entries stay in each of its heads as it takes to have a share p of their sum; p is the largest
    for which the budget lasts. Entries for which it lasts in one more layer go to the layer that
    misses the most of its mass, then to the lower one: so the total, ``L * Hkv * budget``, is
    exact. ``of_heads`` takes each kv head by itself, which is not in the paper.

    Scores must not be negative. All layers' prompts wait for the last one, which takes the memory
    of a full cache for a moment.
    """

    of_heads: bool = False
    layers: ClassVar[LayerSchedule] = Flat()
    is_model_wide: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self)

    def allocate(
        self, scores: Tensor, inputs: LayerInputs, budgets: tuple[int, ...], *, window: int
    ) -> Tensor:
        candidates = scores.masked_fill(~inputs.candidates(window), -torch.inf)
        ranked = candidates.sort(-1, descending=True).values
        stays, is_there = ranked == torch.inf, ranked > -torch.inf
        mass = ranked.clamp(min=0).masked_fill(stays, 0).double()  # [B, L * Hkv, T]
        heads = scores.shape[1] // inputs.num_layers
        if not self.of_heads:
            by_layer = len(mass), -1, heads, mass.shape[2]
            mass = mass.view(by_layer).mean(2)
            stays, is_there = (x.view(by_layer).any(2) for x in (stays, is_there))
        # What a layer would miss without this entry and those behind it: the larger, the earlier
        # does the common share want it.
        missed = mass.flip(-1).cumsum(-1).flip(-1)
        missed = (missed / missed[..., :1].clamp(min=1e-300)).float()
        missed = missed.masked_fill(~is_there, -torch.inf).masked_fill(stays, torch.inf)
        shares = Adaptive(floor=0.0).allocate(missed, inputs, budgets, window=window)
        return shares if self.of_heads else shares.repeat_interleave(heads, 1)

    def total(self, budget: int, *, window: int, prompt_len: int, num_kv_heads: int) -> int:
        return num_kv_heads * min(budget, prompt_len)
