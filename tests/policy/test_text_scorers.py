"""Scorers made for texts: worked examples, computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from adakv.policy import AhaKV, LayerInputs
from adakv.step import Attention

FAR = -1000.0  # a logit of which nothing is left


def text_inputs(
    logits: list[list[float]],
    device: torch.device,
    *,
    seen: int | None = None,
    values: Tensor | None = None,
    head_dim: int = 64,
    **options: Any,
) -> LayerInputs:
    """One kv head and q head, whose window row w has the products ``logits[w]`` with the keys.

    With ``seen`` it is a text of so many tokens, of which the first entries and the last are held.
    """
    products = torch.tensor(logits, device=device)  # [W, T]
    window, length = products.shape
    queries = torch.eye(window, head_dim, device=device)[None, None]
    keys = torch.zeros(1, 1, length, head_dim, device=device)
    keys[0, 0, :, :window] = products.T
    if seen is not None:
        positions = torch.arange(length, dtype=torch.int32, device=device)
        positions[-1] = seen - 1
        lens = torch.full((1, 1), length, dtype=torch.int32, device=device)
        options |= {"positions": positions[None, None], "seq_lens": lens}
    if values is None:
        values = keys
    return LayerInputs(queries, keys, values.to(device), None, (length,), 0, 1, **options)


def test_ahakv_widens_the_softmax_and_weighs_by_values(device):
    """Of 64 tokens 16 stay: gain .208139; squared norms 25 1 4 1, their means of three, with zeros
    beyond the ends, over the largest: .866667 1 .2 .166667."""
    values = torch.zeros(1, 1, 5, 64)
    values[0, 0, :, :2] = torch.tensor([[3.0, 4], [1, 0], [0, 2], [0, 1], [9, 9]])
    options: dict[str, Any] = {"values": values, "seen": 64, "budgets": (16,)}
    inputs = text_inputs([[8, 4, 0, -4, FAR]], device, **options)
    scores = AhaKV(window=1, pool_width=3).score(inputs)[0, 0, :4].cpu()
    attention = torch.tensor([0.586035, 0.254888, 0.110860, 0.048217])
    prior = torch.tensor([0.866667, 1, 0.2, 0.166667])
    torch.testing.assert_close(scores, attention * prior, atol=1e-6, rtol=2e-5)
    scaled = text_inputs([[8, 4, 0, -4, FAR]], device, attention=Attention(0.5), **options)
    of_scaled = AhaKV(window=1, pool_width=3).score(scaled)[0, 0, :4].cpu()
    torch.testing.assert_close(of_scaled, scores, atol=1e-6, rtol=2e-5)


def test_ahakv_looks_at_all_alike_where_everything_stays(device):
    values = torch.ones(1, 1, 5, 64)
    options: dict[str, Any] = {"values": values, "budgets": (16,)}
    inputs = text_inputs([[8, 4, 0, -4, 3]], device, **options)
    scores = AhaKV(window=1, pool_width=1).score(inputs)[0, 0, :4].cpu()
    torch.testing.assert_close(scores, torch.full((4,), 0.2))


def test_ahakv_must_know_how_many_stay(device):
    inputs = text_inputs([[8, 4, 0, -4, FAR]], device)
    with pytest.raises(ValueError, match="budgets must be given to a policy that needs them"):
        AhaKV(window=1).score(inputs)


def test_ahakv_of_a_prompt_counts_its_tokens(device):
    inputs = text_inputs([[8, 4, 0, -4, FAR]], device, budgets=(2,), values=torch.ones(1, 1, 5, 64))
    gain = math.sqrt(2 * math.log(5 / 2) / 64)
    expected = (torch.tensor([8.0, 4, 0, -4]) * gain).softmax(0)
    scores = AhaKV(window=1, pool_width=1).score(inputs)[0, 0, :4].cpu()
    torch.testing.assert_close(scores, expected)
