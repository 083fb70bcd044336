"""How much of a prompt to keep: the one place where a ratio becomes a number of entries."""

from __future__ import annotations

import math
from dataclasses import dataclass

from adakv.errors import integer, number
from adakv.policy.allocators import Everything
from adakv.policy.base import LayerBudget, Policy
from adakv.policy.presets import get


@dataclass(frozen=True)
class Budget:
    """How much of a prompt is kept: ``entries`` per kv head, or the share ``ratio`` of its tokens.

    Raises ``ValueError`` if not exactly one of the two is given, or if it is out of range.
    """

    policy: Policy
    entries: int | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        if (self.entries is None) == (self.ratio is None):
            raise ValueError(
                f"give either budget or ratio, got budget={self.entries} and ratio={self.ratio}"
            )
        if self.entries is not None:
            object.__setattr__(self, "entries", integer("budget", self.entries, -1, 2**31 - 1))
        if self.ratio is not None:
            object.__setattr__(self, "ratio", number("ratio", self.ratio))
        if self.entries is not None and self.entries < self._least:
            raise ValueError(
                f"budget must be at least {self._least}, the policy's window of "
                f"{self.policy.window} entries and its pinned first ones, got {self.entries}"
            )
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1, got {self.ratio}")

    @classmethod
    def given(cls, policy: str | Policy, entries: int | None, ratio: float | None) -> Budget:
        """From what users give; a policy that keeps everything needs neither number."""
        chosen = get(policy)
        if entries is None and ratio is None and isinstance(chosen.allocator.layers, Everything):
            ratio = 1.0
        return cls(chosen, entries, ratio)

    @property
    def _least(self) -> int:
        return self.policy.window + self.policy.scorer.pinned

    def of(self, prompt_len: int) -> int:
        """Mean entries per kv head, window included, for a prompt of so many tokens."""
        if self.ratio is None:
            assert self.entries is not None
            return self.entries
        share = math.floor(self.ratio * prompt_len + 0.5)
        return max(self.policy.window + 1, self._least, share)

    def waiting(self, prompt_len: int) -> int:
        """Entries per kv head that a layer holds, all heads on average, until the last is there."""
        if not self.policy.is_model_wide:
            return 0
        if not self.policy.reserves:
            return prompt_len
        return min(self.policy.reserved(self.of(prompt_len), prompt_len), prompt_len)

    def of_layers(
        self, prompt_len: int, *, num_kv_heads: int, num_layers: int
    ) -> list[LayerBudget]:
        """How much each layer keeps of a prompt."""
        budget = self.of(prompt_len)
        return [
            self.policy.layer_budget(
                prompt_len, budget, num_kv_heads=num_kv_heads, layer=layer, num_layers=num_layers
            )
            for layer in range(num_layers)
        ]

    def totals(self, prompt_len: int, *, num_kv_heads: int, num_layers: int) -> list[int]:
        """Most entries that each layer keeps of a prompt, all its kv heads together."""
        layers = self.of_layers(prompt_len, num_kv_heads=num_kv_heads, num_layers=num_layers)
        return [layer.total for layer in layers]
