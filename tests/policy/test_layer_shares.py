"""Layers whose shares follow from how their scores are spread: worked examples, and sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from adakv.policy import (
    Allocator,
    LargestValue,
    LayerEntropy,
    LayerInputs,
    Policy,
    StrengthSkew,
    TopScore,
    WindowAttention,
    get,
)
from adakv.step import Attention
from cases import Prompt, random_scores
from policy.helpers import bare_inputs, kept_rows, layer_inputs, model_inputs, with_window

INF = float("inf")
EVEN, HALF = [0.25] * 4, [0.5, 0.5, 0.0, 0.0]  # normalised entropies 1 and 1/2
# 5.25 of 6 bits: sixteen entries of 1/32 and of 1/64, eight of 1/32, and nothing for 24 others
DYADIC = [1 / 32] * 16 + [1 / 64] * 16 + [1 / 32] * 8 + [0.0] * 24


def counts(
    layers: list[list[list[float]]], b: int, device: torch.device, allocator: Allocator
) -> list[list[int]]:
    """Candidates that the heads of each layer keep, from scores ``[L][Hkv][n]``."""
    scores = [with_window(layer, 1, device) for layer in layers]
    inputs = [bare_inputs(s, layer=i, num_layers=len(layers)) for i, s in enumerate(scores)]
    policy = Policy(WindowAttention(window=1), allocator, TopScore())
    kept = policy.choose_all(inputs, b + 1, scores=scores)
    return [[len(row) - 1 for row in kept_rows(k, len(layers[0]))[0]] for k in kept]


# --- LAVa, arXiv 2509.09754 -----------------------------------------------------------------------


def test_lava_scores_are_attention_times_the_largest_value(device):
    """Means over two rows: .3 .1 .05 .1 and .1 .4 .05 .05; the largest |v|_1 is 3."""
    p = torch.tensor(
        [
            [[0.40, 0.10, 0.05, 0.05], [0.20, 0.10, 0.05, 0.15]],
            [[0.10, 0.30, 0.05, 0.05], [0.10, 0.50, 0.05, 0.05]],
        ],
        device=device,
    )
    missing = 1 - p.sum(-1, keepdim=True)
    seen = torch.cat([p, missing, torch.full_like(missing, 1e-30)], 2)
    queries = torch.zeros(1, 2, 2, 16, device=device)
    queries[0, :, :, :6] = seen.log()
    keys = torch.eye(6, 16, device=device)[None, None]
    values = torch.zeros_like(keys)
    values[0, 0, :, :2] = torch.tensor([[1, -2], [0, 1], [3, 0], [1, 1], [9, 9], [9, 9]])
    inputs = LayerInputs(queries, keys, values, None, (6,), 0, 1, attention=Attention(1.0))
    scores = LargestValue(window=2, pool_width=3).score(inputs)[0, 0, :4]
    torch.testing.assert_close(scores.cpu(), torch.tensor([1.2, 1.2, 1.2, 0.3]))
    entropy = LayerEntropy().weights(scores[None, None])
    assert round(float(entropy), 6) == 0.927143


def test_lava_weighs_heads_by_their_own_largest_value(device):
    inputs = layer_inputs(Prompt(batch=2, kv_heads=2, group=2, length=60, window=8), device)
    sizes = inputs.values.float().abs().sum(-1)[..., :52].amax(-1, keepdim=True)
    attention = WindowAttention(window=8, group_reduce="max", pinned=2).score(inputs)
    scores = LargestValue(window=8, pinned=2).score(inputs)[..., :52]
    torch.testing.assert_close(scores, attention[..., :52] * sizes)
    assert scores[..., :2].isposinf().all()


@pytest.mark.parametrize(
    ("layers", "b", "expected"),
    [
        ([[DYADIC], [[1 / 64] * 64]], 32, [[30], [34]]),  # 29.87 and 34.13 of 64
        ([[HALF], [EVEN]], 1, [[1], [1]]),  # .67 and 1.33 of 2
        ([[HALF], [EVEN]], 2, [[1], [3]]),  # 1.33 and 2.67 of 4
        ([[HALF], [EVEN]], 3, [[2], [4]]),  # 2 and 4 of 6
        ([[[1.0, 0, 0, 0]], [EVEN]], 2, [[0], [4]]),  # no entropy at all
        ([[[1.0, 0, 0, 0]], [EVEN]], 3, [[2], [4]]),  # what the other layer can't use
        ([[[0.0] * 4], [[0.0] * 4]], 3, [[3], [3]]),
    ],
)
def test_layers_get_entries_in_proportion_to_their_entropy(device, layers, b, expected):
    assert counts(layers, b, device, LayerEntropy(floor=0)) == expected


def test_heads_of_a_layer_share_by_score(device):
    """2 of 8 bits are missing: entropies 2/3 and 1, so that 8 entries go 3.2 and 4.8."""
    layers = [[EVEN, [0.0] * 4], [EVEN, EVEN]]
    assert counts(layers, 2, device, LayerEntropy(floor=0)) == [[3, 0], [3, 2]]


def test_a_floor_is_shared_evenly_by_all_heads(device):
    """Half of [1, 0], [4, 3], and half of 2 each: 1.5, 1, 3, 2.5; the half goes to the first."""
    layers = [[[1.0, 0, 0, 0], [0.0] * 4], [EVEN, [0.2] * 4]]
    assert counts(layers, 2, device, LayerEntropy(floor=0)) == [[0, 0], [4, 4]]
    assert counts(layers, 2, device, LayerEntropy(floor=1)) == [[2, 2], [2, 2]]
    assert counts(layers, 2, device, LayerEntropy(floor=0.5)) == [[1, 1], [3, 3]]


def test_entropy_is_that_of_what_competes(device):
    """Pinned entries stay beside the layers' shares: two are left for .5 to 1."""
    layers = [[[INF, 0.5, 0.5, 0, 0]], [[INF, *EVEN]]]
    assert counts(layers, 4, device, LayerEntropy(floor=0)) == [[3], [5]]
    everywhere = [[[INF, INF, 0.1, 0.1]], [[0.1, 0.1, 0.1, 0.1]]]
    assert counts(everywhere, 2, device, LayerEntropy(floor=0)) == [[3], [1]]


def apportioned(weights: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Webster's method, one by one; the definition."""
    given = [0] * len(weights)
    for _ in range(min(total, sum(sizes))):
        open_ = [i for i, n in enumerate(given) if n < sizes[i]]
        best = max(open_, key=lambda i: weights[i] / (given[i] + 0.5))
        given[best] += 1
    return given


def normalised_entropy(scores: Tensor) -> float:
    p = scores.double().flatten() / scores.double().sum()
    return float(-(p * (p + 1e-300).log()).sum()) / math.log(p.numel())


def test_budgets_made_anew_after_every_layer_keep_the_same(device):
    """LAVa's cascade: each layer has its part of the whole, and shrinks with each that comes."""
    num_layers, heads, n, window, b = 6, 2, 40, 4, 9
    scores = [
        random_scores(1, heads, n + window).to(device) ** power  # of very different entropies
        for power in (3, 1, 5, 0.5, 4, 2)
    ]
    candidates = [s[0, :, :n] for s in scores]
    weights = [normalised_entropy(c) for c in candidates]
    held: list[list[int]] = []
    for layer in range(num_layers):
        best = candidates[layer].T.flatten().sort(descending=True, stable=True).indices
        held.append(best.tolist())
        sizes, total = [n * heads] * (layer + 1), num_layers * heads * b
        now = apportioned(weights[: layer + 1], sizes, total)
        assert all(count <= len(entries) for count, entries in zip(now, held, strict=True))
        held = [entries[:count] for count, entries in zip(now, held, strict=True)]
    inputs = [bare_inputs(s, layer=i, num_layers=num_layers) for i, s in enumerate(scores)]
    policy = Policy(WindowAttention(window=window), LayerEntropy(floor=0), TopScore())
    kept = policy.choose_all(inputs, b + window, scores=scores)
    for rows, entries in zip(kept, held, strict=True):
        expected = [sorted(i // heads for i in entries if i % heads == h) for h in range(heads)]
        assert [row[:-window] for row in kept_rows(rows, heads)[0]] == expected


def test_equal_scores_pinned_entries_and_prompts_of_unequal_length(device):
    """Each prompt as by dealing one by one: equal scores go by position, then by head."""
    num_layers, heads, window, pinned = 4, 2, 3, 2
    lengths, budgets = (40, 29), (15, 11)
    levels = torch.tensor([0.0, 0.1, 0.1, 0.4, 0.8])
    scores = [
        levels[torch.randint(len(levels), (2, heads, 40))] ** (2 * i) for i in range(num_layers)
    ]
    for of_layer in scores:
        of_layer[:, :, :pinned] = INF
    joined = torch.cat(scores, 1).to(device)
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    inputs = bare_inputs(
        scores[0].to(device), num_layers=num_layers, prompt_lens=lengths, seq_lens=lens
    )
    found = LayerEntropy(floor=0).allocate(joined, inputs, budgets, window=window)
    for b, (length, budget) in enumerate(zip(lengths, budgets, strict=True)):
        candidates = [of_layer[b, :, pinned : length - window] for of_layer in scores]
        weights = [normalised_entropy(c) for c in candidates]
        total = num_layers * heads * (budget - window - pinned)
        given = apportioned(weights, [c.numel() for c in candidates], total)
        expected = []
        for c, count in zip(candidates, given, strict=True):
            best = c.T.flatten().sort(descending=True, stable=True).indices[:count]
            of_heads = torch.bincount(best % heads, minlength=heads)
            expected += [pinned + window + n for n in of_heads.tolist()]
        assert found[b].tolist() == expected


@pytest.mark.parametrize("name", ["lava", "critical_lava"])
def test_lava_spends_its_budget_to_the_entry(device, name):
    """And in a batch every prompt has shares of its own."""
    prompt = Prompt(batch=2, kv_heads=2, group=2, length=150, seq_lens=(150, 97), head_dim=16)
    layers = [
        replace(x, queries=x.queries[:, :, :1].expand_as(x.queries) * 2**i)  # later: sharper
        for i, x in enumerate(model_inputs(get(name), prompt, device))
    ]
    kept = get(name).choose_all(layers, 50)
    shares = [[len(r) for b in kept_rows(k, 2) for r in b] for k in kept]  # [L][B * Hkv]
    assert [sum(s[2 * b] + s[2 * b + 1] for s in shares) for b in range(2)] == [400, 400]
    assert all(sum(a) >= sum(b) for a, b in pairwise(shares))
    assert sum(shares[0]) > sum(shares[3])


# --- AirCache, arXiv 2503.23956 -------------------------------------------------------------------

SKEWED, EVENER = [0.30, 0.05, 0.03, 0.02], [0.06, 0.05, 0.05, 0.04]
# Sums .4 and .2; skewness 1.948742 and 0: of their means 4/3, 2/3 and 2, 0.


def test_strength_and_skewness_of_layers(device):
    rows = torch.tensor([[SKEWED, EVENER]], device=device)
    weights = StrengthSkew().weights(rows) * 0.10
    torch.testing.assert_close(weights.cpu(), torch.tensor([[1 / 6, 1 / 30]]).double())
    pinned = torch.tensor([[[INF, *SKEWED, -INF], [*EVENER, -INF, -INF]]], device=device)
    torch.testing.assert_close(StrengthSkew().weights(pinned) * 0.10, weights)
    lopsided = torch.tensor([[SKEWED, [0.05, 0.05, 0.05, 0.0]]], device=device)  # to the left
    expected = (torch.tensor([0.4, 0.15]) / 0.275 + torch.tensor([2.0, 0.0])) / 2
    torch.testing.assert_close(StrengthSkew().weights(lopsided)[0].cpu(), expected.double())
    even = torch.tensor([[[0.1, 0.1], [0.3, 0.3]]], device=device)  # too few to be skewed
    torch.testing.assert_close(
        StrengthSkew().weights(even).cpu(), torch.tensor([[0.75, 1.25]]).double()
    )


@pytest.mark.parametrize(("b", "expected"), [(1, [2, 0]), (2, [3, 1]), (3, [4, 2]), (4, [4, 4])])
def test_layers_get_entries_by_strength_and_skewness(device, b, expected):
    """5/6 and 1/6: 1.67 of 2, 3.33 of 4, 5 of 6, of which there are 4."""
    assert counts([[SKEWED], [EVENER]], b, device, StrengthSkew()) == [[x] for x in expected]


def test_heads_of_a_layer_keep_as_much(device):
    assert counts([[SKEWED] * 2, [EVENER] * 2], 2, device, StrengthSkew()) == [[3, 3], [1, 1]]
    layers = [[SKEWED, SKEWED[::-1]], [EVENER, EVENER]]  # means .16, .04, .04, .16: not skewed
    assert counts(layers, 2, device, StrengthSkew()) == [[2, 2], [2, 2]]  # 2.33 and 1.67
    layers = [[SKEWED, EVENER]]
    assert counts(layers, 2, device, StrengthSkew()) == [[2, 2]]
    assert counts(layers, 2, device, StrengthSkew(of_heads=True)) == [[3, 1]]


def test_layer_entropy_settings_are_checked():
    with pytest.raises(ValueError, match=r"floor must be in \[0, 1\], got 1.5"):
        LayerEntropy(floor=1.5)
