"""A step of an engine: as the engine describes it, and as the layers need it."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from adakv.vllm.prompt_attention import Whole


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


class Group(NamedTuple):
    """Requests of a step that have the same number of new tokens, side by side."""

    tokens: slice | Tensor  # of the step
    new_tokens: int
    num_new: Tensor | None  # [B] int32
    lengths: Tensor  # [L, B, Hkv], before the step; then in each layer also the new tokens
    block_table: Tensor  # [L, B, Hkv, M]
    seen: Tensor  # [L, B]
    fresh_pages: Tensor  # [L, B, Hkv, F]
    schedule: Tensor  # [L, X]
    queries: Tensor | None = None  # [L, B, Hq, D], of buffers: kept for the next step to hear


class Reading(NamedTuple):
    """New tokens of a prompt."""

    request: int
    tokens: slice  # of the step
    length: int  # of the prompt as far as it is read then
    page_ids: Tensor  # [Hkv, blocks], where it lies
    is_long: bool  # enough to be compressed


@dataclass
class Step:
    """What the layers need of a step."""

    groups: list[Group] = field(default_factory=list)
    reading: dict[int, Reading] = field(default_factory=dict)  # by row of the batch
    read_by_torch: set[int] = field(default_factory=set)  # rows of these that are in no group
    whole: Whole | None = None  # more that are in no group: read by FlashAttention
    queries: Tensor | None = None  # [L, B, Hq, D], kept for the next step to hear


def copied(group: Group, buffers: Group) -> Group:
    """A group of one token for each request, in the first parts of the buffers."""
    num_requests, width = group.block_table.shape[1:4:2]
    into = Group(
        group.tokens,
        group.new_tokens,
        None if buffers.num_new is None else buffers.num_new[:num_requests],
        buffers.lengths[:, :num_requests],
        buffers.block_table[:, :num_requests],
        buffers.seen[:, :num_requests],
        buffers.fresh_pages[:, :num_requests],
        buffers.schedule[:, : group.schedule.shape[1]],
    )
    into.block_table[..., :width] = group.block_table
    for name in ("num_new", "lengths", "seen", "fresh_pages", "schedule"):
        getattr(into, name).copy_(getattr(group, name))
    return into


def equal_runs(
    batch: Batch, without: Container[int] = ()
) -> Iterator[tuple[slice | Tensor, slice | Tensor, int]]:
    """Requests with the same number of new tokens: rows, tokens, and that number."""
    by_count: dict[int, list[int]] = {}
    for row, (begin, end) in enumerate(pairwise(batch.query_start)):
        if end > begin and row not in without:
            by_count.setdefault(end - begin, []).append(row)
    device = batch.block_table.device
    for count, rows in by_count.items():
        first, last = rows[0], rows[-1]
        if last - first + 1 == len(rows):
            begin = batch.query_start[first]
            yield slice(first, last + 1), slice(begin, begin + len(rows) * count), count
        else:
            tokens = [batch.query_start[row] + i for row in rows for i in range(count)]
            yield sent(rows, device), sent(tokens, device), count


def sent(values: list[int], device: torch.device) -> Tensor:
    """A list on a device, without waiting for what the device does."""
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)
