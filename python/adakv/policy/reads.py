"""Sparse reads: which pages of what a row holds a step visits. All entries stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adakv.policy.inputs import check_range, check_settings
from adakv.shortlist import UNITS, most_pages, share_units


@dataclass(frozen=True)
class Read:
    """What of all that rows hold a step reads, such as :class:`Quest`."""

    def __str__(self) -> str:
        """As :func:`adakv.policy.get_read` reads it."""
        from adakv.policy.written import brief

        return brief(self)


@dataclass(frozen=True)
class PageRead(Read):
    """How many pages of a row a step reads: what reads of whole pages have in common.

    ``share``, ``least``, ``newest`` and ``full_layers`` are those of :class:`Quest`.
    """

    share: float = 0.125
    least: int = 8
    newest: int = 1
    full_layers: int = 2

    def __post_init__(self) -> None:
        check_settings(self)
        check_share("share", self.share)
        check_range("least", self.least, 0)
        check_range("newest", self.newest, 1)
        check_range("full_layers", self.full_layers, 0)

    def most(self, num_pages: int) -> int:
        """How many pages a row of so many reads at most."""
        return most_pages(num_pages, self.share, self.least)

    def best(
        self, worth: Tensor, lengths: Tensor, *, page_size: int, new_tokens: int = 1
    ) -> tuple[Tensor, Tensor]:
        """The pages of the largest ``worth`` ``[B, Hkv, m]``, and the newest: their numbers in the
        row ``[B, Hkv, w]`` int64, ascending, m behind the last, and how many they are, ``[B, Hkv]``
        int32. What is worth less than 0 isn't read, and nothing is read of the newest ones' worth.
        """
        length = worth.shape[2]
        ends, older, num_newest = self._older(lengths, page_size, new_tokens)
        least = ends.clamp(max=self.least)
        budgets = (-(-ends * share_units(self.share) // UNITS)).maximum(least)[..., None]
        most = min(max(self.most(length) - num_newest, 0), length)
        place = torch.arange(length, device=worth.device)
        best, pages = worth.masked_fill(place >= older, -1).topk(most, -1)  # [B, Hkv, most]
        rank = torch.arange(most, device=worth.device)
        is_read = (best >= 0) & (rank < budgets - (ends[..., None] - older))
        last = older + torch.arange(num_newest, device=worth.device)
        last = last.where(last < ends[..., None], length)
        pages = torch.cat([pages.where(is_read, length), last], -1).sort(-1).values
        return pages, (pages < length).sum(-1, dtype=torch.int32)

    def _older(
        self, lengths: Tensor, page_size: int, new_tokens: int
    ) -> tuple[Tensor, Tensor, int]:
        """Pages of each row ``[B, Hkv]``, how many of them are older than the newest ``[B, Hkv,
        1]``, and how many these are at most."""
        ends = -(-lengths.long() // page_size)
        num_newest = self.newest + -(-(new_tokens - 1) // page_size)
        return ends, (ends - num_newest).clamp(min=0)[..., None], num_newest


@dataclass(frozen=True)
class Quest(PageRead):
    """The pages whose keys may fit the step's queries best (Quest, arXiv 2406.10774).

    Of each page and dimension d the largest and the smallest number of its keys are known. So no
    key of the page has a larger product with a query q than ``sum over d of max(q[d] * largest[d],
    q[d] * smallest[d])``. Scaled as the attention's logits, softmax over a row's older pages turns
    these bounds into weights; a page counts as much as the most that any query of the group and of
    the step's tokens gives it, and the best are read, beside the ``newest`` pages.

    Parameters
    ----------
    share : float in (0, 1]
        Of a row's pages, rounded up, the newest ones included.
    mass : float in (0, 1]
        Below 1 no more pages are read than each query needs to have so much of its weights, as far
        as ``share`` has room: by bisection of a threshold (SpecAttn's top-p, arXiv 2510.27641). The
        weights are bounds, not the attention itself, and more even than it.
    least : int
        Rows of up to so many pages are read whole, and no row reads fewer.
    newest : int
        Pages at the end of a row that are read always, besides those of the step's own tokens.
    full_layers : int
        The first layers, which read everything, as the authors' two: their attention is even.

    The paper has one q head a kv head; the softmax, which makes heads of a group comparable, is
    ours.
    """

    mass: float = 1.0
    reads: ClassVar[str] = "pages"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("mass", self.mass)


def check_share(name: str, value: float) -> None:
    """Raises ``ValueError`` unless it is a share, and not nothing."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value}")
