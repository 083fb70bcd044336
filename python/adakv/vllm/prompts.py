"""Prompts of an engine's requests while they are read; without a line of vLLM."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from adakv.policy import Budget, TokenClasses
from adakv.policy.inputs import CLASSES
from adakv.reading import Reader
from adakv.step import Attention
from adakv.vllm.later import Later
from adakv.vllm.pages import Pages, spans_layers
from adakv.vllm.plan import Order, Plan, plan

#: New tokens of a prompt from which torch's attention is faster than ours, in bfloat16 on a CPU.
READ_BY_TORCH = 32


@dataclass
class Prompt:
    """A request that reads its prompt, or may still be compressed."""

    reader: Reader
    request: int
    first_blocks: Later  # of all that began in its first step
    place: int  # among them
    held: int = 0  # tokens that its rows hold, as long as it is whole
    has_ended: bool = False  # its prompt: it writes

    @property
    def first_block(self) -> int:
        """Its name, for the scheduler, too."""
        return int(self.first_blocks.tolist()[self.place])


@dataclass(frozen=True, kw_only=True)
class BlockBudget(Budget):
    """A budget for prompts that then give blocks back; whatever gives none back is kept whole."""

    block_size: int = 0
    num_kv_heads: int = 0

    def changed(self, order: Order) -> BlockBudget:
        """That of one request."""
        return replace(self, entries=order.budget or self.entries)

    def plan(self, boundary: int) -> Plan | None:
        """The blocks of a request whose prompt has so many tokens."""
        assert self.entries is not None
        return plan(
            boundary,
            budget=self.entries,
            block_size=self.block_size,
            num_kv_heads=None if spans_layers(self.policy) else self.num_kv_heads,
        )

    def of(self, prompt_len: int) -> int:
        return prompt_len if self.plan(prompt_len) is None else super().of(prompt_len)


def entries_of(
    pages: Pages, page_ids: Tensor, length: int, tail: Tensor | None = None, held: int = 0
) -> tuple[Tensor, Tensor]:
    """Keys and values ``[1, Hkv, length, D]`` in pages ``[Hkv, blocks]``, copied. Of int4 the rows
    hold ``held`` entries, the last ones in their ``tail`` ``[1, Hkv, 2 P, D]``."""
    if pages.key_scales is None:
        found = [pages.entries[:, i][page_ids] for i in (0, 1)]
    else:
        found = list(pages.read(page_ids.flatten()).unflatten(0, page_ids.shape).unbind(2))
    keys, values = (x.flatten(1, 2)[None, :, :length] for x in found)
    if tail is not None:
        size = pages.page_size
        first = held // size * size
        count = min(held, length) - first
        for x, half in zip((keys, values), tail.split(size, 2), strict=True):
            x[:, :, first:length] = half[:, :, : max(count, 0)]
    return keys, values


def classes_of(order: Order) -> TokenClasses:
    """What the tokens of a request are of; those of one that says nothing are text."""
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in CLASSES[1:]}
    for begin, end, number in order.classes:
        spans[CLASSES[number]].append((begin, end))
    return TokenClasses.given(spans)


def is_plain(attention: Attention) -> bool:
    """Whether it has nothing but a scale."""
    return attention.softcap is None and attention.sink_logits is None


def read_by_torch(
    pages: Pages,
    page_ids: Tensor,
    length: int,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attention: Attention,
) -> Tensor:
    """Appends the last of a prompt's ``length`` tokens, and attends by torch's own kernel.

    In bfloat16 that is two to three times as fast as ours on a CPU, though it wants keys and
    values side by side. ``queries`` and the result are ``[n, Hq, D]``, ``keys`` and ``values``
    ``[n, Hkv, D]``.
    """
    page_size, past = pages.page_size, length - len(keys)
    new = torch.arange(past, length)
    into, slots = page_ids[:, new // page_size], new % page_size
    for i, x in enumerate((keys, values)):
        pages.entries[into, i, slots] = x.transpose(0, 1)
    all_keys, all_values = entries_of(pages, page_ids, length)
    mask = torch.ones(len(new), length, dtype=torch.bool).tril(past) if past else None
    result = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        all_keys,
        all_values,
        attn_mask=mask,
        is_causal=mask is None,
        scale=attention.scale,
        enable_gqa=True,
    )
    return result[0].transpose(0, 1)
