"""How much each entry of a prompt matters: scores ``[B, Hkv, T]`` float32, higher is better.

``sinks=k`` of a scorer pins the first k entries by a score of ``+inf``; the window needs no score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from adakv import ops
from adakv.policy.base import LayerInputs, check_choice, check_range


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
    sinks: int = 0

    def __post_init__(self) -> None:
        check_range("window", self.window, 1)
        check_range("sinks", self.sinks, 0)
        check_range("pool_width", self.pool_width, 1, 63)
        if self.pool_width % 2 == 0:
            raise ValueError(f"pool_width must be odd, got {self.pool_width}")
        check_choice("window_reduce", self.window_reduce, get_args(ops.Reduce))
        check_choice("group_reduce", self.group_reduce, get_args(ops.Reduce))
        check_choice("order", self.order, get_args(ops.Order))
        check_choice("pool", self.pool, get_args(ops.Pool))

    def score(self, inputs: LayerInputs) -> Tensor:
        if inputs.queries.shape[2] != self.window:
            raise ValueError(
                f"queries must be those of the last {self.window} positions (the policy's window), "
                f"got {inputs.queries.shape[2]}"
            )
        scores = ops.score(
            inputs.queries,
            inputs.keys,
            seq_lens=inputs.seq_lens,
            sinks=inputs.sinks,
            scale=inputs.scale,
            softcap=inputs.softcap,
            window_reduce=self.window_reduce,
            group_reduce=self.group_reduce,
            order=self.order,
            pool=self.pool,
            pool_width=self.pool_width,
        )
        return _pin(scores, self.sinks)


@dataclass(frozen=True)
class KeyNorm:
    """Short keys first (arXiv 2406.11430): ``S[h, t] = -||k[h, t]||_2``.

    Needs neither queries nor attention: a small norm goes along with much attention in many models.
    """

    window: int = 32
    sinks: int = 0

    def __post_init__(self) -> None:
        check_range("window", self.window, 1)
        check_range("sinks", self.sinks, 0)

    def score(self, inputs: LayerInputs) -> Tensor:
        norms = torch.linalg.vector_norm(inputs.keys, dim=-1, dtype=torch.float32)
        return _pin(-norms, self.sinks)


@dataclass(frozen=True)
class Recency:
    """The first ``sinks`` entries and the most recent ones (StreamingLLM, arXiv 2309.17453).

    ``S[h, t] = t``. Every head keeps exactly its budget: the sinks and the last ``budget - sinks``.
    """

    sinks: int = 4
    window: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_range("sinks", self.sinks, 0)

    def score(self, inputs: LayerInputs) -> Tensor:
        positions = torch.arange(inputs.length, dtype=torch.float32, device=inputs.keys.device)
        return _pin(positions.repeat(*inputs.keys.shape[:2], 1), self.sinks)


@dataclass(frozen=True)
class Random:
    """Uniform noise: what a policy has to beat.

    A hash of seed, layer, kv head and position, and so the same on every device, in every batch and
    at every padded length.
    """

    seed: int = 0
    window: int = 32
    sinks: int = 0

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 0, 2**31 - 1)
        check_range("window", self.window, 1)
        check_range("sinks", self.sinks, 0)

    def score(self, inputs: LayerInputs) -> Tensor:
        device = inputs.keys.device
        heads = torch.arange(inputs.num_kv_heads, device=device)[:, None]
        positions = torch.arange(inputs.length, device=device)
        rows = _mix(self.seed * 0x9E3779B1 + inputs.layer * 0x85EBCA77 + heads)
        noise = _mix(rows + positions * 0x9E3779B1) >> 8  # 24 bits, which float32 holds exactly
        return _pin((noise.float() * 2.0**-24).repeat(inputs.keys.shape[0], 1, 1), self.sinks)


def _pin(scores: Tensor, sinks: int) -> Tensor:
    if sinks:
        scores[..., :sinks] = torch.inf
    return scores


def _mix(x: Tensor) -> Tensor:
    """32 well mixed bits of int64 (the finalizer of MurmurHash3)."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
