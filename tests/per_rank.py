"""What tensor-parallel ranks keep, in one process: each shares the budget of its own heads out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adakv.policy import Allocator, LayerInputs


@dataclass(frozen=True)
class PerRank:
    """Budgets by ``inner`` over the kv heads of each rank, which all have as much to share out.

    Without a reserve, as inside vLLM, where all entries are there until the last layer is.
    """

    inner: Allocator
    ranks: int

    @property
    def layers(self) -> Any:
        return self.inner.layers

    @property
    def is_model_wide(self) -> bool:
        return self.inner.is_model_wide

    def allocate(
        self, scores: Tensor, inputs: LayerInputs, budgets: tuple[int, ...], *, window: int
    ) -> Tensor:
        heads = torch.arange(scores.shape[1], device=scores.device) % inputs.num_kv_heads
        rank_of = heads * self.ranks // inputs.num_kv_heads
        shares = torch.zeros(scores.shape[:2], dtype=torch.int32, device=scores.device)
        for rank in range(self.ranks):
            own = (rank_of == rank).nonzero()[:, 0]
            shares[:, own] = self.inner.allocate(
                scores[:, own].contiguous(), inputs, budgets, window=window
            )
        return shares

    def total(self, budget: int, *, window: int, prompt_len: int, num_kv_heads: int) -> int:
        given = {"window": window, "prompt_len": prompt_len, "num_kv_heads": num_kv_heads}
        return self.inner.total(budget, **given)
