"""An allocator around another one: what a row's last page has room for is kept as well."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adakv.policy.base import Allocator, LayerSchedule, Need, needs_of
from adakv.policy.inputs import LayerInputs, check_range, check_settings


@dataclass(frozen=True)
class WholePages:
    """Each head's budget, rounded up to whole pages of ``page_size`` entries.

    A row's last page is taken whole, however few entries are in it: this keeps the head's next best
    ones there. The rows take as many pages as with ``allocator`` alone. A prompt that is shorter
    than a row's pages is kept whole in it.
    """

    allocator: Allocator
    page_size: int = 16

    def __post_init__(self) -> None:
        check_settings(self)
        check_range("page_size", self.page_size, 1)

    @property
    def layers(self) -> LayerSchedule:
        return self.allocator.layers

    @property
    def is_model_wide(self) -> bool:
        return self.allocator.is_model_wide

    @property
    def needs(self) -> frozenset[Need]:
        """What ``allocator`` needs."""
        return needs_of(self.allocator)

    def allocate(
        self, scores: Tensor, inputs: LayerInputs, budgets: tuple[int, ...], *, window: int
    ) -> Tensor:
        shares = self.allocator.allocate(scores, inputs, budgets, window=window)
        filled = (shares + (self.page_size - 1)) // self.page_size * self.page_size
        return torch.minimum(filled, inputs.ends.to(filled.dtype))

    def total(self, budget: int, *, window: int, prompt_len: int, num_kv_heads: int) -> int:
        exact = self.allocator.total(
            budget, window=window, prompt_len=prompt_len, num_kv_heads=num_kv_heads
        )
        return min(exact + num_kv_heads * (self.page_size - 1), num_kv_heads * prompt_len)

    def least(self, budget: int, **where: int) -> int:
        """What ``allocator`` gives to every kv head at least."""
        least = getattr(self.allocator, "least", None)
        return budget if least is None else int(least(budget, **where))
