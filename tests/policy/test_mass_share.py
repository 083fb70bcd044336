"""One share of mass for all layers: worked examples, and sums."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from adakv.policy import MassShare, Policy, PromptAttention, TopScore, get
from cases import Prompt
from policy.helpers import bare_inputs, kept_rows, layer_inputs, model_inputs, with_window

SHARP, EVEN, INF = [0.7, 0.2, 0.06, 0.04], [0.25] * 4, float("inf")


def counts(
    layers: list[list[list[float]]], b: int, device: torch.device, of_heads: bool = False
) -> list[list[int]]:
    """Candidates that the heads of each layer keep, from scores ``[L][Hkv][n]``."""
    scores = [with_window(layer, 1, device) for layer in layers]
    inputs = [bare_inputs(s, layer=i, num_layers=len(layers)) for i, s in enumerate(scores)]
    policy = Policy(PromptAttention(window=1), MassShare(of_heads), TopScore())
    kept = policy.choose_all(inputs, b + 1, scores=scores)
    return [[len(row) - 1 for row in kept_rows(k, len(layers[0]))[0]] for k in kept]


def test_prefixkv_keeps_one_share_of_mass_in_every_layer(device):
    """Share .70: one entry of the sharp layer has it, and three of four equal ones."""
    assert counts([[SHARP], [EVEN]], 2, device) == [[1], [3]]
    assert counts([[SHARP, SHARP], [EVEN, EVEN]], 2, device) == [[1, 1], [3, 3]]


@pytest.mark.parametrize(("b", "expected"), [(1, [1, 1]), (2, [1, 3]), (3, [2, 4])])
def test_prefixkv_spends_what_is_left_where_most_is_missed(device, b, expected):
    """Missed without a 2nd, 3rd, 4th entry: .3 .1 .04 of the sharp layer, .75 .5 .25 of the even
    one: after one each the order is E2 E3 S2 E4 S3 S4."""
    assert [rows[0] for rows in counts([[SHARP], [EVEN]], b, device)] == expected


def test_prefixkv_heads_take_their_shares_alone(device):
    assert counts([[SHARP, EVEN]], 2, device, of_heads=True) == [[1, 3]]
    assert counts([[SHARP, EVEN]], 2, device) == [[2, 2]]


def test_prefixkv_knows_no_mass_but_what_competes(device):
    """The first entries are pinned: missed without the others are 1 .33 .13 and 1 .5 .2."""
    layers = [[[INF, *SHARP[1:]]], [[INF, 0.5, 0.3, 0.2]]]
    assert counts(layers, 2, device) == [[2], [2]]
    layers[1] = [[INF, 0.1, 0.1, 0.1]]
    assert counts([*layers, *layers], 3, device) == [[2], [4]] * 2
    zeros = [[0.0] * 4]
    assert counts([zeros, zeros], 3, device) == [[3], [3]]


@pytest.mark.parametrize("name", ["prefixkv", "prefixkv_heads"])
def test_prefixkv_sums_are_exact(device, name):
    """And in a batch every prompt has shares of its own."""
    prompt = Prompt(batch=2, kv_heads=2, group=2, length=150, seq_lens=(150, 97), head_dim=16)
    layers = [
        replace(x, queries=x.queries * 2**i)  # the later, the sharper
        for i, x in enumerate(model_inputs(get(name), prompt, device))
    ]
    kept = get(name).choose_all(layers, 50)
    shares = [[len(r) for b in kept_rows(k, 2) for r in b] for k in kept]  # [L][B * Hkv]
    assert [sum(s[2 * b] + s[2 * b + 1] for s in shares) for b in range(2)] == [400, 400]
    if name == "prefixkv":
        assert all(layer[::2] == layer[1::2] for layer in shares)
    assert sum(shares[0]) > sum(shares[3])


def test_prefixkv_keeps_whole_tokens(device):
    policy = get("prefixkv")
    layers = model_inputs(policy, Prompt(kv_heads=3, group=2, length=150, head_dim=16), device)
    for kept in policy.choose_all(layers, 50):
        for first, second in pairwise(kept_rows(kept, 3)[0]):
            assert first == second
            assert {0, 1, 2, 3, 149} <= {*first}


def test_all_heads_have_their_mean(device):
    prompt = Prompt(batch=1, kv_heads=2, group=2, length=90, head_dim=16)
    inputs = layer_inputs(prompt, device, all_queries=True)
    heads = PromptAttention().score(inputs)
    scorer = PromptAttention(all_heads=True, pinned=2)
    scores = scorer.score(inputs)
    torch.testing.assert_close(scores[..., 2:], heads.mean(1, True).expand_as(heads)[..., 2:])
    taken = scorer.take(None, replace(inputs))
    torch.testing.assert_close(scorer.finish(taken, inputs), scores)
