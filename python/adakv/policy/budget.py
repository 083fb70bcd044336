"""How much of a prompt to keep: the one place where a ratio, or a number of bytes, becomes a number
of entries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from adakv.errors import integer, number
from adakv.policy.allocators import Everything
from adakv.policy.amount import Amount
from adakv.policy.base import LayerBudget, Policy
from adakv.policy.presets import get
from adakv.shape import Footprint


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
                "give either budget or ratio, or budget_bytes, got "
                f"budget={self.entries} and ratio={self.ratio}"
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

    @staticmethod
    def given(
        policy: str | Policy,
        entries: int | None = None,
        ratio: float | None = None,
        num_bytes: Any = None,
    ) -> Budget:
        """From what users give; a policy that keeps everything needs none of the numbers."""
        chosen = get(policy)
        if num_bytes is not None:
            if entries is not None or ratio is not None:
                raise ValueError(
                    "budget_bytes must be given without budget and ratio, got "
                    f"budget={entries} and ratio={ratio}"
                )
            return ByteBudget(chosen, limit=Amount.given("budget_bytes", num_bytes))
        if entries is None and ratio is None and isinstance(chosen.allocator.layers, Everything):
            ratio = 1.0
        budget = Budget(chosen, entries, ratio)
        return budget if chosen.bits is None else ByteBudget(chosen, limit=budget)

    @property
    def brief(self) -> str:
        """As it was given, for people."""
        return f"budget={self.entries}" if self.ratio is None else f"ratio={self.ratio:g}"

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

    def of_all(self, prompt_lens: Sequence[int]) -> int:
        """One number for all of some prompts."""
        return max(map(self.of, prompt_lens))

    def check(self, prompt_lens: Sequence[int]) -> None:
        """Raises ``ValueError`` if it is too small for prompts of such lengths."""

    def waiting(self, prompt_len: int) -> int:
        """Entries per kv head that a layer holds, all heads on average, until the last is there."""
        if not self.policy.is_model_wide:
            return 0
        if not self.policy.reserves or self.policy.fold is not None:  # what leaves is still read
            return prompt_len
        return min(self.policy.reserved(self.of(prompt_len), prompt_len), prompt_len)

    def of_layers(
        self, prompt_len: int, *, num_kv_heads: int, num_layers: int
    ) -> list[LayerBudget]:
        """How much each layer keeps of a prompt."""
        return _of_layers(self.policy, prompt_len, self.of(prompt_len), num_kv_heads, num_layers)

    def totals(self, prompt_len: int, *, num_kv_heads: int, num_layers: int) -> list[int]:
        """Most entries that each layer keeps of a prompt, all its kv heads together."""
        layers = self.of_layers(prompt_len, num_kv_heads=num_kv_heads, num_layers=num_layers)
        return [layer.total for layer in layers]


@dataclass(frozen=True, kw_only=True)
class ByteBudget(Budget):
    """So many bytes for all that a sequence takes of the cache.

    How many entries these are depends on the format of the pages, which may depend on the prompts:
    :meth:`decided` finds both when the prompts' lengths and the shape of the cache are known, and
    the other methods are for what it gives.

    Parameters
    ----------
    limit : :class:`adakv.policy.amount.Amount` or :class:`Budget`
        The bytes, or a budget of entries: then those that they take in plain pages.
    footprints : tuple of :class:`adakv.shape.Footprint`
        What a sequence takes: in the format that was decided for, and in the others.
    """

    limit: Amount | Budget
    footprints: tuple[Footprint, ...] = ()
    _known: dict[Any, int | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """It has neither entries nor a ratio."""

    @property
    def brief(self) -> str:
        if isinstance(self.limit, Budget):
            return self.limit.brief
        return f"budget_bytes={self.limit.brief}"

    def decided(self, footprints: Sequence[Footprint], prompt_lens: Sequence[int]) -> ByteBudget:
        """In one of some formats, for prompts of such lengths.

        It is the first one in which all prompts have room with all of their entries; if there is
        none, the one in which most of their entries have.
        """

        def held(footprint: Footprint) -> tuple[bool, int]:
            counts = [self._most(footprint, n) for n in prompt_lens]
            pairs = zip(counts, prompt_lens, strict=True)
            return None not in counts, sum(min(count or 0, n) for count, n in pairs)

        best = max(footprints, key=held)  # the first of those that hold the same
        others = (footprint for footprint in footprints if footprint is not best)
        return replace(self, footprints=(best, *others))

    @property
    def footprint(self) -> Footprint:
        """What a sequence takes, in the format that was decided for."""
        return self.footprints[0]

    def of(self, prompt_len: int) -> int:
        most = self._most(self.footprint, prompt_len)
        return self._least if most is None else most

    def of_all(self, prompt_lens: Sequence[int]) -> int:
        evicting = [self.of(n) for n in prompt_lens if self.of(n) < n]
        return min(evicting) if evicting else super().of_all(prompt_lens)

    def check(self, prompt_lens: Sequence[int]) -> None:
        for n in prompt_lens:
            if self._most(self.footprint, n) is not None:
                continue
            least = min(self.footprints, key=lambda x: self._bytes(x, self._least, n))
            name = "budget_bytes" if isinstance(self.limit, Amount) else "budget"
            raise ValueError(
                f"{name} must have room for {self._bytes(least, self._least, n)} bytes, which "
                f"{self._least} entries per kv head of a prompt of {n} tokens take in pages of "
                f"{least.shape.page_name}, got {self._limit(least, n)}"
            )

    def _limit(self, footprint: Footprint, prompt_len: int) -> int:
        if isinstance(self.limit, Amount):
            return self.limit.of(footprint.shape.full_bytes(prompt_len))
        return self._bytes(footprint.plain, self.limit.of(prompt_len), prompt_len)

    def _bytes(self, footprint: Footprint, entries: int, prompt_len: int) -> int:
        """What a sequence takes that keeps so many entries per kv head."""
        heads, num_layers = footprint.shape.num_kv_heads, footprint.shape.num_layers
        layers = _of_layers(self.policy, prompt_len, entries, heads, num_layers)
        return footprint.bytes_of([layer.total for layer in layers])

    def _most(self, footprint: Footprint, prompt_len: int) -> int | None:
        """Most entries per kv head that have room, all of them at most; None if the fewest that the
        policy can do with have none."""
        is_plain = footprint.shape.kv_dtype == "auto" and not footprint.shape.has_biases
        if isinstance(self.limit, Budget) and is_plain:
            return self.limit.of(prompt_len)
        key = footprint, prompt_len
        if key not in self._known:
            limit = self._limit(footprint, prompt_len)
            self._known[key] = self._search(footprint, prompt_len, limit)
        return self._known[key]

    def _search(self, footprint: Footprint, prompt_len: int, limit: int) -> int | None:
        def has_room(entries: int) -> bool:
            return self._bytes(footprint, entries, prompt_len) <= limit

        low, high = self._least, max(prompt_len, self._least)
        if has_room(high):
            return high
        if not has_room(low):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if has_room(middle) else (low, middle)
        return low


def _of_layers(
    policy: Policy, prompt_len: int, entries: int, num_kv_heads: int, num_layers: int
) -> list[LayerBudget]:
    """How much each layer keeps of a prompt, of so many entries per kv head on average."""
    return [
        policy.layer_budget(
            prompt_len, entries, num_kv_heads=num_kv_heads, layer=layer, num_layers=num_layers
        )
        for layer in range(num_layers)
    ]
