"""Rows of a prompt's attention in plain torch, for scorers that ``ops.score`` can't express."""

from __future__ import annotations

import torch
from torch import Tensor

from adakv.policy.inputs import LayerInputs


def attention(inputs: LayerInputs, rows: slice, length: int | None = None) -> Tensor:
    """What some of a prompt's queries attend to, softmax in float32.

    Parameters
    ----------
    inputs : :class:`LayerInputs`
    rows : slice
        Of ``inputs.queries``, R of them.
    length : int, optional
        Entries to look at, if the rows see none behind them. Default: T.

    Returns
    -------
    p : ``[B, Hkv, G, R, length]`` float32
        0 behind a query's own position and in rows of padding.
    """
    keys = inputs.keys[:, :, :length].float()
    queries = inputs.queries[:, :, rows].float()
    batch, heads, length, head_dim = keys.shape
    shape = (batch, heads, queries.shape[1] // heads, queries.shape[2], length)
    grouped = queries.reshape(batch, heads, shape[2] * shape[3], head_dim)
    z = (grouped @ keys.mT).view(shape) * (inputs.attention.scale or head_dim**-0.5)
    if softcap := inputs.attention.softcap:
        z = softcap * torch.tanh(z / softcap)
    # [B or 1, Hkv or 1, 1, R, 1]
    positions = query_positions(inputs)[:, :, None, rows, None]
    seen = torch.arange(length, device=keys.device) <= positions
    z = z.masked_fill(~seen, -torch.inf)
    if inputs.attention.sink_logits is not None:
        sinks = inputs.attention.sink_logits.view(1, *shape[1:3], 1, 1).expand(*shape[:4], 1)
        z = torch.cat([z, sinks], -1)
    is_token = positions < inputs.ends[:, :, None, None, None]
    p = z.softmax(-1)[..., :length]
    return p.masked_fill(~(seen & is_token), 0)


def query_positions(inputs: LayerInputs) -> Tensor:
    """``[B or 1, Hkv or 1, R]``: behind which entries the queries stand, those of the window or all
    of them."""
    count = inputs.queries.shape[2]
    row = torch.arange(count, device=inputs.keys.device)
    if count == inputs.length:
        return row[None, None]
    return inputs.ends[:, :, None] - count + row
