"""A model's RoPE, from what vLLM made for it, for policies that foresee queries.

Looks at attributes only: imports nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Rotate = Callable[[Tensor, Tensor], Tensor]

#: Model types whose attention modules all turn their queries by their own ``rotary_emb``.
MODELS = {
    *("gemma2", "gpt_oss", "granite", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3"),
    "qwen3_moe",
}

#: Classes of rotary embeddings, and which of their attributes their frequencies are made of.
EMBEDDINGS = {
    "RotaryEmbedding": "base",
    "Llama3RotaryEmbedding": "base",
    "YaRNScalingRotaryEmbedding": "scaling_factor",
}


def rotation(attention: torch.nn.Module | None, model_type: str, device: torch.device) -> Rotate:
    """RoPE of an attention module without its scaling: turns ``[B, H, n, D]`` at positions ``[n]``
    or ``[B, n]``, which may be negative.

    Raises
    ------
    ValueError
        If the model isn't known to turn its queries by it, or with another kind of embedding.
    """
    embedding: Any = getattr(attention, "rotary_emb", None)
    kind = type(embedding).__name__
    if model_type not in MODELS or kind not in EMBEDDINGS:
        raise ValueError(
            f"adakv: the policy foresees queries, for which RoPE must be known; it is for "
            f"{', '.join(sorted(MODELS))} with {', '.join(EMBEDDINGS)}, not for {model_type} with "
            f"{kind}"
        )
    setting = getattr(embedding, EMBEDDINGS[kind])
    frequencies = embedding._compute_inv_freq(setting).to(device, torch.float32)
    width, by_halves = embedding.rotary_dim, embedding.is_neox_style

    def rotate(x: Tensor, positions: Tensor) -> Tensor:
        angles = positions[..., None, :, None] * frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        turning, rest = x[..., :width], x[..., width:]
        a, b = turning.chunk(2, -1) if by_halves else (turning[..., ::2], turning[..., 1::2])
        turned = a * cos - b * sin, b * cos + a * sin
        joined = torch.cat(turned, -1) if by_halves else torch.stack(turned, -1).flatten(-2)
        return torch.cat([joined, rest], -1)

    return rotate
