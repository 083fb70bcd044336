"""What tensor-parallel ranks keep, in one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from adakv.policy import Adaptive, Allocator, Flat, LayerInputs
from adakv.vllm.ranks import Across, AllRanks


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


@dataclass(frozen=True)
class AcrossRanks:
    """Budgets by ``inner`` over the kv heads of all ranks, each of which keeps what it has room
    for in pages of ``page_size`` entries; of prompts of one length."""

    inner: Adaptive
    ranks: int
    page_size: int
    layers: ClassVar[Flat] = Flat()
    is_model_wide: ClassVar[bool] = True

    def allocate(
        self, scores: Tensor, inputs: LayerInputs, budgets: tuple[int, ...], *, window: int
    ) -> Tensor:
        heads = inputs.num_kv_heads // self.ranks
        of_ranks = scores.unflatten(1, (-1, self.ranks, heads)).permute(2, 0, 1, 3, 4)
        of_ranks = of_ranks.flatten(2, 3)  # [ranks, B, L * heads, T]
        own = replace(inputs, keys=inputs.keys[:, :heads], values=inputs.values[:, :heads])
        shares = []
        for rank, of_rank in enumerate(of_ranks):
            allocator = AllRanks(self.inner, self.page_size, Across(rank, lambda _: of_ranks))
            shares.append(allocator.allocate(of_rank, own, budgets, window=window))
        joined = torch.stack(shares, 1).unflatten(2, (-1, heads))  # [B, ranks, L, heads]
        return joined.transpose(1, 2).flatten(1)

    def total(self, budget: int, *, window: int, prompt_len: int, num_kv_heads: int) -> int:
        given = {"window": window, "prompt_len": prompt_len, "num_kv_heads": num_kv_heads}
        of_rank = AllRanks(self.inner, self.page_size, Across(0, Tensor.contiguous))
        return of_rank.total(budget, **given)
