"""Parts that look at tokens of one class from those of another: images, and what asks of them.

They are told which tokens are of an image (:class:`adakv.policy.TokenClasses`). ``evicts`` names
the class whose entries alone may leave: all others have a score of ``+inf``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from adakv import ops
from adakv.policy.attention import attention, query_positions
from adakv.policy.base import Kept, Need
from adakv.policy.inputs import (
    LayerInputs,
    check_choice,
    check_range,
    check_scorer,
    check_settings,
    pin_first,
)

From = Literal["self", "cross"]

_ROWS = 8  # of queries whose attention is held at a time
_NUMBERS = 2**24  # of attention that are held at a time, of the queries of a whole prompt


@dataclass(frozen=True)
class EliteQueries:
    """What the most telling words of a question look at in an image (AirCache, arXiv 2503.23956).

    Elite are the text tokens j of the window to which the last token attends with ``A[j] >= share *
    max(A)``, A over text alone, the mean of all heads. An image's entry t has ::

        S[t] = mean over the elite q and all heads of softmax(q . k_t * scale)

    the softmax over the image's entries and the elite ones before q. All kv heads have the same
    scores; only entries of images leave.

    From a note of the paper. What it doesn't say is ours: that heads are averaged, and that elite
    tokens are looked for in the window alone. There a question stands behind its image, and the
    first token of a prompt, which all attend to, isn't there.
    """

    window: int = 64
    share: float = 0.9
    pinned: int = 0
    needs: ClassVar[frozenset[Need]] = frozenset({"classes"})
    evicts: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        check_scorer(self)
        check_range("share", self.share, 0, 1)

    def score(self, inputs: LayerInputs) -> Tensor:
        inputs.check_window(self.window)
        is_image, is_elite = inputs.is_of(self.evicts), self._elite(inputs)  # [B, T]
        among = (is_image | is_elite)[:, None, None, None]
        columns = torch.zeros(is_image.shape, device=inputs.device)
        for row in range(0, self.window, _ROWS):
            rows = slice(row, row + _ROWS)
            p = attention(inputs, rows).masked_fill(~among, 0)  # [B, Hkv, G, R, T]
            p = p / p.sum(-1, keepdim=True).clamp(min=1e-30)
            columns += p.mean((1, 2)).mul(_of_rows(is_elite, inputs, rows)[..., None]).sum(1)
        columns /= is_elite.sum(-1, keepdim=True).clamp(min=1)
        return _only(columns, is_image, inputs)

    def _elite(self, inputs: LayerInputs) -> Tensor:
        """``[B, T]`` bool"""
        is_text = inputs.is_of("text", "instruction")
        p = attention(inputs, slice(self.window - 1, None))[:, :, :, 0]  # [B, Hkv, G, T]
        p = p.masked_fill(~is_text[:, None, None], 0)
        looked_at = (p / p.sum(-1, keepdim=True).clamp(min=1e-30)).mean((1, 2))  # [B, T]
        is_near = is_text & ~inputs.candidates(self.window)[:, 0]
        looked_at = looked_at.masked_fill(~is_near, 0)
        return is_near & (looked_at >= self.share * looked_at.amax(-1, keepdim=True))


@dataclass(frozen=True)
class ClassAttention:
    """Attention from the window's tokens of an entry's own class, or of all others (CSP, arXiv
    2412.04652).

    ``S[h, t] = mean over the group of h(sum over the window's q(exp(z) / (1 + sum(exp(z)))))`` with
    ``z = q . k * scale``, over the q of the class of t (``rows="self"``) or those that are not of
    it (``"cross"``). Instructions are text.

    The 1 lets a query attend to nothing, as a sink logit of 0; one of the model's own stays beside
    it. The authors' code has no groups; their mean is ours.
    """

    rows: From = "self"
    window: int = 32
    pinned: int = 0
    needs: ClassVar[frozenset[Need]] = frozenset({"classes"})

    def __post_init__(self) -> None:
        check_scorer(self)
        check_choice("rows", self.rows, get_args(From))

    def score(self, inputs: LayerInputs) -> Tensor:
        inputs.check_window(self.window)
        kinds = [inputs.is_of("text", "instruction"), inputs.is_of("image"), inputs.is_of("audio")]
        sinks = torch.zeros(inputs.queries.shape[1], device=inputs.device)
        if (own := inputs.attention.sink_logits) is not None:
            sinks = torch.logaddexp(sinks, own.float())
        loosened = replace(inputs, attention=inputs.attention._replace(sink_logits=sinks))
        scores = torch.zeros(inputs.shape, device=inputs.device)
        for row in range(0, self.window, _ROWS):
            rows = slice(row, row + _ROWS)
            p = attention(loosened, rows).mean(2)  # [B, Hkv, R, T]
            alike = torch.zeros(len(p), *p.shape[2:], device=p.device)  # [B, R, T]
            for kind in kinds:
                alike += _of_rows(kind, inputs, rows)[..., None] * kind[:, None]
            heard = alike if self.rows == "self" else 1 - alike
            scores += (p * heard[:, None]).sum(2)
        return pin_first(scores, self.pinned)


@dataclass(frozen=True)
class ClassQuotas:
    """A part by attention within a class, the rest by that between classes (CSP, arXiv 2412.04652).

    Of a head's candidates ``int((1 - cross) * count)`` by score, those of :class:`ClassAttention`;
    of the others those that tokens of other classes attend to most. The authors' code takes both
    lists from all entries and may store an entry twice; here none is, and the budget is spent.
    """

    cross: float = 0.5
    needs: ClassVar[frozenset[Need]] = frozenset({"classes"})

    def __post_init__(self) -> None:
        check_settings(self)
        check_range("cross", self.cross, 0, 1)

    def select(
        self, scores: Tensor, budgets: Tensor, inputs: LayerInputs, *, window: int, total: int
    ) -> Kept:
        between = ClassAttention("cross", window=inputs.queries.shape[2]).score(inputs)
        eps = 1e-4
        return ops.select(
            scores,
            budgets,
            window=window,
            seq_lens=inputs.sequence_lens,
            norms=between / (scores.clamp(min=0) + eps),  # so that score + eps cancels out
            first=1 - self.cross,
            eps=eps,
            total=total,
        )


class Looked(NamedTuple):
    """What :class:`DualThreshold` knows of the queries so far, the mean of all heads."""

    sums: Tensor  # [B, T] float32
    most: Tensor  # [B, T] float32


@dataclass(frozen=True)
class DualThreshold:
    """Entries of an image that no word looks at leave all layers (HAE, arXiv 2602.02197, as
    MustDrop, arXiv 2411.10803, has it).

    With ``A[s, t]`` the attention of the text's queries s to the image's entries t in the first
    layer, the mean of all heads, entry t leaves if both ::

        sum over s of A[s, t] < share * sum over s and t of A[s, t]
        max over s of A[s, t] < most

    It leaves every kv head of every layer. Others are ordered by the sum. Which of them fit is the
    allocator's matter: with :class:`adakv.policy.Capped` a budget is the most that stays.

    ``share`` is what a review of HAE tells of its experiments, ``most`` what MustDrop's code takes
    beside it; HAE's text was not read.
    """

    share: float = 0.0015
    most: float = 0.001
    window: int = 1
    pinned: int = 0
    needs: ClassVar[frozenset[Need]] = frozenset({"all_queries", "classes", "layer"})
    evicts: ClassVar[str] = "image"
    of_first_layer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_scorer(self)
        check_range("share", self.share, 0, 1)
        check_range("most", self.most, 0, 1)

    def score(self, inputs: LayerInputs) -> Tensor:
        inputs.check_all_queries()
        return self.finish(self._looked(None, inputs), inputs)

    def take(self, taken: Looked | None, part: LayerInputs) -> Looked | None:
        """Sums and maxima; of other layers than the first nothing."""
        return None if part.layer else self._looked(taken, part)

    def finish(self, taken: Looked, inputs: LayerInputs) -> Tensor:
        """``[B, Hkv, T]``: :meth:`score`, of a prompt whose parts were taken."""
        is_image = inputs.is_of(self.evicts)
        sums = taken.sums.masked_fill(~is_image, 0)
        is_unseen = sums < self.share * sums.sum(-1, keepdim=True)
        sums = sums.masked_fill(is_unseen & (taken.most < self.most), -torch.inf)
        return _only(sums, is_image, inputs)

    def _looked(self, taken: Looked | None, part: LayerInputs) -> Looked:
        batch, num_heads, count, _ = part.queries.shape
        is_text = part.is_of("text", "instruction")
        sums, most = (torch.zeros(batch, part.length, device=part.device) for _ in range(2))
        if taken is not None:
            sums[:, : taken.sums.shape[1]] = taken.sums
            most[:, : taken.most.shape[1]] = taken.most
        step = max(_NUMBERS // (batch * num_heads * part.length), _ROWS)
        for row in range(0, count, step):
            rows = slice(row, row + step)
            p = attention(part, rows).mean((1, 2)) * _of_rows(is_text, part, rows)[..., None]
            sums += p.sum(1)
            most = most.maximum(p.amax(1))
        return Looked(sums, most)


def _of_rows(is_there: Tensor, inputs: LayerInputs, rows: slice) -> Tensor:
    """``[B, R]`` float32: 1 for queries of tokens ``[B, T]`` that are there."""
    positions = query_positions(inputs)[:, 0, rows].expand(len(is_there), -1)
    found = is_there.gather(1, positions.clamp(min=0, max=is_there.shape[1] - 1).long())
    is_token = (positions >= 0) & (positions < inputs.ends[:, :1])
    return (found & is_token).float()


def _only(columns: Tensor, leaves: Tensor, inputs: LayerInputs) -> Tensor:
    """``[B, Hkv, T]`` from columns ``[B, T]``: ``+inf`` for entries that may not leave."""
    return columns.masked_fill(~leaves, torch.inf)[:, None].expand(inputs.shape).clone()
