"""Reads by what a small model looks at, which reads the same tokens beside the large one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from adakv.errors import short
from adakv.policy.inputs import check_choice, check_range, check_settings
from adakv.policy.reads import PageRead, Read, check_share

_BISECTIONS = 10


@dataclass(frozen=True, kw_only=True)
class SpecAttn(PageRead):
    """The pages that a draft model looks at (SpecAttn, arXiv 2510.27641).

    The draft reads each step's tokens first. Of every one of them the fewest entries that together
    have the part ``mass`` of the attention of a draft's layer, its q heads' mean, are found by a
    threshold; the pages in which any of these entries lies are read by the model's layer that
    belongs to it, in all kv heads alike, beside the newest pages.

    Parameters
    ----------
    small : str or PreTrainedModel
        The draft: a folder, a name on the hub or a model, of the same tokenizer.
    mass : float in (0, 1]
    layers : tuple of int
        Of each of the model's layers, the draft's that belongs to it, as
        :func:`adakv.match_layers` finds them. Default: a draft of as many layers, one by one.
    share : float in (0, 1]
        Of a row's pages no more are read. Default: as many as ``mass`` asks for.
    least, newest, full_layers
        As of :class:`Quest`.

    Raises ``ValueError`` for settings of other kinds.
    """

    small: Any
    mass: float = 0.97
    layers: tuple[int, ...] = ()
    share: float = 1.0
    reads: ClassVar[str] = "pages"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_model(self.small)
        check_share("mass", self.mass)
        if not isinstance(self.layers, (tuple, list)) or not all(
            isinstance(x, int) and x >= 0 for x in self.layers
        ):
            raise ValueError(f"layers must be numbers of layers, got {short(self.layers)}")
        object.__setattr__(self, "layers", tuple(self.layers))

    def pages(self, weights: Tensor, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Which pages of each row a step reads: as :meth:`Quest.pages` gives them.

        Parameters
        ----------
        weights : ``[B, S, T]`` float32
            What the draft's tokens look at, by position.
        positions : ``[B, Hkv, m, P]`` int32
            Where the entries of each row's pages stand; of no meaning behind a row's end.
        lengths : ``[B, Hkv]`` int32
            Entries that each row holds.
        """
        chosen = weights >= top_p(weights, self.mass)
        worth = weights.where(chosen, -1).amax(1)  # [B, T], of all tokens together
        place = positions.flatten(2).long().clamp(0, worth.shape[1] - 1)
        of_rows = worth[:, None].expand(-1, place.shape[1], -1).gather(2, place)
        of_pages = of_rows.view(positions.shape).amax(3)
        page_size, columns = positions.shape[3], weights.shape[1]
        return self.best(of_pages, lengths, page_size=page_size, new_tokens=columns)


@dataclass(frozen=True, kw_only=True)
class SmallKV(Read):
    """Some entries, and of others the values alone, by what a small model of the same family looks
    at (SmallKV, NeurIPS 2025).

    The small model keeps everything, and reads each token first. Each q head of the model goes by
    that head of the small one which looked at most alike in the first ``map_tokens`` of the prompt:
    by the Jaccard index of the sets of entries with the largest sums of attention. In each step a
    kv head attends to the entries with the largest sums, the critical ones, and the newest; of the
    next ones, the marginal, it reads the values alone, with the weight that the small model's head
    gives them now; of the rest nothing. An entry that is of the rest now may be critical again.

    Parameters
    ----------
    small : str or PreTrainedModel
        A folder, a name on the hub or a model, of the same tokenizer.
    share : float in (0, 1]
        Of a row's bytes that a step reads: half for critical entries, a quarter for the newest and
        a quarter for values of marginal ones, of which there are as many as critical ones.
    map_tokens : int
        Tokens of the prompt by which heads are matched; the authors take 100 to 200.
    renormalise : bool
        Whether the weights of the entries that are attended to are scaled down by the weight of the
        marginal ones, so that all are 1 together. The paper's formula has them as they are.
    reserve : "device" or "cpu"
        Where all entries lie while a text is written: where the model does, or in the CPU's memory,
        from which entries are copied when they become critical or marginal.

    For q heads of one kv head the sums are added, which is ours: the paper doesn't say.
    """

    small: Any
    share: float = 0.2
    map_tokens: int = 128
    renormalise: bool = True
    reserve: Literal["device", "cpu"] = "device"
    reads: ClassVar[str] = "entries"

    def __post_init__(self) -> None:
        check_settings(self)
        _check_model(self.small)
        check_share("share", self.share)
        check_range("map_tokens", self.map_tokens, 8)
        check_choice("reserve", self.reserve, ("device", "cpu"))

    def counts(self, length: int) -> tuple[int, int, int]:
        """How many of so many entries are critical, newest and marginal."""
        recent = min(max(math.ceil(self.share * length / 4), 1), length)
        critical = min(math.ceil(self.share * length / 2), length - recent)
        return critical, recent, min(math.ceil(self.share * length / 2), length - recent - critical)

    def entries(self, sums: Tensor, num_kv_heads: int) -> tuple[Tensor, Tensor]:
        """Which entries of each row are attended to ``[Hkv, critical + newest]``, and of which the
        values alone are read ``[Hkv, marginal]``, int64, by the ``sums`` ``[Hq, T]`` of what the
        small model's heads looked at."""
        length = sums.shape[1]
        critical, recent, marginal = self.counts(length)
        older = length - recent
        of_rows = sums.view(num_kv_heads, -1, length)[..., :older].sum(1)
        best = of_rows.sort(dim=1, descending=True, stable=True).indices[:, : critical + marginal]
        newest = torch.arange(older, length, device=sums.device).expand(num_kv_heads, -1)
        return torch.cat([best[:, :critical], newest], 1), best[:, critical:]

    def mixed(self, out: Tensor, weights: Tensor, values: Tensor) -> Tensor:
        """What a step attended to ``[Hq, D]``, with marginal values ``[Hkv, m, D]`` by weights of
        the small model's ``[Hq, m]``."""
        heads, _, head_dim = values.shape
        grouped = weights.view(heads, -1, weights.shape[1])
        more = (grouped @ values.float()).view(-1, head_dim)
        kept = 1 - weights.sum(1, keepdim=True) if self.renormalise else 1
        return (kept * out.float() + more).to(out.dtype)


def _check_model(small: Any) -> None:
    if not isinstance(small, (str, torch.nn.Module)):
        raise ValueError(f"small must be a model, or its folder or name, got {short(small)}")


def top_p(weights: Tensor, mass: float) -> Tensor:
    """The threshold ``[..., 1]`` of each row of ``weights`` ``[..., n]``, of at least 0: those from
    it on have at least ``mass`` of the row's sum, and nearly as few as possible.

    By bisection between 0 and the largest weight, without sorting.
    """
    high = weights.amax(-1, keepdim=True)
    low, wanted = torch.zeros_like(high), mass * weights.sum(-1, keepdim=True)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_enough = weights.where(weights >= middle, 0).sum(-1, keepdim=True) >= wanted
        low, high = middle.where(is_enough, low), high.where(is_enough, middle)
    return low


def layer_map(cost: Tensor) -> tuple[int, ...]:
    """A column for each row of ``cost`` ``[L, L']``, none before that of the row above, so that
    their sum is the least: by dynamic programming (SpecAttn, arXiv 2510.27641)."""
    best, came = cost[0], []
    for row in cost[1:]:
        lowest, at = best.cummin(0)
        came.append(at)
        best = lowest + row
    path = [int(best.argmin())]
    for at in reversed(came):
        path.append(int(at[path[-1]]))
    return tuple(reversed(path))


def head_map(ours: Tensor, theirs: Tensor, count: int) -> Tensor:
    """``[N]`` int64: of each head of ``ours`` ``[N, T]`` that of ``theirs`` ``[M, T]`` whose
    ``count`` largest entries are most the same, by the Jaccard index; the first of equals
    (SmallKV)."""
    sets = []
    for sums in (ours, theirs):
        best = sums.sort(dim=1, descending=True, stable=True).indices[:, :count]
        sets.append(torch.zeros_like(sums, dtype=torch.float32).scatter_(1, best, 1))
    both = sets[0] @ sets[1].mT
    return (both / (2 * count - both)).argmax(1)
