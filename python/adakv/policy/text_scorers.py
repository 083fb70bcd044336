"""Parts made for texts that are chosen from while they are written; they take prompts, too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from adakv import ops
from adakv.ops import Kept
from adakv.policy.attention import attention
from adakv.policy.base import Need
from adakv.policy.inputs import LayerInputs, check_range, check_scorer, check_settings, pin_first
from adakv.policy.scorers import Random, Recency, check_odd

_ROWS = 8  # of the window whose attention LastImportant holds at a time
_ROUNDING = 1e-6  # of an attention that is as large as the threshold


@dataclass(frozen=True)
class RKV:
    """Attended to, and unlike the others (R-KV, arXiv 2505.24133).

    ``S[h, t] = share * A[h, t] - (1 - share) * softmax_t(C[h, t])``: A is the window's attention as
    SnapKV pools it, C the mean cosine of an entry's key to those of all other entries of the row.
    ``share`` is the paper's lambda.

    The authors' code also leaves cosines under 0.5 out, and those to the newest tokens that are
    most alike; here C is one product with the sum of the row's keys.
    """

    window: int = 8
    pool_width: int = 7
    share: float = 0.1
    pinned: int = 0

    def __post_init__(self) -> None:
        check_scorer(self)
        check_range("share", self.share, 0, 1)
        check_odd("pool_width", self.pool_width)

    def score(self, inputs: LayerInputs) -> Tensor:
        attention = inputs.attended(self.window, pool="max", pool_width=self.pool_width)
        held, candidates = inputs.candidates(0), inputs.candidates(self.window)
        keys = F.normalize(inputs.keys.float(), dim=-1).masked_fill(~held[..., None], 0)
        to_all = (keys @ keys.sum(2)[..., None])[..., 0]  # [B, Hkv, T], that to itself is 1
        others = (held.sum(-1, keepdim=True) - 1).clamp(min=1)
        alike = ((to_all - 1) / others).masked_fill(~candidates, -torch.inf).softmax(-1)
        scores = self.share * attention.masked_fill(~candidates, 0) - (1 - self.share) * alike
        return pin_first(scores.masked_fill(~candidates, -torch.inf), self.pinned)


@dataclass(frozen=True)
class ValueRange:
    """How far apart an entry's values are (VaSE, arXiv 2606.03928).

    ``S[h, t] = max_d v[h, t, d] - min_d v[h, t, d]``: what is lost with the few values that are
    far larger than the others makes a model repeat itself.
    """

    window: int = 32
    pinned: int = 0

    def __post_init__(self) -> None:
        check_scorer(self)

    def score(self, inputs: LayerInputs) -> Tensor:
        values = inputs.values.float()
        return pin_first(values.amax(-1) - values.amin(-1), self.pinned)


@dataclass(frozen=True)
class AhaKV:
    """Attention whose softmax is as wide as the budget, times the value (AhaKV, arXiv 2506.03762).

    ``S[h, t] = G[h, t] * sum over the window of(mean over the group of h of softmax_t(gain * q .
    k))`` with ``gain = sqrt(2 * ln(i / K) / D)`` for i tokens that were seen, of which K stay: the
    entropy to be expected is then that of K equal entries. G is ``|v|^2``, mean-pooled over
    ``pool_width`` candidates and divided by the largest of the head.

    The gain takes the place of the model's scale, before a softcap. From a note of the paper, which
    says neither how wide the pool is nor how a group is reduced.
    """

    window: int = 32
    pool_width: int = 7
    pinned: int = 0
    needs: ClassVar[frozenset[Need]] = frozenset({"budget"})

    def __post_init__(self) -> None:
        check_scorer(self)
        check_odd("pool_width", self.pool_width)

    def score(self, inputs: LayerInputs) -> Tensor:
        if not inputs.budgets:
            raise ValueError("budgets must be given to a policy that needs them, got none")
        head_dim = inputs.queries.shape[-1]
        stay = torch.tensor(inputs.budgets, dtype=torch.float32)
        stay = stay.to(inputs.device, non_blocking=True)
        gain = (2 * (inputs.seen / stay).log().clamp(min=0) / head_dim).sqrt()
        attention = inputs.attended(
            self.window,
            gain=gain / (inputs.attention.scale or head_dim**-0.5),
            window_reduce="sum",
            pool="none",
        )
        sizes = inputs.values.float().square().sum(-1)
        sizes = sizes.masked_fill(~inputs.candidates(self.window), 0)
        pooled = F.avg_pool1d(sizes, self.pool_width, 1, self.pool_width // 2)
        prior = pooled / pooled.amax(-1, keepdim=True).clamp(min=1e-30)
        return pin_first(attention * prior, self.pinned)


@dataclass(frozen=True)
class LastImportant:
    """When an entry was important for the last time (CORM, arXiv 2404.15949).

    ``S[h, t]`` is the number, from 1 to ``window``, of the newest of the window's queries for which
    the entry is important, ``p >= 1 / i`` to a q head of the group where i tokens have been seen;
    and ``-inf`` if it is to none: with the allocator :class:`adakv.policy.Capped` such entries
    leave, however much room there is.

    The threshold is from memory, and so is the paper's window, 256.
    """

    window: int = 64
    pinned: int = 0

    def __post_init__(self) -> None:
        check_scorer(self)

    def score(self, inputs: LayerInputs) -> Tensor:
        inputs.check_window(self.window)
        newest = torch.zeros(inputs.shape, device=inputs.device)
        seen = inputs.seen[:, None] - self.window  # [B or 1, 1], before the window
        for row in range(0, self.window, _ROWS):
            p = attention(inputs, slice(row, row + _ROWS)).amax(2)  # [B, Hkv, R, T]
            number = torch.arange(row + 1, row + 1 + p.shape[2], device=p.device)
            least = (1 - _ROUNDING) / (seen + number).clamp(min=1)  # [B or 1, R]
            is_important = p >= least[:, None, :, None]
            newest = newest.maximum((is_important * number[:, None]).amax(2))
        return pin_first(newest.masked_fill(newest == 0, -torch.inf), self.pinned)


@dataclass(frozen=True)
class Earliest:
    """The first entries and the newest (PrefixKV's rule for texts, arXiv 2412.03409).

    ``S[h, t] = -t``. A row that has its budget drops one entry a token: that which is no longer one
    of the newest ``window``.
    """

    window: int = 24
    pinned: int = 0

    def __post_init__(self) -> None:
        check_scorer(self)

    def score(self, inputs: LayerInputs) -> Tensor:
        return pin_first(-Recency(pinned=0).score(inputs), self.pinned)


@dataclass(frozen=True)
class SampledRest:
    """A part by score, the rest by chance (VaSE, arXiv 2606.03928).

    Of a head's candidates ``int(first * count)`` by score; the others are drawn without putting
    back, in proportion to the attention of the window as SnapKV pools it: by ``A / E`` with E from
    an exponential distribution, of which the largest are such a sample. Chance is that of
    :class:`adakv.policy.Random`.
    """

    first: float = 0.25
    pool_width: int = 7
    seed: int = 0
    needs: ClassVar[frozenset[Need]] = frozenset({"queries"})

    def __post_init__(self) -> None:
        check_settings(self)
        check_range("first", self.first, 0, 1)
        check_odd("pool_width", self.pool_width)
        check_range("seed", self.seed, 0, 2**31 - 1)

    def select(
        self, scores: Tensor, budgets: Tensor, inputs: LayerInputs, *, window: int, total: int
    ) -> Kept:
        attention = inputs.attended(inputs.queries.shape[2], pool="max", pool_width=self.pool_width)
        uniform = Random(self.seed).score(inputs).clamp(2.0**-25, 1 - 2.0**-25)
        keys = attention.clamp(min=1e-30) / -uniform.log()
        eps = 1e-4
        return ops.select(
            scores,
            budgets,
            window=window,
            seq_lens=inputs.sequence_lens,
            norms=keys / (scores.clamp(min=0) + eps),  # so that score + eps cancels out
            first=self.first,
            eps=eps,
            total=total,
        )
