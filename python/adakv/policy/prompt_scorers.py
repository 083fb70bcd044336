"""Scorers that read the queries of the whole prompt, or of a repetition of it.

Each costs a pass over the prompt beside the prefill's own attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from adakv import ops
from adakv.policy.attention import check_all_queries
from adakv.policy.base import Need
from adakv.policy.inputs import LayerInputs, check_choice, check_range, pin_sinks

NormUse = Literal["none", "floor", "all"]


@dataclass(frozen=True)
class PromptAttention:
    """Attention that an entry gets from all queries of the prompt (H2O, arXiv 2306.14048).

    ``S[h, t] = group_reduce over the group of h(reduce over queries s of softmax(q_s . k_t *
    scale))``, over the queries ``s >= t + distance``, every ``stride``-th of them, the last one
    included.

    ``reduce="sum"`` is H2O's accumulated attention, which favours early entries; ``"mean"`` divides
    it by the number of queries that could see the entry; ``"max"`` asks whether any of them ever
    needed it. ``distance`` leaves out what every token gives to its neighbours.
    """

    window: int = 32
    reduce: ops.Reduce = "sum"
    group_reduce: ops.Reduce = "mean"
    distance: int = 0
    stride: int = 1
    sinks: int = 0
    needs: ClassVar[tuple[Need, ...]] = ("all_queries",)

    def __post_init__(self) -> None:
        check_range("window", self.window, 1)
        check_range("sinks", self.sinks, 0)
        check_range("distance", self.distance, 0)
        check_range("stride", self.stride, 1)
        check_choice("reduce", self.reduce, get_args(ops.Reduce))
        check_choice("group_reduce", self.group_reduce, get_args(ops.Reduce))

    def score(self, inputs: LayerInputs) -> Tensor:
        check_all_queries(inputs)
        scores = inputs.keys.new_zeros(inputs.keys.shape[:3], dtype=torch.float32)
        for sequences, length in _same_lengths(inputs.prompt_lens):
            rows = slice((length - 1) % self.stride, length, self.stride)
            scores[sequences, :, :length] = ops.score(
                inputs.queries[sequences, :, rows],
                inputs.keys[sequences, :, :length],
                sinks=inputs.sinks,
                scale=inputs.scale,
                softcap=inputs.softcap,
                window_reduce=self.reduce,
                group_reduce=self.group_reduce,
                pool="none",
                window=0,
                stride=self.stride,
                distance=self.distance,
            )
        return pin_sinks(scores, self.sinks)


@dataclass(frozen=True)
class ColumnMax:
    """The most that any query of the prompt ever gave an entry, with a floor like Defensive's
    (DefensiveKV, arXiv 2510.13334) under what none looked at. A scorer of this library.

    ``C[h, t] = max over the group of h and the queries s >= t + distance of softmax(q_s . k_t *
    scale)``, of every ``stride``-th query. With N = ``||v Wo||_1`` and means over the candidates of
    a head::

        S = max(C, mean(C) * N / mean(N))     norms="floor"
        S = max(C, mean(C)) * N               norms="all"
        S = C                                 norms="none"

    What the prompt itself needed once, a question about it may need again. The last query that
    looks at an entry is often its neighbour, which tells nothing: ``distance`` leaves it out.
    ``"all"`` is for budgets of half of a prompt or for scores that are compared between layers.
    """

    window: int = 32
    distance: int = 32
    stride: int = 1
    norms: NormUse = "floor"
    sinks: int = 4

    def __post_init__(self) -> None:
        check_range("sinks", self.sinks, 0)
        check_choice("norms", self.norms, get_args(NormUse))
        self._attention()  # which checks the others

    @property
    def needs(self) -> tuple[Need, ...]:
        """``w_o`` only if norms are used."""
        return ("all_queries",) if self.norms == "none" else ("all_queries", "w_o")

    def score(self, inputs: LayerInputs) -> Tensor:
        highest = self._attention().score(inputs)
        if self.norms == "none":
            return pin_sinks(highest, self.sinks)
        candidates = inputs.candidates(self.window)  # [B or 1, 1, T]
        highest = highest.masked_fill(~candidates, 0)
        norms = inputs.norms().masked_fill(~candidates, 0)
        floor = _mean(highest, candidates)
        if self.norms == "all":
            return pin_sinks(highest.maximum(floor) * norms, self.sinks)
        return pin_sinks(highest.maximum(floor * norms / _mean(norms, candidates)), self.sinks)

    def _attention(self) -> PromptAttention:
        return PromptAttention(
            window=self.window,
            reduce="max",
            group_reduce="max",
            distance=self.distance,
            stride=self.stride,
        )


def _mean(x: Tensor, candidates: Tensor) -> Tensor:
    """``[B, Hkv, 1]``: over the candidates; ``x`` is 0 elsewhere."""
    return x.sum(-1, keepdim=True) / candidates.sum(-1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class ExpectedAttention:
    """Attention to be expected of queries to come (Expected Attention, arXiv 2510.00636).

    Queries before RoPE are taken for normally distributed, with the mean m and the covariance C of
    the prompt's own, from position ``sinks`` on. With R the mean of the RoPE matrices of the next
    ``num_future`` positions::

        z[q, t] = scale * k[t] . R m[q] + scale^2 / 2 * k[t]^T R C[q] R^T k[t]
        S[h, t] = (mean over the group of h(softmax_t(z[q, t]))) * |v[h, t]|_2

    which is the expectation of the attention's exponentials. ``covariance=False`` leaves out the
    second term, ``value_norm=False`` the factor ``|v|``. The first ``sinks`` entries are pinned and
    left out of all statistics, as their queries are unlike the others.
    """

    window: int = 32
    num_future: int = 512
    covariance: bool = True
    value_norm: bool = True
    sinks: int = 4
    needs: ClassVar[tuple[Need, ...]] = ("all_queries", "rotate")

    def __post_init__(self) -> None:
        check_range("window", self.window, 1)
        check_range("num_future", self.num_future, 1)
        check_range("sinks", self.sinks, 0)

    def score(self, inputs: LayerInputs) -> Tensor:
        check_all_queries(inputs)
        keys = inputs.keys.float()
        batch, heads, _, head_dim = keys.shape
        scale = inputs.scale or head_dim**-0.5
        mean, covariance = self._future_queries(inputs)  # [B, Hq, D], [B, Hq, D, D]
        z = scale * (mean.view(batch, heads, -1, head_dim) @ keys.mT)  # [B, Hkv, G, T]
        if self.covariance:
            grouped = covariance.view(batch, heads, -1, head_dim, head_dim)
            for g, c in enumerate(grouped.unbind(2)):
                z[:, :, g] += scale**2 / 2 * ((keys @ c) * keys).sum(-1)
        position = torch.arange(inputs.length, device=keys.device)
        competes = inputs.candidates(0) & (position >= self.sinks)  # [B or 1, 1, T]
        z = z.masked_fill(~competes[:, :, None], -torch.inf)
        scores = z.softmax(-1).mean(2)
        if self.value_norm:
            scores *= torch.linalg.vector_norm(inputs.values, dim=-1, dtype=torch.float32)
        return pin_sinks(scores, self.sinks)

    def _future_queries(self, inputs: LayerInputs) -> tuple[Tensor, Tensor]:
        """Mean ``[B, Hq, D]`` and covariance ``[B, Hq, D, D]`` of the queries to come."""
        if inputs.rotate is None:
            raise ValueError("rotate must be given to a policy that foresees queries, got None")
        position = torch.arange(inputs.length, device=inputs.keys.device)
        queries = inputs.rotate(inputs.queries.float(), -position)  # before RoPE
        counts = inputs.candidates(0) & (position >= self.sinks)
        queries = queries.masked_fill(~counts[..., None], 0)
        count = counts.sum(-1)[..., None]  # [B or 1, 1, 1]
        mean = queries.sum(2) / count
        centred = (queries - mean[:, :, None]).masked_fill(~counts[..., None], 0)
        future = inputs.ends[:, None] + torch.arange(self.num_future, device=count.device)
        turned = self._mean_rotation(inputs, future)  # [B or 1, 1, D, D]
        covariance = centred.mT @ centred / count[..., None]
        return (mean[:, :, None] @ turned)[:, :, 0], turned.mT @ covariance @ turned

    def _mean_rotation(self, inputs: LayerInputs, positions: Tensor) -> Tensor:
        """``[B or 1, 1, D, D]``: row i is the mean over ``positions`` of unit vector i, turned."""
        assert inputs.rotate is not None
        head_dim = inputs.keys.shape[3]
        units = torch.eye(head_dim, device=positions.device)[None, :, None]
        units = units.expand(positions.shape[0], -1, positions.shape[1], -1)
        return inputs.rotate(units, positions).mean(2)[:, None]


@dataclass(frozen=True)
class RepeatAttention:
    """Attention that an entry gets while the model repeats its prompt (KVzip, arXiv 2505.23416).

    ``S[h, t] = max over the group of h and the repeating queries r of softmax(q_r . k_t * scale)``,
    the softmax over the whole prompt and the repetition up to r. (The authors' code takes prompts
    in pieces of 2000 tokens and leaves the other pieces out of the softmax.)

    What the model needs in order to say its prompt again it may need for any question about it.
    Costs a second prefill: :meth:`adakv.Cache.repeat`.
    """

    window: int = 1
    sinks: int = 4
    needs: ClassVar[tuple[Need, ...]] = ("repeat",)

    def __post_init__(self) -> None:
        check_range("window", self.window, 1)
        check_range("sinks", self.sinks, 0)

    def score(self, inputs: LayerInputs) -> Tensor:
        if inputs.repeat is None:
            raise ValueError("repeat must be given: call Cache.repeat after the prompt")
        scores = inputs.keys.new_zeros(inputs.keys.shape[:3], dtype=torch.float32)
        for b, length in enumerate(inputs.prompt_lens):  # each repetition follows its own prompt
            scores[b, :, :length] = self._score_one(inputs, slice(b, b + 1), length)
        return pin_sinks(scores, self.sinks)

    def _score_one(self, inputs: LayerInputs, one: slice, length: int) -> Tensor:
        """``[Hkv, length]`` of one sequence."""
        assert inputs.repeat is not None
        queries, more = inputs.repeat
        scores = ops.score(
            queries[one],
            torch.cat([inputs.keys[one, :, :length], more[one]], 2),
            sinks=inputs.sinks,
            scale=inputs.scale,
            softcap=inputs.softcap,
            window_reduce="max",
            group_reduce="max",
            pool="none",
        )
        return scores[0, :, :length]


def _same_lengths(prompt_lens: tuple[int, ...]) -> list[tuple[slice, int]]:
    """Sequences that can be worked on together, and their length: all of them, or one by one."""
    if len(set(prompt_lens)) == 1:
        return [(slice(None), prompt_lens[0])]
    return [(slice(b, b + 1), length) for b, length in enumerate(prompt_lens) if length > 0]
