"""What attend accumulates: a part of ``reference.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import reference


def accumulate(
    queries: Tensor,
    layer: Any,
    before: Tensor,
    *,
    how: str = "sum",
    group_reduce: str = "mean",
    decay: float = 1.0,
    threshold: float = 0.0,
    num_new: Tensor | None = None,
    sink_logits: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    appends: bool = False,
    lse: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``[B, Hkv, T]``: what each slot was given ``before``, joined by what the newest S tokens give
    (appended already), one after another; their own slots begin at 0.

    A token gives a slot the probabilities of the q heads of its group, as one. ``"sum"``: added to
    what decays from token to token. ``"max"``: the largest. ``"last"``: the number of the last
    token, from 1, that gave ``threshold`` or more; without a threshold 1 / its number. ``lse`` is
    that of :func:`reference.attend` for the same arguments, which is called where none is given.
    """
    options = {"sink_logits": sink_logits, "scale": scale, "softcap": softcap}
    if lse is None:
        _, lse = reference.attend(
            queries, layer, num_new=num_new, appends=appends, dtype=dtype, **options
        )
    batch, num_heads, columns, head_dim = queries.shape
    num_kv_heads = layer.lengths.shape[1]
    group = num_heads // num_kv_heads
    after = before.detach().cpu().to(dtype, copy=True)
    counts = [columns] * batch if num_new is None else num_new.tolist()
    for b, h in torch.cartesian_prod(torch.arange(batch), torch.arange(num_kv_heads)).tolist():
        length, count = int(layer.lengths[b, h]), counts[b]
        just_filled = appends and columns == count == 1
        keys, _ = reference.row_of(layer, b, h, dtype, just_filled=just_filled)
        slots = after[b, h]
        slots[max(length - count, 0) : length] = 0
        for s in range(columns - count, columns):
            seen = length - columns + s + 1
            heads = slice(h * group, h * group + group)
            z = queries[b, heads, s].cpu().to(dtype) @ keys[:seen].T * (scale or head_dim**-0.5)
            z = softcap * torch.tanh(z / softcap) if softcap else z
            p = (z - lse[b, heads, s, None]).exp()  # [G, seen]
            given = {"mean": p.mean, "max": p.amax, "sum": p.sum}[group_reduce](0)
            number = int(layer.seen[b]) - (columns - 1 - s)
            if how == "sum":
                slots[:length] *= decay
                slots[:seen] += given
            elif how == "max":
                slots[:seen] = slots[:seen].maximum(given)
            else:
                slots[:seen][given >= (threshold or 1 / number)] = number
    return after
