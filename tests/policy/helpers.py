"""Inputs for policies, and what they kept as plain lists."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from adakv.policy import Kept, LayerInputs, Policy
from adakv.step import Attention
from cases import Prompt

NAN = float("nan")


def layer_inputs(
    prompt: Prompt,
    device: torch.device,
    *,
    layer: int = 1,
    num_layers: int = 4,
    all_queries: bool = False,
) -> LayerInputs:
    """Random inputs of a layer, with the queries of the window or of all positions."""
    queries = prompt.queries(device)
    if all_queries:
        many = replace(prompt, kv_heads=prompt.kv_heads * prompt.group)
        queries = many.entries(device)
    return LayerInputs(
        queries=queries,
        keys=prompt.entries(device),
        values=prompt.entries(device),
        w_o=prompt.w_o(device),
        prompt_lens=prompt.seq_lens or (prompt.length,) * prompt.batch,
        layer=layer,
        num_layers=num_layers,
        seq_lens=prompt.lengths(device),
        attention=Attention(rotate=rotate),
    )


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """RoPE as Llama has it, but faster: pair i turns by ``1 / (i + 1)`` a position."""
    half = x.shape[-1] // 2
    frequencies = 1 / torch.arange(1, half + 1, device=x.device)
    angles = (positions[..., None] * frequencies).view(-1, 1, positions.shape[-1], half)
    a, b, cos, sin = x[..., :half], x[..., half:], angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def model_inputs(
    policy: Policy, prompt: Prompt, device: torch.device, num_layers: int = 4
) -> list[LayerInputs]:
    """Random inputs of all layers, with the queries that a policy asks for. Every 16th token and
    the first ones are text, the others are of an image."""
    prompt = replace(prompt, window=policy.window)
    more = replace(prompt, length=50, window=50, seq_lens=None)  # tokens that repeat the prompt
    position = torch.arange(prompt.length, device=device)
    is_image = (position > 3) & (position % 16 > 0)
    return [
        replace(
            layer_inputs(
                prompt,
                device,
                layer=layer,
                num_layers=num_layers,
                all_queries="all_queries" in policy.needs,
            ),
            repeat=(more.queries(device), more.entries(device)),
            classes=is_image.to(torch.uint8).repeat(prompt.batch, 1),
        )
        for layer in range(num_layers)
    ]


def bare_inputs(scores: Tensor, **options: Any) -> LayerInputs:
    """Inputs for scores ``[B, Hkv, T]`` from outside; nothing else is of interest."""
    batch, heads, length = scores.shape
    empty = torch.zeros(batch, heads, length, 16, device=scores.device)
    options = {
        "queries": empty[:, :, :1],
        "keys": empty,
        "values": empty,
        "w_o": None,
        "prompt_lens": (length,) * batch,
        "layer": 0,
        "num_layers": 1,
        **options,
    }
    return LayerInputs(**options)


def with_window(candidates: list[list[float]], window: int, device: torch.device) -> Tensor:
    """Scores ``[1, Hkv, n + window]``; NaN in the window, which nobody may read."""
    rows = [row + [NAN] * window for row in candidates]
    return torch.tensor([rows], dtype=torch.float32, device=device)


def kept_rows(kept: Kept, num_kv_heads: int) -> list[list[list[int]]]:
    """Positions that each sequence and kv head keeps."""
    positions, indptr = kept.positions.tolist(), kept.indptr.tolist()
    rows = [positions[a:b] for a, b in pairwise(indptr)]
    return [rows[b : b + num_kv_heads] for b in range(0, len(rows), num_kv_heads)]
