"""RoPE as vLLM's embeddings have it, turned by any position."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from adakv.vllm.rotation import rotation


class RotaryEmbedding:
    """As much of vLLM's as is looked at."""

    def __init__(self, rotary_dim: int, is_neox_style: bool) -> None:
        self.rotary_dim, self.is_neox_style, self.base = rotary_dim, is_neox_style, 100.0

    def _compute_inv_freq(self, base: float) -> Tensor:
        return base ** -(torch.arange(0, self.rotary_dim, 2) / self.rotary_dim)


def turn(embedding: Any, x: Tensor, positions: Tensor) -> Tensor:
    attention = SimpleNamespace(rotary_emb=embedding)
    return rotation(attention, "llama", torch.device("cpu"))(x, positions)


@pytest.mark.parametrize("by_halves", [True, False])
@pytest.mark.parametrize("width", [16, 8])
def test_rotation_turns_pairs(by_halves: bool, width: int):
    x, positions = torch.randn(2, 3, 5, 16), torch.randint(-900, 900, (2, 5))
    turned = turn(RotaryEmbedding(width, by_halves), x, positions)
    assert torch.equal(turned[..., width:], x[..., width:])
    for pair in range(width // 2):
        at = [pair, pair + width // 2] if by_halves else [2 * pair, 2 * pair + 1]
        angles = positions[:, None] * torch.tensor(100.0) ** (-2 * pair / width)
        expected = torch.view_as_complex(x[..., at].contiguous()) * torch.polar(
            torch.ones_like(angles), angles
        )
        found = torch.view_as_complex(turned[..., at].contiguous())
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    back = turn(RotaryEmbedding(width, by_halves), turned, -positions)
    torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "embedding"),
    [("cohere2", RotaryEmbedding(16, False)), ("llama", object()), ("llama", None)],
)
def test_rotation_is_refused_where_it_is_not_known(model_type: str, embedding: Any):
    with pytest.raises(ValueError, match=f"for gemma2, gpt_oss.*, not for {model_type} with"):
        rotation(SimpleNamespace(rotary_emb=embedding), model_type, torch.device("cpu"))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotation_is_that_of_vllm(rope: dict[str, Any]):
    pytest.importorskip("vllm.v1", reason="vllm isn't installed; make test-vllm runs these tests")
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    with set_current_vllm_config(VllmConfig()):
        embedding = get_rope(
            32, max_position=256, rope_parameters={"rope_theta": 500.0, **rope}, dtype=torch.float32
        )
    x, positions = torch.randn(20, 2, 32), torch.randint(0, 256, (20,))
    expected, _ = embedding.forward_native(positions, x.flatten(1).clone(), None)
    turned = turn(embedding, x.transpose(0, 1)[None], positions)[0].transpose(0, 1)
    scale = getattr(embedding, "mscale", 1.0)
    torch.testing.assert_close(turned * scale, expected.view(20, 2, 32), atol=1e-4, rtol=1e-4)
