"""Scorers of NVIDIA's kvpress in adakv: real memory for every score of that library."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from adakv.policy.base import Need
from adakv.policy.inputs import LayerInputs, check_scorer, pin_first


@dataclass(frozen=True)
class PressScorer:
    """Any ``ScorerPress`` of kvpress (https://github.com/NVIDIA/kvpress) as a scorer.

    ``press.score`` wants an attention module and its hidden states. It is handed a stand-in whose
    "hidden states" are the queries and whose projection is the identity, which is all that presses
    make of them. What they give to their window is not read; the last ``window`` entries are kept,
    64 for presses made for that.

    ``needs`` is what a press reads besides queries, keys and values: ``"w_o"`` (CriticalKVPress),
    ``"rotate"`` (ExpectedAttentionPress; RoPE by halves, as Llama's). Presses that want attention
    weights, unrotated keys or the model fail with an error of their own. The scale of the model's
    attention and its softcap are not known to presses.
    """

    press: Any
    window: int = 32
    pinned: int = 0
    needs: Collection[Need] = frozenset({"all_queries"})

    def __post_init__(self) -> None:
        check_scorer(self)
        if not callable(getattr(self.press, "score", None)):
            raise ValueError(
                f"press must have a method score, as kvpress' ScorerPress, got {self.press!r}"
            )
        if "all_queries" not in self.needs:
            raise ValueError(f"needs must hold 'all_queries', got {self.needs}")
        object.__setattr__(self, "needs", frozenset(self.needs))

    def score(self, inputs: LayerInputs) -> Tensor:
        inputs.check_all_queries()
        scores = torch.full(
            inputs.keys.shape[:3], -torch.inf, dtype=torch.float32, device=inputs.keys.device
        )
        for b, length in enumerate(inputs.prompt_lens):  # a press knows no padding
            module, hidden_states, embeddings = _stand_in(inputs, b, length)
            rows = self.press.score(
                module,
                hidden_states,
                inputs.keys[b : b + 1, :, :length],
                inputs.values[b : b + 1, :, :length],
                None,
                {"position_embeddings": embeddings},
            )
            scores[b, :, :length] = rows[0].float()
        return pin_first(scores, self.pinned)


def _stand_in(
    inputs: LayerInputs, b: int, length: int
) -> tuple[Any, Tensor, tuple[Tensor, Tensor]]:
    """A module, hidden states ``[1, n, Hq * D]``, and cosines and sines ``[1, n, D]``."""
    queries = inputs.queries[b : b + 1, :, :length]
    num_heads, head_dim = queries.shape[1], queries.shape[3]
    positions = torch.arange(length, device=queries.device)

    def embed(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return _cos_sin(inputs, position_ids, head_dim, x.dtype)

    if inputs.attention.rotate is not None:
        queries = inputs.attention.rotate(queries, -positions)
    config = SimpleNamespace(
        num_attention_heads=num_heads,
        num_key_value_heads=inputs.num_kv_heads,
        head_dim=head_dim,
        hidden_size=num_heads * head_dim if inputs.w_o is None else inputs.w_o.shape[0],
    )
    module = SimpleNamespace(
        config=config,
        head_dim=head_dim,
        num_key_value_groups=num_heads // inputs.num_kv_heads,
        layer_idx=inputs.layer,
        q_proj=lambda x: x,
        o_proj=SimpleNamespace(weight=inputs.w_o),
        rotary_emb=embed,
    )
    return module, queries.transpose(1, 2).flatten(2), embed(queries, positions[None])


def _cos_sin(
    inputs: LayerInputs, positions: Tensor, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``[1, n, D]`` each, as Llama's rotary embedding gives them; no rotation if none is known."""
    shape = (1, positions.shape[-1], head_dim)
    rotate = inputs.attention.rotate
    if rotate is None:
        return (
            torch.ones(shape, dtype=dtype, device=positions.device),
            torch.zeros(shape, dtype=dtype, device=positions.device),
        )
    half = torch.zeros((1, *shape), device=positions.device)
    half[..., : head_dim // 2] = 1  # turned, it holds the cosines and then the sines
    cos, sin = rotate(half, positions)[0].to(dtype).chunk(2, -1)
    return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
