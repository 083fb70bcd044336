"""torch's own attention over ragged heads: every (sequence, kv head) as a sequence of one head.

Its group of q heads are that sequence's queries, and nothing is causal. Pages are unknown to both:
keys and values are made dense beforehand, which is not timed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed(table: Tensor, lengths: Tensor, pool: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[sum of lengths, D]`` of a layer's rows, one after the other."""
    lengths = lengths.flatten()
    pages = -(-lengths // page_size)
    rows = table.flatten(0, 1)
    used = torch.arange(table.shape[-1], device=table.device) < pages[:, None]
    ids = torch.where(used, rows, 0)[:, : int(pages.max())].long()
    slots = torch.arange(ids.shape[1] * page_size, device=table.device) < lengths[:, None]
    both = pool[ids].transpose(1, 2).flatten(2, 3)  # [rows, 2, slots, D]
    return both[:, 0][slots], both[:, 1][slots]


class VarlenAttention:
    """``torch.nn.attention.varlen`` over packed rows. One layer."""

    def __init__(self, keys: Tensor, values: Tensor, lengths: Tensor, group: int) -> None:
        from torch.nn.attention.varlen import varlen_attn

        lengths = lengths.flatten().int()
        count = len(lengths)
        self.attend = varlen_attn
        self.keys, self.values = keys[:, None], values[:, None]
        self.ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        self.query_ends = torch.arange(count + 1, device=keys.device, dtype=torch.int32) * group
        self.group, self.longest = group, int(lengths.max())

    def run(self, queries: Tensor) -> Tensor:
        """``queries`` and the result are ``[B * Hkv, G, D]``."""
        out = self.attend(
            queries.flatten(0, 1)[:, None], self.keys, self.values, self.query_ends, self.ends,
            self.group, self.longest,
        )  # fmt: skip
        return out.view_as(queries)


class PaddedAttention:
    """``scaled_dot_product_attention`` over rows padded to the longest. One layer."""

    def __init__(self, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
        lengths = lengths.flatten()
        rows = [x.split(lengths.tolist()) for x in (keys, values)]
        self.keys, self.values = (
            torch.nn.utils.rnn.pad_sequence(x, batch_first=True)[:, None] for x in rows
        )
        longest = self.keys.shape[2]
        shown = torch.arange(longest, device=keys.device) < lengths[:, None]
        self.mask = shown[:, None, None].to(keys.dtype).log()  # 0 or -inf

    def run(self, queries: Tensor) -> Tensor:
        """``queries`` and the result are ``[B * Hkv, G, D]``."""
        out = torch.nn.functional.scaled_dot_product_attention(
            queries[:, None], self.keys, self.values, attn_mask=self.mask
        )
        return out[:, 0]
