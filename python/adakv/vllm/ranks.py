"""Budgets of layers that cross tensor-parallel ranks; without a line of vLLM.

Each rank scores its own kv heads. The scores of all ranks come together once for each prompt, and
each rank shares every layer's budget out among the heads of all ranks, for itself and in the same
order, so that all come to the same counts. Of these it takes its own heads'.

All ranks hold the same blocks of a request, so that a rank's heads may get more than it has room
for. The room is that of all layers: as with model-wide policies rows have pages of all layers (see
pages.py), among which the ups and downs of single layers even out. What is still too much leaves
(:func:`within`), and nobody gets it instead.

Scores come together only where all ranks wait for each other. So all have to compress the same
prompts in the same order, though the scheduler may abort a request between two ranks' looks into
the ledger: one rank looks, and tells the others (:class:`OneReader`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from adakv.policy import Adaptive, Allocator, Flat, LayerInputs
from adakv.vllm.ledger import Ledger, LedgerScheduler, order_of
from adakv.vllm.plan import Order, Scheduler, most_kept_blocks
from adakv.vllm.steps import sent


def within(counts: Tensor, budgets: tuple[int, ...], page_size: int) -> Tensor:
    """Entries that rows keep of what they should, in as many pages as a rank has for them.

    A row keeps what it should up to the mean budget. Of pages above that all rows lose the same
    share, rounded so that every page is used.

    Parameters
    ----------
    counts : ``[B, R]`` int32
        Entries of all rows of a rank: of each kv head of each layer.
    budgets : ints ``[B]``
        Mean entries per row, by which the pages of a request are planned.
    page_size : int
    """
    rows = counts.shape[1]
    most = [
        rows * most_kept_blocks(budget=budget, block_size=page_size, num_kv_heads=None)
        for budget in budgets
    ]
    means, room = sent([[*budgets], most], counts.device)[..., None]  # [B, 1]
    pages, even = (-(-x // page_size) for x in (counts.long(), counts.minimum(means)))
    more = (pages - even).cumsum(1)
    fits = more * (room - even.sum(1, keepdim=True)).minimum(more[:, -1:])
    fits //= more[:, -1:].clamp(min=1)
    fits = fits.diff(dim=1, prepend=torch.zeros_like(fits[:, :1]))
    return counts.minimum((even + fits) * page_size).int()


class Across(NamedTuple):
    """The tensor-parallel ranks, as one of them sees them."""

    rank: int
    #: From this rank's scores ``[B, L * Hkv, T]`` to those of all, ``[ranks, B, L * Hkv, T]``. All
    #: ranks call it for the same prompts in the same order.
    gather: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AllRanks:
    """Budgets by ``inner`` over the kv heads of all ranks, of which this is one.

    It is taken for model-wide, as all of a prompt's layers are asked at once, but each layer has
    its own budget. Equal scores: as ``inner`` has it, in the order of the heads of the whole model.
    Prompts are of one length.

    Parameters
    ----------
    inner : :class:`adakv.policy.Adaptive`
        With the same budget for each layer, from scores alone: see :func:`can_cross`.
    page_size : int
    across : :class:`Across`
    """

    inner: Adaptive
    page_size: int
    across: Across
    layers: ClassVar[Flat] = Flat()
    is_model_wide: ClassVar[bool] = True

    def allocate(
        self, scores: Tensor, inputs: LayerInputs, budgets: tuple[int, ...], *, window: int
    ) -> Tensor:
        heads = inputs.num_kv_heads
        of_ranks = self.across.gather(scores.contiguous()).unflatten(2, (-1, heads))
        ranks, batch, layers = of_ranks.shape[:3]  # and [heads, T]
        joined = of_ranks.permute(1, 2, 0, 3, 4).reshape(batch * layers, ranks * heads, -1)
        of_layers = tuple(budget for budget in budgets for _ in range(layers))
        counts = self.inner.allocate(joined, inputs, of_layers, window=window)
        own = counts.view(batch, layers, ranks, heads)[:, :, self.across.rank]
        return within(own.reshape(batch, -1), budgets, self.page_size)

    def total(self, budget: int, *, window: int, prompt_len: int, num_kv_heads: int) -> int:
        blocks = most_kept_blocks(budget=budget, block_size=self.page_size, num_kv_heads=None)
        return num_kv_heads * min(blocks * self.page_size, prompt_len)


def can_cross(allocator: Allocator) -> bool:
    """Whether an allocator's budgets can cross ranks: it shares a layer's out among kv heads, the
    same for each layer, by nothing but their scores."""
    return (
        isinstance(allocator, Adaptive)
        and isinstance(allocator.layers, Flat)
        and allocator.floor < 1
        and allocator.budgets_from == "scores"
        and not allocator.weigh_heads
    )


class _Seen(Scheduler):
    """What a ledger had of some requests."""

    def __init__(self, first_blocks: Sequence[int], rows: Tensor) -> None:
        self._rows = dict(zip(first_blocks, rows.tolist(), strict=True))

    def is_running(self, first_block: int) -> bool:
        return bool(self._rows[first_block][0])

    def order(self, first_block: int, boundary: int, computed: int) -> Order | None:
        return order_of(self._rows[first_block][1:], first_block, boundary)


class OneReader(LedgerScheduler):
    """A ledger that one rank ``reads`` for all.

    Parameters
    ----------
    ledger : :class:`adakv.vllm.ledger.Ledger`
    reads : bool
        Whether this rank is the one.
    tell : callable
        Fills a tensor of the CPU with that of the rank that reads. All ranks call it at once.
    """

    has_orders = True  # whether there are any is not asked by each rank for itself

    def __init__(self, ledger: Ledger, *, reads: bool, tell: Callable[[Tensor], object]) -> None:
        super().__init__(ledger, counts=reads)
        self._tell = tell

    def look(self, first_blocks: Sequence[int]) -> Scheduler:
        rows = torch.from_numpy(self._ledger.read(first_blocks))
        if len(rows) > 0:
            self._tell(rows)
        return _Seen(first_blocks, rows)
