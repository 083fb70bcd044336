"""One budget for the kv heads of all layers."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from adakv.policy import (
    Adaptive,
    LayerInputs,
    ModelWide,
    Policy,
    TopScore,
    TwoStage,
    Uniform,
    WindowAttention,
)
from cases import Prompt, random_scores
from policy.helpers import kept_rows, model_inputs

SCORER = WindowAttention(window=8)
RAGGED = Prompt(batch=3, kv_heads=4, group=2, length=90, head_dim=16, seq_lens=(90, 47, 71))
BUDGET, LAYERS = 30, 4


def chosen(
    policy: Policy, layers: list[LayerInputs], scores: list[Tensor] | None = None
) -> list[list[list[list[int]]]]:
    """Positions that each layer, sequence and kv head keeps."""
    return [kept_rows(kept, 4) for kept in policy.choose_all(layers, BUDGET, scores=scores)]


def best_of_the_model(scores: list[Tensor], b: int, length: int) -> set[tuple[int, int, int]]:
    """The candidates (layer, head, position) that belong to the budget, by sorting them all."""
    candidates = [
        (-float(scores[layer][b, h, t]), t, layer, h)
        for layer, h, t in itertools.product(range(LAYERS), range(4), range(length - 8))
    ]
    best = sorted(candidates)[: LAYERS * 4 * (BUDGET - 8)]
    return {(layer, h, t) for _, t, layer, h in best}


@pytest.mark.parametrize("levels", [0, 6], ids=["unique", "ties"])
def test_model_wide_keeps_the_best_of_all_layers(device, levels):
    layers = model_inputs(Policy(SCORER, ModelWide(), TopScore()), RAGGED, device)
    scores = [random_scores(3, 4, 90, levels=levels).to(device) for _ in layers]
    rows = chosen(Policy(SCORER, ModelWide(), TopScore()), layers, scores)
    for b, length in enumerate(RAGGED.seq_lens):
        kept = {
            (layer, h, t)
            for layer, h in itertools.product(range(LAYERS), range(4))
            for t in rows[layer][b][h]
            if t < length - 8
        }
        assert kept == best_of_the_model(scores, b, length)
        counts = [sum(map(len, layer[b])) for layer in rows]
        assert sum(counts) == LAYERS * 4 * BUDGET
        assert min(counts) < BUDGET * 4 < max(counts)


@pytest.mark.parametrize("floor", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("safeguard", ["blend", "hard_floor"])
def test_model_wide_spends_its_total_and_keeps_its_floor(device, floor, safeguard):
    policy = Policy(SCORER, ModelWide(floor, safeguard), TopScore())
    layers = model_inputs(policy, RAGGED, device)
    rows = chosen(policy, layers)
    totals = [policy.totals(x, BUDGET) for x in layers]
    assert totals == [(LAYERS * 4 * BUDGET,) * 3, *[(0, 0, 0)] * 3]
    for b in range(3):
        lengths = [len(row) for layer in rows for row in layer[b]]
        assert sum(lengths) == totals[0][b]
        assert min(lengths) >= 8 + int(floor * (BUDGET - 8))


@pytest.mark.parametrize("selector", [TopScore(), TwoStage()])
def test_model_wide_with_floor_one_is_uniform(device, selector):
    policy = Policy(SCORER, ModelWide(floor=1.0), selector)
    layers = model_inputs(policy, RAGGED, device)
    assert chosen(policy, layers) == chosen(Policy(SCORER, Uniform(), selector), layers)


def test_model_wide_of_one_layer_is_adaptive(device):
    wide = Policy(SCORER, ModelWide(floor=0.2), TwoStage())
    (inputs,) = model_inputs(wide, RAGGED, device, num_layers=1)
    adaptive = Policy(SCORER, Adaptive(floor=0.2), TwoStage())
    expected = kept_rows(adaptive.choose(inputs, BUDGET), 4)
    assert kept_rows(wide.choose(inputs, BUDGET), 4) == expected


def test_model_wide_budgets_go_through_two_stages(device):
    """As many entries as by score alone; the first half of them are the best by score."""
    one, two = (Policy(SCORER, ModelWide(), selector) for selector in (TopScore(), TwoStage()))
    layers = model_inputs(two, RAGGED, device)
    by_score, in_stages = chosen(one, layers), chosen(two, layers)
    assert by_score != in_stages
    scores = [SCORER.score(x) for x in layers]
    for layer, b, h in itertools.product(range(LAYERS), range(3), range(4)):
        count = len(by_score[layer][b][h])
        assert len(in_stages[layer][b][h]) == count
        first = scores[layer][b, h].topk((count - 8) // 2).indices.tolist()
        plateau = float(scores[layer][b, h].topk((count - 8) // 2 + 1).values[-1])
        surely = {t for t in first if scores[layer][b, h, t] > plateau}
        assert surely <= set(in_stages[layer][b][h])


def test_model_wide_pins_in_every_head(device):
    policy = Policy(WindowAttention(window=8, pinned=3), ModelWide(), TopScore())
    for layer in chosen(policy, model_inputs(policy, RAGGED, device)):
        assert all(row[:3] == [0, 1, 2] for row in itertools.chain(*layer))


def test_model_wide_keeps_short_prompts_whole(device):
    """A sequence that fits keeps everything, and the others spend no more for it."""
    policy = Policy(SCORER, ModelWide(), TopScore())
    prompt = replace(RAGGED, seq_lens=(90, 25, 30))
    rows = chosen(policy, model_inputs(policy, prompt, device))
    for layer in rows:
        assert layer[1] == [list(range(25))] * 4 and layer[2] == [list(range(30))] * 4
    assert sum(len(row) for layer in rows for row in layer[0]) == LAYERS * 4 * BUDGET


def test_model_wide_needs_all_layers(device):
    policy = Policy(SCORER, ModelWide(), TopScore())
    layers = model_inputs(policy, RAGGED, device)
    with pytest.raises(ValueError, match="ModelWide needs the scores of all 4 layers"):
        policy.choose(layers[0], BUDGET)
    for wrong in (layers[:3], layers[::-1], []):
        with pytest.raises(ValueError, match="layers must be those of the whole model in order"):
            policy.choose_all(wrong, BUDGET)
    with pytest.raises(ValueError, match="scores must be one tensor for each of 4 layers, got 1"):
        policy.choose_all(layers, BUDGET, scores=[torch.zeros(3, 4, 90, device=device)])
    with pytest.raises(ValueError, match=r"floor must be in \[0, 1\], got -1"):
        ModelWide(floor=-1)
    with pytest.raises(ValueError, match="safeguard must be one of blend, hard_floor"):
        ModelWide(safeguard="official_round")
