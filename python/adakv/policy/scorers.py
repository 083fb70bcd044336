"""How much each entry of a prompt matters: scores ``[B, Hkv, T]`` float32, higher is better.

``pinned=k`` of a scorer: it pins the first k entries by a score of ``+inf``; the window needs none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from adakv import ops
from adakv.policy.attention import attention
from adakv.policy.base import Need
from adakv.policy.inputs import (
    LayerInputs,
    check_choice,
    check_range,
    check_scorer,
    check_settings,
    pin_first,
)

NormShare = Literal["none", "entries", "heads"]

_LEAST_NORM = 1e-12  # so that 0 has no direction
_ROWS = 8  # of the window whose attention Defensive holds at a time


@dataclass(frozen=True)
class WindowAttention:
    """Attention that an entry gets from the prompt's last queries (SnapKV, arXiv 2404.14469).

    ``S[h, t] = pool_t(mean over the group of h(mean over the window(softmax(q . k * scale))))``

    The defaults are Ada-KV's and CriticalKV's. The base of both papers: what a prompt's end looks
    at, the answer will look at. ``pool`` keeps the neighbours of a strong entry with it.
    ``order="pool_first"`` pools each q head before its group is reduced.
    """

    window: int = 32
    window_reduce: ops.Reduce = "mean"
    group_reduce: ops.Reduce = "mean"
    order: ops.Order = "group_first"
    pool: ops.Pool = "max"
    pool_width: int = 7
    pinned: int = 0

    def __post_init__(self) -> None:
        check_scorer(self)
        check_odd("pool_width", self.pool_width)
        check_choice("window_reduce", self.window_reduce, get_args(ops.Reduce))
        check_choice("group_reduce", self.group_reduce, get_args(ops.Reduce))
        check_choice("order", self.order, get_args(ops.Order))
        check_choice("pool", self.pool, get_args(ops.Pool))

    def score(self, inputs: LayerInputs) -> Tensor:
        scores = inputs.attended(
            self.window,
            window_reduce=self.window_reduce,
            group_reduce=self.group_reduce,
            order=self.order,
            pool=self.pool,
            pool_width=self.pool_width,
        )
        return pin_first(scores, self.pinned)


@dataclass(frozen=True)
class LargestValue(WindowAttention):
    """The window's attention, weighed by the largest value of the head (LAVa, arXiv 2509.09754).

    ``S[h, t] = pool_t(max over the group of h(mean over the window(softmax(q . k * scale)))) * max
    over the candidates j of |v[h, j]|_1``

    A bound on what an entry does to the output of its layer. The second factor is one number for a
    head: it orders nothing within one, and says how heads compare.
    """

    group_reduce: ops.Reduce = "max"

    def score(self, inputs: LayerInputs) -> Tensor:
        sizes = torch.linalg.vector_norm(inputs.values, 1, -1, dtype=torch.float32)
        largest = sizes.masked_fill(~inputs.candidates(self.window), 0).amax(-1, keepdim=True)
        return pin_first(super().score(inputs) * largest, self.pinned)


@dataclass(frozen=True)
class Defensive:
    """The worst case instead of the mean (DefensiveKV, arXiv 2510.13334).

    ``R[h, t] = max(max over the window and the group of p, its mean over the head's candidates)``,
    then ``S = R * N``, where p are the rows of the window's attention, each mean-pooled over
    ``pool_width`` entries and scaled so that it keeps its sum, and N = ``||v Wo||_1``.

    A mean over 32 queries forgets what one of them needed; the maximum does not, and the head's own
    mean is a floor under entries that nobody looked at. ``norm_share="entries"`` divides N by its
    sum over the head's candidates, for scores that are compared between layers (Layer-DefensiveKV);
    ``"heads"`` by its sum over the kv heads of a token, as the authors' code does. Values of the
    first entries are small while attention leans on them: ``pinned`` of them always stay.
    """

    window: int = 32
    pool_width: int = 5
    norm_share: NormShare = "none"
    pinned: int = 4
    needs: ClassVar[frozenset[Need]] = frozenset({"w_o"})

    def __post_init__(self) -> None:
        check_scorer(self)
        check_odd("pool_width", self.pool_width)
        check_choice("norm_share", self.norm_share, get_args(NormShare))

    def score(self, inputs: LayerInputs) -> Tensor:
        inputs.check_window(self.window)
        candidates = inputs.candidates(self.window)  # [B or 1, 1, T]
        risk = inputs.keys.new_zeros(inputs.keys.shape[:3], dtype=torch.float32)
        for row in range(0, self.window, _ROWS):
            p = attention(inputs, slice(row, row + _ROWS))  # [B, Hkv, G, R, T]
            p = p.masked_fill(~candidates[:, :, None, None], 0)
            pooled = self._pooled(p).masked_fill(~candidates[:, :, None, None], 0)
            pooled *= p.sum(-1, keepdim=True) / pooled.sum(-1, keepdim=True).clamp(min=1e-30)
            risk = risk.maximum(pooled.amax((2, 3)))
        floor = inputs.mean(risk, self.window)
        norms = inputs.norms().masked_fill(~candidates, 0)
        if self.norm_share != "none":
            norms = norms / norms.sum(-1 if self.norm_share == "entries" else 1, keepdim=True)
        return pin_first(risk.maximum(floor) * norms, self.pinned)

    def _pooled(self, p: Tensor) -> Tensor:
        side = self.pool_width // 2
        rows = F.avg_pool1d(p.flatten(0, 3)[:, None], self.pool_width, 1, side)
        return rows.view(p.shape)


@dataclass(frozen=True)
class LastQuery:
    """The last query's attention, its mean over all heads of the layer (TOVA, arXiv 2401.06104).

    ``S[h, t] = mean over all q heads of softmax(q_last . k * scale)``: every kv head has the same
    scores, so that whole tokens go. While a text is written kv heads may hold different tokens:
    then each has the mean over its own q heads.
    """

    pinned: int = 0
    window: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_settings(self)
        check_range("pinned", self.pinned, 0)

    def score(self, inputs: LayerInputs) -> Tensor:
        heads = WindowAttention(window=1, pool="none").score(inputs)
        if inputs.positions is not None:
            return pin_first(heads, self.pinned)
        return pin_first(heads.mean(1, keepdim=True).expand_as(heads).clone(), self.pinned)


@dataclass(frozen=True)
class KeyDiff:
    """Keys that are unlike the others (KeyDiff, arXiv 2504.15364).

    ``S[h, t] = -cos(k[h, t], mean over t of k[h, t] / |k[h, t]|)``; needs no queries.
    """

    window: int = 32
    pinned: int = 0

    def __post_init__(self) -> None:
        check_scorer(self)

    def score(self, inputs: LayerInputs) -> Tensor:
        keys = inputs.keys
        if inputs.seq_lens is not None:  # what is behind may be NaN
            keys = keys.masked_fill(~inputs.candidates(0)[..., None], 0)
        norms = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)  # [B, Hkv, T]
        inverse = norms.clamp_(min=_LEAST_NORM).reciprocal_()
        mean = _product(inverse[:, :, None], keys)  # [B, Hkv, 1, D], up to a factor
        mean = F.normalize(mean, dim=-1, eps=_LEAST_NORM)
        return pin_first(_product(mean, keys.mT)[:, :, 0].mul_(inverse).neg_(), self.pinned)


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """``[B, H, R, N]`` float32: a few rows ``[B, H, R, K]`` float32 times ``[B, H, K, N]``.

    A GPU multiplies bfloat16 as it is, by rows that are written as sums of two bfloat16.
    """
    if not (matrix.is_cuda and matrix.dtype is torch.bfloat16):
        return rows @ matrix.float()
    high = rows.bfloat16()
    parts = torch.cat([high, (rows - high).bfloat16()], 2)
    products = torch.stack(
        [torch.bmm(x, y, out_dtype=torch.float32) for x, y in zip(parts, matrix, strict=True)]
    )
    of_high, of_low = products.chunk(2, 2)
    return of_high + of_low


@dataclass(frozen=True)
class KeyNorm:
    """Short keys first (arXiv 2406.11430): ``S[h, t] = -||k[h, t]||_2``.

    Needs neither queries nor attention: a small norm goes along with much attention in many models.
    """

    window: int = 32
    pinned: int = 0

    def __post_init__(self) -> None:
        check_scorer(self)

    def score(self, inputs: LayerInputs) -> Tensor:
        norms = torch.linalg.vector_norm(inputs.keys, dim=-1, dtype=torch.float32)
        return pin_first(-norms, self.pinned)


@dataclass(frozen=True)
class Recency:
    """The first ``pinned`` entries and the most recent ones (StreamingLLM, arXiv 2309.17453).

    ``S[h, t] = t``. Every head keeps exactly its budget: the pinned entries and the last ``budget -
    pinned``.
    """

    pinned: int = 4
    window: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_settings(self)
        check_range("pinned", self.pinned, 0)

    def score(self, inputs: LayerInputs) -> Tensor:
        if inputs.positions is not None:
            return pin_first(inputs.positions.float(), self.pinned)
        positions = torch.arange(inputs.length, dtype=torch.float32, device=inputs.device)
        return pin_first(positions.repeat(*inputs.shape[:2], 1), self.pinned)


@dataclass(frozen=True)
class Random:
    """Uniform noise: what a policy has to beat.

    A hash of seed, layer, kv head and position, and so the same on every device, in every batch and
    at every padded length. Whenever a text is chosen from again it is drawn anew.
    """

    seed: int = 0
    window: int = 32
    pinned: int = 0
    needs: ClassVar[frozenset[Need]] = frozenset({"layer"})

    def __post_init__(self) -> None:
        check_settings(self)
        check_range("seed", self.seed, 0, 2**31 - 1)
        check_range("window", self.window, 1)
        check_range("pinned", self.pinned, 0)

    def score(self, inputs: LayerInputs) -> Tensor:
        device = inputs.device
        heads = torch.arange(inputs.num_kv_heads, device=device)[:, None]
        positions = torch.arange(inputs.length, device=device)
        rows = _mix(self.seed * 0x9E3779B1 + inputs.layer * 0x85EBCA77 + heads)
        if inputs.positions is not None:
            positions = inputs.positions.long()
            rows = _mix(rows + positions.gather(2, inputs.ends[:, :, None].long() - 1))
        noise = _mix(rows + positions * 0x9E3779B1) >> 8  # 24 bits, which float32 holds exactly
        noise_of_all = (noise.float() * 2.0**-24).expand(inputs.shape)
        return pin_first(noise_of_all.clone(), self.pinned)


def check_odd(name: str, width: int) -> None:
    """Raises ``ValueError`` unless a pool's width is one that the verbs know."""
    check_range(name, width, 1, 63)
    if width % 2 == 0:
        raise ValueError(f"{name} must be odd, got {width}")


def _mix(x: Tensor) -> Tensor:
    """32 well mixed bits of int64 (the finalizer of MurmurHash3)."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
