"""Folded against its definition, and numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch

import folded
from adakv import ops
from adakv.policy import Adaptive, Folded, LayerInputs, Policy, TopScore, WindowAttention, get
from cases import DTYPES, int32
from tolerance import assert_close


def test_folding_by_hand() -> None:
    """Keys less their mean are (2, 0), (1, 0), (-3, 0) and (0, 0) of which the first and the third
    stay: the second goes to the first with half of its mass, the last is like nobody."""
    keys = torch.tensor([[3.0, 5], [2, 5], [-2, 5], [1, 5]])[None, None]
    values = torch.tensor([[6.0, 0], [0, 3], [1, 1], [9, 9]])[None, None]
    masses = torch.tensor([0.4, 0.2, 0.3, 0.1])[None, None]
    kept = ops.Kept(int32([0, 2]), int32([0, 2]))
    merged, biases = Folded(cosine=0.7).fold(keys, values, masses, kept)
    assert biases is not None and biases.dtype == torch.float16
    assert torch.allclose(merged[0, 0, [0, 2]], torch.tensor([[4.0, 1.0], [1.0, 1.0]]))
    expected = torch.tensor([math.log(1.5), 0.0])
    assert torch.allclose(biases[0, 0, [0, 2]].float(), expected, atol=2e-4)


def test_an_opposite_key_is_not_folded() -> None:
    keys = torch.tensor([[1.0, 0], [-1, 0], [0, 2], [0, -2]])[None, None]
    values, masses = torch.randn(1, 1, 4, 2), torch.ones(1, 1, 4)
    kept = ops.Kept(int32([0, 2]), int32([0, 2]))
    merged, biases = Folded().fold(keys, values, masses, kept)
    assert torch.equal(merged[..., [0, 2], :], values[..., [0, 2], :])
    assert biases is not None and not biases[..., [0, 2]].any()
    _, biases = Folded(cosine=-1).fold(keys, values, masses, kept)
    assert biases is not None and biases[..., [0, 2]].float().exp().sum().item() == pytest.approx(
        4, abs=0.01
    )


def test_what_got_more_attention_is_not_folded_into_what_got_less() -> None:
    keys = torch.tensor([[1.0, 0], [2, 0], [-3, 0]])[None, None]
    values, masses = torch.randn(1, 1, 3, 2), torch.tensor([0.2, 0.3, 0.5])[None, None]
    merged, biases = Folded().fold(keys, values, masses, ops.Kept(int32([0]), int32([0, 1])))
    assert biases is not None and not biases[..., 0].any()
    assert torch.equal(merged[..., 0, :], values[..., 0, :])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cosine", [0.7, 0.1, -1.0])
def test_folding_equals_definition(cosine: float, dtype: torch.dtype, device: torch.device) -> None:
    batch, heads, length, dim = 2, 3, 60, 8
    keys = (torch.randn(batch, heads, length, dim) + 3).to(device, dtype)
    values = torch.randn(batch, heads, length, dim).to(device, dtype)
    masses = torch.softmax(3 * torch.randn(batch, heads, length), -1).to(device)
    masses[:, :, :4] = 0
    masses[:, 0, 5] = 0
    rows = [
        torch.randperm(length)[: int(torch.randint(1, 30, ()))].sort().values.tolist()
        for _ in range(batch * heads)
    ]
    rows[2] = [1, 2]  # none of which has a mass
    rows[3] = []
    ends = torch.tensor([0, *map(len, rows)]).cumsum(0).int().to(device)
    flat = [p for row in rows for p in row]
    kept = ops.Kept(int32([*flat, -1, -1], device), ends)
    merged, biases = Folded(cosine=cosine).fold(keys, values, masses, kept)
    assert biases is not None
    for r, row in enumerate(rows):
        if not row:
            continue
        at = r // heads, r % heads
        parts = [x[at].cpu() for x in (keys, values, masses)]
        new, bias = folded.fold(*parts, row, cosine)
        assert_close(merged[at][row], new, new.to(dtype), "values")
        assert_close(biases[at][row], bias, bias.half(), "biases")


def test_values_alone_have_no_biases() -> None:
    keys, values, masses = torch.randn(1, 1, 9, 8), torch.randn(1, 1, 9, 8), torch.rand(1, 1, 9)
    kept = ops.Kept(int32([0, 5]), int32([0, 2]))
    merged, biases = Folded(-1.0, biases=False).fold(keys, values, masses, kept)
    with_biases, _ = Folded(-1.0).fold(keys, values, masses, kept)
    assert biases is None and torch.equal(merged, with_biases)


def test_masses_are_the_attention_of_the_newest_queries(device: torch.device) -> None:
    queries, keys = torch.randn(2, 4, 5, 8, device=device), torch.randn(2, 2, 20, 8, device=device)
    inputs = LayerInputs(queries, keys, keys, None, (20, 20), 0, 1)
    masses = Folded(window=5).masses(inputs)
    z = queries.double() @ keys.double().repeat_interleave(2, 1).mT / 8**0.5
    mask = torch.ones(5, 20, dtype=torch.bool, device=device).triu(16)
    p = z.masked_fill(mask, -torch.inf).softmax(-1).unflatten(1, (2, 2)).mean(2)  # [B, Hkv, W, T]
    counts = (~mask).sum(0)  # queries that see an entry
    assert torch.allclose(masses.double(), p.sum(2) / counts, atol=1e-6)


def test_a_policy_says_that_it_folds() -> None:
    text = "WindowAttention() * Adaptive() * TopScore() * Folded(cosine=0.8)"
    policy = Policy(WindowAttention(), Adaptive(), TopScore(), fold=Folded(0.8))
    assert get(text) == policy and str(policy) == text
    assert policy.has_biases and not get("ada_snapkv").has_biases
    early = "WindowAttention() * Adaptive() * TopScore() * Folded() * EveryTokens(every=9)"
    assert str(get(early)) == (
        "WindowAttention() * Adaptive() * TopScore() * EveryTokens(every=9) * Folded()"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cosine": 1.5}, r"cosine must be in \[-1, 1\], got 1.5"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"biases": 3}, "biases must be True or False, got 3"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Folded(**settings)  # type: ignore[arg-type]
