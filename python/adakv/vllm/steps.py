"""A step of an engine: as the engine describes it, and as the layers need it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from adakv.ops import Layer
from adakv.step import PlannedStep

if TYPE_CHECKING:
    from adakv.vllm.prompt_attention import Whole
    from adakv.vllm.prompts import Prompt


@dataclass(frozen=True)
class Batch:
    """One step of the engine, R requests. Host values are lists.

    Parameters
    ----------
    query_start : R + 1 ints
        Where each request's new tokens begin and end among all of the step.
    computed : R ints
        Tokens of each request before the step. Only read where a prompt is read, begins or ends.
    is_prefilling : R bools
        Whether ``computed`` is less than the prompt.
    seq_lens : ``[R]`` int32
        Tokens of each request, the new ones included.
    block_table : ``[R, M]`` int32
        Blocks of each request; 0 in front: no request, but padding.
    max_seq_len : int
        At least the largest of ``seq_lens``.
    num_new : ``[R]`` int32, optional
        For a batch whose requests all have the same number of columns, some of them padding: how
        many, counted from the right, are tokens.
    slots : ``[tokens]`` int64, optional
        Where each new token's entries go in a whole request: ``block * P`` and the place in it.
    requests : R ints, optional
        By which each request is known from its first step to its last, -1 for padding. Without
        them requests are known by their first blocks, which the host then waits for.
    """

    query_start: Sequence[int]
    computed: Sequence[int]
    is_prefilling: Sequence[bool]
    seq_lens: Tensor
    block_table: Tensor
    max_seq_len: int
    num_new: Tensor | None = None
    slots: Tensor | None = None
    requests: Sequence[int] | None = None


class Tables(NamedTuple):
    """Rows of some requests in all layers, int32."""

    lengths: Tensor  # [L, B, Hkv], before the step; then in each layer also the new tokens
    block_table: Tensor  # [L, B, Hkv, M]
    fresh_pages: Tensor  # [L, B, Hkv, F]
    seen: Tensor  # [L, B]

    @property
    def plan_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What :meth:`PlannedStep.plan` takes of them."""
        return self[:3]


class Group(NamedTuple):
    """Requests of a step that have the same number of new tokens, side by side."""

    tokens: slice | Tensor  # of the step
    new_tokens: int
    planned: PlannedStep


class Reading(NamedTuple):
    """New tokens of a prompt."""

    prompt: Prompt
    tokens: slice  # of the step
    length: int  # of the prompt as far as it is read then
    page_ids: Tensor  # [Hkv, blocks], where it lies


class Asked(NamedTuple):
    """Queries of texts that are remembered."""

    tokens: Tensor  # [n] of the step
    into: Tensor  # [n], where they go


@dataclass
class Step:
    """What the layers need of a step."""

    groups: list[Group] = field(default_factory=list)
    reading: dict[int, Reading] = field(default_factory=dict)  # by row of the batch
    read_by_torch: set[int] = field(default_factory=set)  # rows of these that are in no group
    whole: Whole | None = None  # more that are in no group: read by FlashAttention
    queries: Tensor | None = None  # [L, B, Hq, D], kept for the next step to observe
    asked: Asked | None = None


class Buffers:
    """Memory for steps of one token for each request, where recorded CUDA graphs read them.

    Parameters
    ----------
    tables : :class:`Tables`
        For the most requests, and the most blocks of each.
    layers_of : callable
        Gives the :class:`Layer` views of some tables.
    queries : ``[L, B, Hq, D]``
        For the new queries of each layer, which the next step observes.
    """

    def __init__(
        self, tables: Tables, layers_of: Callable[[Tables], list[Layer]], queries: Tensor
    ) -> None:
        self.queries = queries
        self._tables, self._layers_of = tables, layers_of
        self._num_new = tables.seen.new_zeros(tables.seen.shape[1])
        largest = PlannedStep.plan(layers_of(tables), tables.plan_inputs)
        self._schedules = torch.stack(list(largest.schedules))
        self._layers: dict[int, list[Layer]] = {}  # by the number of requests

    def plan(self, tables: Tables, num_new: Tensor) -> PlannedStep:
        """Copies a step's tables to here, and plans it."""
        size = len(num_new)
        ours, counts = Tables(*(table[:, :size] for table in self._tables)), self._num_new[:size]
        for old, new in zip(ours, tables, strict=True):
            old[..., : new.shape[-1]] = new
        counts.copy_(num_new)
        if size not in self._layers:
            self._layers[size] = self._layers_of(ours)
        layers, inputs = self._layers[size], ours.plan_inputs
        return PlannedStep.plan(layers, inputs, num_new=counts, out=self._schedules)


class Run(NamedTuple):
    """Requests of a batch that have the same number of new tokens."""

    numbers: Sequence[int]  # of the batch's rows
    rows: slice | Tensor  # the same, to index with
    tokens: slice | Tensor  # of the step
    new_tokens: int


def equal_runs(batch: Batch, without: Container[int] = ()) -> Iterator[Run]:
    """Requests with the same number of new tokens, together."""
    by_count: dict[int, list[int]] = {}
    for row, (begin, end) in enumerate(pairwise(batch.query_start)):
        if end > begin and row not in without:
            by_count.setdefault(end - begin, []).append(row)
    device = batch.block_table.device
    for count, rows in by_count.items():
        first, last = rows[0], rows[-1]
        if last - first + 1 == len(rows):
            begin = batch.query_start[first]
            tokens = slice(begin, begin + len(rows) * count)
            yield Run(rows, slice(first, last + 1), tokens, count)
        else:
            numbers = [batch.query_start[row] + i for row in rows for i in range(count)]
            yield Run(rows, sent(rows, device), sent(numbers, device), count)


def sent(values: list[Any], device: torch.device) -> Tensor:
    """Integers in a list, or in a list of lists, on a device; nothing waits for the device."""
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)
