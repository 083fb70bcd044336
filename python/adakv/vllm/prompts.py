"""Prompts of an engine's requests while they are read; without a line of vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from adakv.policy import Budget, Policy, TokenClasses
from adakv.policy.inputs import CLASSES
from adakv.reading import Reader
from adakv.step import Attention
from adakv.vllm.later import Later
from adakv.vllm.page_memory import Pages, entries_of
from adakv.vllm.pages import spans_layers
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


def classes_of(order: Order) -> TokenClasses:
    """What the tokens of a request are of; those of one that says nothing are text."""
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in CLASSES[1:]}
    for begin, end, number in order.classes:
        spans[CLASSES[number]].append((begin, end))
    return TokenClasses.given(spans)


def is_plain(attention: Attention) -> bool:
    """Whether it has nothing but a scale."""
    return attention.softcap is None and attention.sink_logits is None


def are_alike(policy: Policy, attentions: Sequence[Attention]) -> bool:
    """Whether a policy may choose from several layers of a prompt as from prompts of one: see
    :meth:`adakv.reading.Reader.finish_alike`."""
    first = attentions[0]._replace(w_o=None)
    return (
        not policy.needs
        and policy.fold is None
        and not spans_layers(policy)
        and first.sink_logits is None
        and all(attention._replace(w_o=None) == first for attention in attentions)
    )


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
