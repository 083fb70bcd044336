"""Scorers that read the queries of the whole prompt, or of a repetition of it.

Each costs a pass over the prompt beside the prefill's own attention. Those with a method ``take``
can take it part by part, as it is read, and then need no queries but the newest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from adakv import ops
from adakv.policy.attention import query_positions
from adakv.policy.base import Need
from adakv.policy.inputs import (
    LayerInputs,
    check_at_most,
    check_choice,
    check_range,
    check_scorer,
    check_settings,
    pin_first,
)

WeighBy = Literal["none", "floor", "all"]

_MOST_STRIDE = 1024  # sets of column sums that a partwise scorer holds
_MOST_FUTURE = 65536
_FUTURE_PART = 512  # positions of the future that are turned at a time


@dataclass(frozen=True)
class PromptAttention:
    """Attention that an entry gets from all queries of the prompt (H2O, arXiv 2306.14048).

    ``S[h, t] = group_reduce over the group of h(reduce over queries s of softmax(q_s . k_t *
    scale))``, over the queries ``s >= t + distance``, every ``stride``-th of them, the last one
    included.

    ``reduce="sum"`` is H2O's accumulated attention, which favours early entries; ``"mean"`` divides
    it by the number of queries that could see the entry; ``"max"`` asks whether any of them ever
    needed it. ``distance`` leaves out what every token gives to its neighbours. ``all_heads`` gives
    all kv heads of the layer their mean, so that whole tokens of a prompt go.

    While a text is written ``"sum"`` and ``"max"`` go on with what its queries attend to; entries
    of the prompt begin with 0.
    """

    window: int = 32
    reduce: ops.Reduce = "sum"
    group_reduce: ops.Reduce = "mean"
    distance: int = 0
    stride: int = 1
    pinned: int = 0
    all_heads: bool = False
    needs: ClassVar[frozenset[Need]] = frozenset({"all_queries"})

    def __post_init__(self) -> None:
        check_scorer(self)
        check_range("distance", self.distance, 0)
        check_range("stride", self.stride, 1)
        check_at_most("stride", self.stride, _MOST_STRIDE)
        check_choice("reduce", self.reduce, get_args(ops.Reduce))
        check_choice("group_reduce", self.group_reduce, get_args(ops.Reduce))

    @property
    def carries(self) -> bool:
        """Whether scores can be those of before and what new queries add."""
        return self.reduce != "mean" and self.stride == 1

    def score(self, inputs: LayerInputs) -> Tensor:
        inputs.check_all_queries()
        if inputs.seq_lens is None:
            scores = self._of(inputs, slice(None), inputs.length)
        else:
            scores = inputs.keys.new_zeros(inputs.keys.shape[:3], dtype=torch.float32)
            for sequences, length in _same_lengths(inputs.prompt_lens):
                scores[sequences, :, :length] = self._of(inputs, sequences, length)
        if self.all_heads:
            scores = _of_all_heads(scores)
        return pin_first(scores, self.pinned)

    def _of(self, inputs: LayerInputs, sequences: slice, length: int) -> Tensor:
        """``[B', Hkv, length]`` of some sequences of one length."""
        rows = slice((length - 1) % self.stride, length, self.stride)
        return self._columns(
            inputs.queries[sequences, :, rows],
            inputs.keys[sequences, :, :length],
            inputs,
            self.reduce,
            lse=None if inputs.lse is None else inputs.lse[sequences, :, rows].contiguous(),
        )

    def carry(self, inputs: LayerInputs) -> tuple[Tensor, Tensor]:
        """Scores ``[B, Hkv, T]`` of what a text's rows hold, which are all that is carried."""
        new = inputs.attended(
            inputs.queries.shape[2],
            window=0,
            window_reduce=self.reduce,
            group_reduce=self.group_reduce,
            pool="none",
            distance=self.distance,
        )
        if inputs.carried is not None:
            is_sum = self.reduce == "sum"
            new = inputs.carried + new if is_sum else inputs.carried.maximum(new)
        return pin_first(new, self.pinned), new

    def take(self, taken: Tensor | None, part: LayerInputs) -> Tensor:
        """``[stride, B, Hkv or Hq, T]`` float32: what entries got from the queries so far.

        Which ``stride``-th queries count is known by the last one alone: so there are as many sets,
        and a part costs what all of its queries cost. Of q heads, if a group is not reduced as the
        queries are.
        """
        batch, heads, length, _ = part.keys.shape
        start, keys = length - part.queries.shape[2], part.keys
        if (self.reduce == "max") != (self.group_reduce == "max"):
            keys = keys.repeat_interleave(part.queries.shape[1] // heads, dim=1)
        columns = part.keys.new_zeros(
            (self.stride, batch, keys.shape[1], length), dtype=torch.float32
        )
        if taken is not None:
            columns[..., :start] = taken
        for number, column in enumerate(columns):
            first = (number - start) % self.stride
            rows = slice(first, None, self.stride)
            queries = part.queries[:, :, rows]
            if queries.shape[2] == 0:
                continue
            end = start + first + (queries.shape[2] - 1) * self.stride + 1
            new = self._columns(
                queries,
                keys[:, :, :end],
                part,
                "max" if self.reduce == "max" else "sum",
                lse=None if part.lse is None else part.lse[:, :, rows].contiguous(),
            )
            seen = column[..., :end]
            seen.copy_(seen.maximum(new) if self.reduce == "max" else seen + new)
        return columns

    def finish(self, taken: Tensor, inputs: LayerInputs) -> Tensor:
        """``[B, Hkv, T]``: :meth:`score`, of a prompt whose parts were taken."""
        columns = taken[(inputs.length - 1) % self.stride].clone()
        if self.reduce == "mean":
            position = torch.arange(inputs.length, device=columns.device)
            behind = inputs.length - 1 - self.distance - position
            columns /= (behind // self.stride + 1).clamp(min=1)
        if columns.shape[1] != inputs.num_kv_heads:
            heads = columns.view(columns.shape[0], inputs.num_kv_heads, -1, inputs.length)
            if self.group_reduce == "max":
                columns = heads.amax(2)
            else:
                columns = heads.mean(2) if self.group_reduce == "mean" else heads.sum(2)
        if self.all_heads:
            columns = _of_all_heads(columns)
        return pin_first(columns, self.pinned)

    def _columns(
        self,
        queries: Tensor,
        keys: Tensor,
        inputs: LayerInputs,
        reduce: ops.Reduce,
        lse: Tensor | None = None,
    ) -> Tensor:
        """``[B, Hkv, T]`` of every ``stride``-th query, the last of which is the last key's."""
        return ops.score(
            queries,
            keys,
            **inputs.logits,
            lse=lse,
            window_reduce=reduce,
            group_reduce=self.group_reduce,
            pool="none",
            window=0,
            stride=self.stride,
            distance=self.distance,
        )


class Columns(NamedTuple):
    """What :class:`ColumnMax` knows of the queries."""

    columns: Tensor  # as PromptAttention.take has them
    last: Tensor  # [B, Hq, window, D], the window's queries; none if they have no weight


@dataclass(frozen=True)
class ColumnMax:
    """The most that any query of the prompt ever gave an entry, with a floor like Defensive's
    (DefensiveKV, arXiv 2510.13334) under what none looked at. A scorer of this library.

    ``C[h, t] = max over the group of h and the queries s >= t + distance of softmax(q_s . k_t *
    scale)``, of every ``stride``-th query. With N = ``||v Wo||_2`` (``norm="l1"``: ``||v Wo||_1``,
    no better and many times slower; :func:`adakv.ops.value_norm`) and means over the candidates of
    a head::

        S = max(C, mean(C) * N / mean(N))     weigh_by="floor"
        S = max(C, mean(C)) * N               weigh_by="all"
        S = C                                 weigh_by="none"

    What the prompt itself needed once, a question about it may need again. The last query that
    looks at an entry is often its neighbour, which tells nothing: ``distance`` leaves it out.
    ``"all"`` is for budgets of half of a prompt or for scores that are compared between layers.

    A question that is already there stands in the window, and asks for more than other queries do:
    with ``window_weight`` w and W the same maxima over the window's queries, max-pooled over 7
    entries, ``max(C, w * W)`` takes the place of C.
    """

    window: int = 32
    distance: int = 32
    stride: int = 1
    weigh_by: WeighBy = "floor"
    norm: ops.Norm = "l2_gram"
    window_weight: float = 0.0
    pinned: int = 4

    def __post_init__(self) -> None:
        check_settings(self)
        check_range("pinned", self.pinned, 0)
        check_range("window_weight", self.window_weight, 0)
        check_choice("weigh_by", self.weigh_by, get_args(WeighBy))
        check_choice("norm", self.norm, get_args(ops.Norm))
        self._attention  # noqa: B018 - which checks the others

    @property
    def needs(self) -> frozenset[Need]:
        """``w_o`` only if norms are used."""
        return frozenset({"all_queries"} if self.weigh_by == "none" else {"all_queries", "w_o"})

    def score(self, inputs: LayerInputs) -> Tensor:
        columns = self._attention.score(inputs)
        prompt = Columns(columns, _last_queries(inputs, self._num_asked))
        return pin_first(self._joined(prompt, inputs), self.pinned)

    def take(self, taken: Columns | None, part: LayerInputs) -> Columns:
        """:meth:`PromptAttention.take`, of maxima, and the window's queries."""
        last = part.queries if taken is None else torch.cat([taken.last, part.queries], 2)
        columns = self._attention.take(None if taken is None else taken.columns, part)
        return Columns(columns, last[:, :, max(last.shape[2] - self._num_asked, 0) :].clone())

    def finish(self, taken: Columns, inputs: LayerInputs) -> Tensor:
        """``[B, Hkv, T]``: :meth:`score`, of a prompt whose parts were taken."""
        columns = self._attention.finish(taken.columns, inputs)
        return pin_first(self._joined(Columns(columns, taken.last), inputs), self.pinned)

    @property
    def _num_asked(self) -> int:
        """Queries that are also looked at apart from the others."""
        return self.window if self.window_weight else 0

    def _joined(self, prompt: Columns, inputs: LayerInputs) -> Tensor:
        """Scores from columns ``[B, Hkv, T]`` and the window's queries; nothing is pinned yet."""
        if self.window_weight == 0:
            return self._with_floor(prompt.columns, inputs)
        asked = ops.score(
            prompt.last,
            inputs.keys,
            seq_lens=inputs.seq_lens,
            **inputs.logits,
            window_reduce="max",
            group_reduce="max",
        )
        return self._with_floor(prompt.columns.maximum(self.window_weight * asked), inputs)

    def _with_floor(self, highest: Tensor, inputs: LayerInputs) -> Tensor:
        if self.weigh_by == "none":
            return highest
        norms, floor = inputs.norms(self.norm), inputs.mean(highest, self.window)
        if self.weigh_by == "all":
            weighed = highest.maximum(floor) * norms
        else:
            weighed = highest.maximum(floor * norms / inputs.mean(norms, self.window))
        return inputs.fill_others(weighed, self.window, 0)

    @cached_property
    def _attention(self) -> PromptAttention:
        return PromptAttention(
            window=self.window,
            reduce="max",
            group_reduce="max",
            distance=self.distance,
            stride=self.stride,
        )


def _last_queries(inputs: LayerInputs, count: int) -> Tensor:
    """``[B, Hq, count, D]`` of the queries of all positions."""
    if inputs.seq_lens is None and count <= inputs.length:
        return inputs.queries[:, :, inputs.length - count :]
    batch, heads, _, head_dim = inputs.queries.shape
    behind = torch.arange(-count, 0, device=inputs.keys.device)
    rows = (inputs.ends + behind).clamp(min=0)[:, None, :, None]
    return inputs.queries.gather(2, rows.expand(batch, heads, count, head_dim))


class Moments(NamedTuple):
    """What :class:`ExpectedAttention` knows of the queries before RoPE."""

    num_queries: Tensor  # [B or 1, 1, 1]
    mean: Tensor  # [B, Hq, D]
    scatter: Tensor  # [B, Hq, D, D], the sum of (q - mean)^T (q - mean)


@dataclass(frozen=True)
class ExpectedAttention:
    """Attention to be expected of queries to come (Expected Attention, arXiv 2510.00636).

    Queries before RoPE are taken for normally distributed, with the mean m and the covariance C of
    the prompt's own, from position ``pinned`` on. With R the mean of the RoPE matrices of the next
    ``num_future`` positions::

        z[q, t] = scale * k[t] . R m[q] + scale^2 / 2 * k[t]^T R C[q] R^T k[t]
        S[h, t] = (mean over the group of h(softmax_t(z[q, t])) + epsilon) * |v[h, t]|_2

    which is the expectation of the attention's exponentials. ``covariance=False`` leaves out the
    second term, ``value_norm=False`` the factor ``|v|``. With an ``epsilon`` values decide among
    entries that hardly any attention is expected for. The first ``pinned`` entries always stay and
    are left out of all statistics, as their queries are unlike the others.
    """

    window: int = 32
    num_future: int = 512
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0
    pinned: int = 4
    needs: ClassVar[frozenset[Need]] = frozenset({"all_queries", "rotate"})

    def __post_init__(self) -> None:
        check_settings(self)
        check_range("window", self.window, 1)
        check_range("num_future", self.num_future, 1)
        check_at_most("num_future", self.num_future, _MOST_FUTURE)
        check_range("epsilon", self.epsilon, 0)
        check_range("pinned", self.pinned, 0)

    def score(self, inputs: LayerInputs) -> Tensor:
        inputs.check_all_queries()
        return self.finish(self.take(None, inputs), inputs)

    def take(self, taken: Moments | None, part: LayerInputs) -> Moments:
        """The queries so far, joined as Chan, Golub and LeVeque (1979) join samples."""
        rotate = part.attention.rotate
        if rotate is None:
            raise ValueError("rotate must be given to a policy that foresees queries, got None")
        position = query_positions(part)  # [B or 1, 1, R]
        queries = rotate(part.queries.float(), -position[:, 0])  # before RoPE
        counts = (position >= self.pinned) & (position < part.ends[:, :, None])
        queries = queries.masked_fill(~counts[..., None], 0)
        count = counts.sum(-1)[..., None]  # [B or 1, 1, 1]
        mean = queries.sum(2) / count.clamp(min=1)
        centred = (queries - mean[:, :, None]).masked_fill(~counts[..., None], 0)
        scatter = centred.mT @ centred
        if taken is None:
            return Moments(count, mean, scatter)
        both = (taken.num_queries + count).clamp(min=1)
        apart = mean - taken.mean
        weight = (taken.num_queries * count / both)[..., None]
        return Moments(
            taken.num_queries + count,
            taken.mean + apart * (count / both),
            taken.scatter + scatter + weight * apart[..., None] * apart[..., None, :],
        )

    def finish(self, taken: Moments, inputs: LayerInputs) -> Tensor:
        """``[B, Hkv, T]``: :meth:`score`, of a prompt whose parts were taken."""
        keys = inputs.keys.float()
        batch, heads, _, head_dim = keys.shape
        scale = inputs.attention.scale or head_dim**-0.5
        mean, covariance = self._future_queries(taken, inputs)  # [B, Hq, D], [B, Hq, D, D]
        z = scale * (mean.view(batch, heads, -1, head_dim) @ keys.mT)  # [B, Hkv, G, T]
        if self.covariance:
            grouped = covariance.view(batch, heads, -1, head_dim, head_dim)
            for g, c in enumerate(grouped.unbind(2)):
                z[:, :, g] += scale**2 / 2 * ((keys @ c) * keys).sum(-1)
        position = torch.arange(inputs.length, device=keys.device)
        competes = inputs.candidates(0) & (position >= self.pinned)  # [B or 1, 1, T]
        z = z.masked_fill(~competes[:, :, None], -torch.inf)
        scores = z.softmax(-1).mean(2) + self.epsilon
        if self.value_norm:
            scores *= torch.linalg.vector_norm(inputs.values, dim=-1, dtype=torch.float32)
        return pin_first(scores, self.pinned)

    def _future_queries(self, taken: Moments, inputs: LayerInputs) -> tuple[Tensor, Tensor]:
        """Mean ``[B, Hq, D]`` and covariance ``[B, Hq, D, D]`` of the queries to come."""
        future = inputs.ends + torch.arange(self.num_future, device=inputs.keys.device)
        turned = self._mean_rotation(inputs, future)  # [B or 1, 1, D, D]
        covariance = taken.scatter / taken.num_queries.clamp(min=1)[..., None]
        return (taken.mean[:, :, None] @ turned)[:, :, 0], turned.mT @ covariance @ turned

    def _mean_rotation(self, inputs: LayerInputs, positions: Tensor) -> Tensor:
        """``[B or 1, 1, D, D]``: row i is the mean over ``positions`` of unit vector i, turned."""
        rotate = inputs.attention.rotate
        assert rotate is not None
        head_dim = inputs.keys.shape[3]
        units = torch.eye(head_dim, device=positions.device)[None, :, None]
        count = positions.shape[1]
        mean = units.new_zeros((positions.shape[0], 1, head_dim, head_dim))
        for start in range(0, count, _FUTURE_PART):  # D * D numbers for each position
            part = positions[:, start : start + _FUTURE_PART]
            turned = rotate(units.expand(part.shape[0], -1, part.shape[1], -1), part)
            mean += turned.mean(2)[:, None] * (part.shape[1] / count)
        return mean


@dataclass(frozen=True)
class RepeatAttention:
    """Attention that an entry gets while the model repeats its prompt (KVzip, arXiv 2505.23416).

    ``S[h, t] = max over the group of h and the repeating queries r of softmax(q_r . k_t * scale)``,
    the softmax over the whole prompt and the repetition up to r. (The authors' code takes prompts
    in pieces of 2000 tokens and leaves the other pieces out of the softmax.)

    What the model needs in order to say its prompt again it may need for any question about it.
    Costs a second prefill: :meth:`adakv.Cache.repeat`. If an instruction is read instead of
    the repetition, and its ``reduce`` is ``"mean"``, what the instruction looks at stays (CItruS,
    arXiv 2406.12018). ``all_heads`` gives all kv heads of the layer the mean of their scores.
    """

    window: int = 1
    pinned: int = 4
    reduce: ops.Reduce = "max"
    all_heads: bool = False
    needs: ClassVar[frozenset[Need]] = frozenset({"repeat"})

    def __post_init__(self) -> None:
        check_scorer(self)
        check_choice("reduce", self.reduce, get_args(ops.Reduce))

    def score(self, inputs: LayerInputs) -> Tensor:
        if inputs.repeat is None:
            raise ValueError("repeat must be given: call Cache.repeat after the prompt")
        if inputs.positions is not None:
            joined = inputs.followed_by(*inputs.repeat)
            attended = joined.attended(joined.queries.shape[2], **self._how)
            return self._pinned(attended[..., : inputs.length].contiguous())
        scores = inputs.keys.new_zeros(inputs.keys.shape[:3], dtype=torch.float32)
        for b, length in enumerate(inputs.prompt_lens):  # each repetition follows its own prompt
            scores[b, :, :length] = self._score_one(inputs, slice(b, b + 1), length)
        return self._pinned(scores)

    @property
    def _how(self) -> dict[str, Any]:
        """What :func:`adakv.ops.score` is told."""
        return {"window_reduce": self.reduce, "group_reduce": self.reduce, "pool": "none"}

    def _pinned(self, scores: Tensor) -> Tensor:
        return pin_first(_of_all_heads(scores) if self.all_heads else scores, self.pinned)

    def _score_one(self, inputs: LayerInputs, one: slice, length: int) -> Tensor:
        """``[Hkv, length]`` of one sequence."""
        assert inputs.repeat is not None
        queries, more = inputs.repeat
        scores = ops.score(
            queries[one],
            torch.cat([inputs.keys[one, :, :length], more[one]], 2),
            **inputs.logits,
            **self._how,
        )
        return scores[0, :, :length]


def _of_all_heads(scores: Tensor) -> Tensor:
    """The mean over the kv heads, for each of them."""
    return scores.mean(1, keepdim=True).expand_as(scores).clone()


def _same_lengths(prompt_lens: tuple[int, ...]) -> list[tuple[slice, int]]:
    """Sequences that can be worked on together, and their length: all of them, or one by one."""
    if len(set(prompt_lens)) == 1:
        return [(slice(None), prompt_lens[0])]
    return [(slice(b, b + 1), length) for b, length in enumerate(prompt_lens) if length > 0]
