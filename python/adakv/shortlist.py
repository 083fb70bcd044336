"""Sparse reads: the verb that says which pages of its rows a step reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adakv import _C
from adakv._register import verb
from adakv._schedules import NOTHING

UNITS = 2**20  # in which a share is counted, as in cpp/ops/listing.h


def share_units(share: float) -> int:
    """A share as hosts and devices count with it."""
    return round(share * UNITS)


def most_pages(num_pages: int, share: float, least: int) -> int:
    """How many pages of ``num_pages`` are read at most."""
    return max(-(-num_pages * share_units(share) // UNITS), min(least, num_pages))


def _listed(
    queries: Tensor,
    _bounds: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    *,
    page_size: int = 16,
    share: float = 0.125,
    least: int = 8,
    newest: int = 1,
    **_options: Any,
) -> tuple[Tensor, Tensor]:
    """The listed pages ``[B, Hkv, X]``, and lengths ``[B, Hkv]``."""
    try:
        batch, heads, num_pages = block_table.shape
        always = newest + -(-(queries.shape[2] - 1) // page_size)
        width = max(most_pages(num_pages, share, least), min(always, num_pages))
        return block_table.new_empty((batch, heads, width)), lengths.new_empty((batch, heads))
    except (AttributeError, ValueError, TypeError, ArithmeticError, IndexError, RuntimeError):
        return NOTHING, NOTHING  # what is wrong, the core says


@verb(fake=_listed)
def shortlist(
    queries: Tensor,
    bounds: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    *,
    num_new: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    page_size: int = 16,
    share: float = 0.125,
    mass: float = 1.0,
    least: int = 8,
    newest: int = 1,
    prefetch: bool = False,
) -> tuple[Tensor, Tensor]:
    """Which pages of what its rows hold a step reads (Quest, arXiv 2406.10774; ``mass`` is the
    top-p of SpecAttn, arXiv 2510.27641).

    Of each page and dimension the largest and the smallest number of its keys are known: no key of
    the page has a larger product with a query q than ``sum over d of max(q[d] * largest[d], q[d] *
    smallest[d])``. Scaled and capped as the attention's logits, softmax over a row's pages but the
    newest turns these bounds into weights; a page is worth the most that any query of the group and
    of the step's tokens gives it. The best are listed, of equal ones the first, beside the newest.

    Parameters
    ----------
    queries : ``[B, Hq, S, D]``
        Of the step, whose tokens the rows hold already.
    bounds : ``[N, 2 D]``, contiguous, of the queries' dtype
        The largest, then the smallest number of each page and dimension; not read of a row's newest
        pages and behind its end. Bounds with NaN are taken for the lowest.
    lengths : ``[B, Hkv]`` int32
    block_table : ``[B, Hkv, M]`` int32
    num_new : ``[B]`` int32, optional
        As in :func:`adakv.ops.append`; padding asks for nothing.
    scale, softcap : float, optional
        Default: ``1 / sqrt(D)``, and no cap.
    page_size : int
        P.
    share : float in (0, 1]
        Of a row's pages, rounded up, the newest ones included; in multiples of 2^-20.
    mass : float in (0, 1]
        Below 1 no more pages are read than each query needs to have so much of its weights, as far
        as ``share`` has room: by ten bisections of a threshold.
    least : int
        Rows of up to so many pages are read whole, and no row reads fewer.
    newest : int
        Pages at the end of a row that are read always, besides those of the step's own tokens.
    prefetch : bool
        On CUDA: bounds, and what the block table says of pages before the newest, may be read while
        the kernel before this one still runs, which must not write them. It may be the step's
        ``append``.

    Returns
    -------
    block_table : ``[B, Hkv, X]`` int32
        The listed pages in the order of their slots, -1 behind the last.
    lengths : ``[B, Hkv]`` int32
        The entries that these hold. With both in the place of its own, a layer is for ``plan`` and
        ``attend`` one that holds just the listed pages.
    """
    listed, listed_lengths = _listed(
        queries, bounds, lengths, block_table,
        page_size=page_size, share=share, least=least, newest=newest,
    )  # fmt: skip
    _C.shortlist(
        queries, bounds, lengths, block_table, num_new,
        0.0 if scale is None else scale, 0.0 if softcap is None else softcap,
        page_size, share, mass, least, newest, prefetch, listed, listed_lengths,
    )  # fmt: skip
    return listed, listed_lengths
