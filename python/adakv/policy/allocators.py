"""How a budget is shared out.

Among the layers by a schedule (Flat, Pyramid, Everything): host integers, before scores exist.
Among the kv heads of a layer by an allocator (Uniform, Adaptive): on the device, from the scores.
Both at once by ModelWide, from the scores of all layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from adakv import ops
from adakv.policy.base import LayerSchedule, Need
from adakv.policy.inputs import LayerInputs, check_choice, check_range, check_settings

BudgetsFrom = Literal["scores", "critical"]
Rounding = Literal["exact", "official"]
ModelWideSafeguard = Literal["blend", "hard_floor"]
ShortPrompts = Literal["pyramid", "flat"]

_EPS = 1e-4  # of CriticalKV's criterion, arXiv 2502.03805


@dataclass(frozen=True)
class Flat:
    """The same budget for every layer."""

    def budget(
        self, mean: int, *, window: int, prompt_len: int, layer: int, num_layers: int
    ) -> int:
        return mean


@dataclass(frozen=True)
class Everything:
    """As much as there is: nothing is evicted, and so nothing is scored."""

    def budget(
        self, mean: int, *, window: int, prompt_len: int, layer: int, num_layers: int
    ) -> int:
        return prompt_len


@dataclass(frozen=True)
class Pyramid:
    """More for the first layers, less for the last, in even steps (PyramidKV, arXiv 2406.02069).

    Of b = mean - window candidates per layer the last layer gets ``b / beta`` and the first
    ``2 * b - b / beta``; if that is more than the n candidates of the prompt, the first gets n and
    the last ``2 * b - n``. Computed for each prompt.

    ``rounding="exact"`` gives ``num_layers * b`` in sum, by largest remainder. ``"official"`` cuts
    the step to an integer as the authors' code does, and spends up to 15 % more.
    ``short_prompts="flat"`` treats prompts under ``2 * b`` tokens as Flat (KVCache-Factory).
    """

    beta: int = 20
    rounding: Rounding = "exact"
    short_prompts: ShortPrompts = "pyramid"

    def __post_init__(self) -> None:
        check_settings(self)
        check_range("beta", self.beta, 1)
        check_choice("rounding", self.rounding, get_args(Rounding))
        check_choice("short_prompts", self.short_prompts, get_args(ShortPrompts))

    def budget(
        self, mean: int, *, window: int, prompt_len: int, layer: int, num_layers: int
    ) -> int:
        b, n = mean - window, prompt_len - window
        flat = self.short_prompts == "flat" and prompt_len < 2 * b
        if flat or b >= n or num_layers == 1:
            return mean
        if self.rounding == "exact":
            return window + _exact_steps(b, n, self.beta, num_layers)[layer]
        low = b // self.beta
        high = min(2 * b - low, n)
        low = 2 * b - high
        return window + high - layer * ((high - low) // (num_layers - 1))


@dataclass(frozen=True)
class Uniform:
    """The same budget for every kv head of a layer, as SnapKV and PyramidKV have it."""

    layers: LayerSchedule = Flat()
    is_model_wide: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_settings(self)

    def allocate(
        self, scores: Tensor, inputs: LayerInputs, budgets: tuple[int, ...], *, window: int
    ) -> Tensor:
        def fill(sequences: slice, budget: int) -> Tensor:
            shape = scores[sequences].shape[:2]
            return torch.full(shape, budget, dtype=torch.int32, device=scores.device)

        return for_sequences(fill, budgets)

    def total(self, budget: int, *, window: int, prompt_len: int, num_kv_heads: int) -> int:
        return num_kv_heads * min(budget, prompt_len)


@dataclass(frozen=True)
class Adaptive:
    """Budgets per kv head from one top-k over all heads of the layer (Ada-KV, arXiv 2407.11550).

    ``f[h]`` counts head h's candidates among the layer's ``Hkv * b`` best (Algorithm 1). ``floor``,
    the paper's alpha, is the share that is given evenly; ``safeguard`` says how
    (:func:`adakv.ops.allocate`). 1 is SnapKV, 0 the bare Algorithm 1.

    ``budgets_from="critical"`` compares ``(score + 1e-4) * norm`` instead of scores.
    For parity: ``weigh_heads`` multiplies each head's scores by the share of them in its own top b
    (KVCache-Factory); ``counts_window`` lets the window fill the floor first (kvpress).
    """

    floor: float = 0.2
    safeguard: ops.Safeguard = "blend"
    layers: LayerSchedule = Flat()
    budgets_from: BudgetsFrom = "scores"
    weigh_heads: bool = False
    counts_window: bool = False
    is_model_wide: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_settings(self)
        check_range("floor", self.floor, 0, 1)
        check_choice("safeguard", self.safeguard, get_args(ops.Safeguard))
        check_choice("budgets_from", self.budgets_from, get_args(BudgetsFrom))

    @property
    def needs(self) -> frozenset[Need]:
        """``w_o`` only if budgets come from weighed scores."""
        return frozenset({"w_o"} if self.budgets_from == "critical" else ())

    def allocate(
        self, scores: Tensor, inputs: LayerInputs, budgets: tuple[int, ...], *, window: int
    ) -> Tensor:
        if self.budgets_from == "critical":
            weighed = (scores + _EPS) * inputs.norms()
            scores = torch.where(scores == torch.inf, scores, weighed)
        if self.weigh_heads:
            weighed = scores * _head_weights(scores, inputs, budgets, window)
            scores = torch.where(scores == torch.inf, scores, weighed)
        if self.counts_window:
            scores, window = inputs.pin_window(scores, window), 0

        seq_lens = inputs.sequence_lens

        def run(sequences: slice, budget: int) -> Tensor:
            return ops.allocate(
                scores[sequences],
                budget,
                window=window,
                seq_lens=None if seq_lens is None else seq_lens[sequences],
                floor=self.floor,
                safeguard=self.safeguard,
            )

        return for_sequences(run, budgets)

    def total(self, budget: int, *, window: int, prompt_len: int, num_kv_heads: int) -> int:
        everything = num_kv_heads * prompt_len
        if self.safeguard != "official_round" or prompt_len <= budget:
            return min(num_kv_heads * budget, everything)
        b = budget - window
        rounded_up = (1 - self.floor) * b + int(self.floor * b) + 0.5
        return min(num_kv_heads * window + math.ceil(num_kv_heads * rounded_up), everything)

    def least(self, budget: int, *, window: int, prompt_len: int, layer: int, pinned: int) -> int:
        """Entries that every kv head gets if each has ``pinned`` candidates of score ``+inf``."""
        if self.safeguard != "official_round":
            return budget
        b = budget - window
        return window + round((1 - self.floor) * min(pinned, b) + int(self.floor * b))


@dataclass(frozen=True)
class Capped:
    """As many entries as have a score: what is ``-inf`` leaves, however much room there is.

    The budget is what a layer holds at most: where more entries have a score, the best of all its
    kv heads stay (:class:`Adaptive`). ``floor`` of it is then given evenly. A prompt that fits into
    it stays whole, among others as alone.
    """

    floor: float = 0.0
    layers: ClassVar[LayerSchedule] = Flat()
    is_model_wide: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_settings(self)
        check_range("floor", self.floor, 0, 1)

    def allocate(
        self, scores: Tensor, inputs: LayerInputs, budgets: tuple[int, ...], *, window: int
    ) -> Tensor:
        shares = Adaptive(floor=self.floor).allocate(scores, inputs, budgets, window=window)
        capped = shares.minimum(_num_scored(scores, inputs, window))
        if inputs.seq_lens is not inputs.sequence_lens:  # a text, which is always cut
            return capped
        fit = [[n <= b] for n, b in zip(inputs.prompt_lens, budgets, strict=True)]
        return shares.where(torch.tensor(fit).to(shares.device, non_blocking=True), capped)

    def total(self, budget: int, *, window: int, prompt_len: int, num_kv_heads: int) -> int:
        return num_kv_heads * min(budget, prompt_len)


@dataclass(frozen=True)
class ModelWide:
    """One top-k over the kv heads of all layers, as Layer-DefensiveKV (arXiv 2510.13334) and KVzip
    (arXiv 2505.23416) spend their budgets.

    Ada-KV's Algorithm 1 with the ``L * Hkv`` heads of a model instead of a layer's. The total,
    ``L * Hkv * budget``, is exact; ``floor`` of the even budget is given to every head of every
    layer, by ``safeguard`` (:func:`adakv.ops.allocate`). Equal scores: lower position first, then
    lower layer, then lower head.

    Scores of different layers must be comparable. All layers' prompts wait for the last one, which
    takes the memory of a full cache for a moment. ``reserve=r`` bounds it: each layer holds its
    best ``r * Hkv * budget`` entries and drops the rest at once. A layer to which the whole model
    would give more gets no more, and with a ``floor`` some of the total may be left unused.
    """

    floor: float = 0.0
    safeguard: ModelWideSafeguard = "blend"
    reserve: float | None = None
    layers: ClassVar[LayerSchedule] = Flat()
    is_model_wide: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self)
        check_range("floor", self.floor, 0, 1)
        check_choice("safeguard", self.safeguard, get_args(ModelWideSafeguard))
        check_range("reserve", 1 if self.reserve is None else self.reserve, 1)

    def allocate(
        self, scores: Tensor, inputs: LayerInputs, budgets: tuple[int, ...], *, window: int
    ) -> Tensor:
        shares = self._of_one_layer.allocate(scores, inputs, budgets, window=window)
        is_one_layer = scores.shape[1] < inputs.num_layers * inputs.num_kv_heads
        if self.reserve is None or is_one_layer:  # of one alone nothing was dropped yet
            return shares
        return shares.minimum(_num_scored(scores, inputs, window))

    @functools.cached_property
    def _of_one_layer(self) -> Adaptive:
        """What shares a budget out where all layers are taken for one."""
        return Adaptive(floor=self.floor, safeguard=self.safeguard)

    def total(self, budget: int, *, window: int, prompt_len: int, num_kv_heads: int) -> int:
        return num_kv_heads * min(budget, prompt_len)


def _num_scored(scores: Tensor, inputs: LayerInputs, window: int) -> Tensor:
    """``[B, Hkv]`` int32: entries of the window, and those whose score is not ``-inf``."""
    held = inputs.candidates(0) & (~inputs.candidates(window) | (scores > -torch.inf))
    return held.sum(-1, dtype=torch.int32)


def for_sequences(run: Callable[[slice, int], Tensor], budgets: tuple[int, ...]) -> Tensor:
    """``run`` on all sequences at once if they have one budget, else on each."""
    if len(set(budgets)) == 1:
        return run(slice(None), budgets[0])
    return torch.cat([run(slice(b, b + 1), budget) for b, budget in enumerate(budgets)])


def _head_weights(
    scores: Tensor, inputs: LayerInputs, budgets: tuple[int, ...], window: int
) -> Tensor:
    """``[B, Hkv, 1]``: how much of a head's score lies in its own top ``budget - window``."""
    weights = []
    for rows, prompt_len, budget in zip(scores, inputs.prompt_lens, budgets, strict=True):
        candidates = rows[:, : max(prompt_len - window, 0)].nan_to_num(0.0, 0.0, 0.0)
        top = candidates.topk(min(budget - window, candidates.shape[1]))
        weights.append(top.values.sum(-1, keepdim=True) / candidates.sum(-1, keepdim=True))
    return torch.stack(weights)


@functools.lru_cache(maxsize=256)
def _exact_steps(b: int, n: int, beta: int, num_layers: int) -> tuple[int, ...]:
    """Candidates of each layer: even steps with the mean b < n, rounded by largest remainder."""
    high = min(2 * b - Fraction(b, beta), Fraction(n))
    step = 2 * (high - b) / (num_layers - 1)
    shares = [high - layer * step for layer in range(num_layers)]
    steps = [math.floor(share) for share in shares]
    by_remainder = sorted(range(num_layers), key=lambda layer: steps[layer] - shares[layer])
    for layer in by_remainder[: num_layers * b - sum(steps)]:
        steps[layer] += 1
    return tuple(steps)
