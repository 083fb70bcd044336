"""Every policy that has a name, on random prompts."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch._subclasses import FakeTensorMode

import adakv
from adakv import ops, policy
from adakv.policy import (
    Adaptive,
    Flat,
    LayerInputs,
    Policy,
    Pyramid,
    Random,
    Recency,
    TopScore,
    TwoStage,
    Uniform,
    WindowAttention,
)
from cases import Prompt
from policy.helpers import bare_inputs, kept_rows, layer_inputs

PROMPTS = [
    Prompt(batch=1, kv_heads=2, group=1, length=180),
    Prompt(batch=3, kv_heads=2, group=4, length=180),
    Prompt(batch=3, kv_heads=4, group=2, length=180, seq_lens=(180, 20, 131)),
]
BUDGET = 80


def inputs_for(name: str, prompt: Prompt, device: torch.device, layer: int = 1) -> LayerInputs:
    """Random inputs with as many queries as the policy asks for."""
    settings = {**vars(prompt), "window": policy.get(name).window, "head_dim": 16}
    return layer_inputs(Prompt(**settings), device, layer=layer)


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
@pytest.mark.parametrize("name", policy.names())
@pytest.mark.parametrize("layer", [0, 3])
def test_preset_keeps_what_its_totals_say(device, name, prompt, layer):
    preset = policy.get(name)
    inputs = inputs_for(name, prompt, device, layer)
    kept = preset.choose(inputs, BUDGET)
    totals = preset.totals(inputs, BUDGET)
    assert kept.positions.dtype == kept.indptr.dtype == torch.int32
    assert len(kept.positions) == sum(totals)
    drifts = "official_round" in repr(preset)
    for rows, total, length in zip(
        kept_rows(kept, prompt.kv_heads), totals, inputs.prompt_lens, strict=True
    ):
        count = sum(len(row) for row in rows)
        assert count <= total if drifts else count == total
        assert total <= prompt.kv_heads * length
        for row in rows:
            assert row == sorted(set(row))
            window = min(preset.window, length)
            assert row[len(row) - window :] == list(range(length - window, length))


@pytest.mark.parametrize("name", policy.names())
def test_preset_budgets_are_the_mean_over_layers(device, name):
    preset = policy.get(name)
    inputs = [inputs_for(name, PROMPTS[1], device, layer) for layer in range(4)]
    mean = sum(sum(preset.totals(x, BUDGET)) for x in inputs) / (4 * 3 * 2)
    if name == "full":
        assert mean == 180
    elif "pyramidkv@" in name:  # the authors' step is cut to an integer
        assert BUDGET <= mean <= 1.15 * BUDGET
    elif "official_round" in repr(preset):  # an upper bound
        assert BUDGET <= mean <= BUDGET + 1
    else:
        assert mean == BUDGET


def test_preset_table_is_the_documented_one():
    snapkv = WindowAttention()
    assert policy.get("streaming") == Policy(Recency(sinks=4), Uniform(), TopScore())
    assert policy.get("random") == Policy(Random(), Uniform(), TopScore())
    assert policy.get("snapkv") == Policy(snapkv, Uniform(), TopScore())
    assert policy.get("pyramidkv") == Policy(snapkv, Uniform(Pyramid()), TopScore())
    assert policy.get("ada_snapkv") == Policy(snapkv, Adaptive(), TopScore())
    adaptive_pyramid = Adaptive(layers=Pyramid())
    assert policy.get("ada_pyramidkv") == Policy(snapkv, adaptive_pyramid, TopScore())
    assert policy.get("critical_snapkv") == Policy(snapkv, Uniform(), TwoStage())
    assert policy.get("critical_ada_snapkv") == Policy(snapkv, Adaptive(), TwoStage())
    assert policy.get("critical_ada_pyramidkv") == Policy(snapkv, adaptive_pyramid, TwoStage())
    assert adakv.policies() == policy.names()


def test_preset_defaults_are_the_papers():
    scorer, allocator, selector = WindowAttention(), Adaptive(), TwoStage()
    assert (scorer.window, scorer.pool, scorer.pool_width, scorer.sinks) == (32, "max", 7, 0)
    assert (scorer.window_reduce, scorer.group_reduce, scorer.order) == (
        "mean",
        "mean",
        "group_first",
    )
    assert (allocator.floor, allocator.safeguard, allocator.layers) == (0.2, "blend", Flat())
    assert (selector.first, selector.eps, selector.norm) == (0.5, 1e-4, "l1")


@pytest.mark.parametrize("safeguard", get_args(ops.Safeguard))
def test_default_policy_adapts(device, safeguard):
    """A head that looks at one place gives its entries to one that looks everywhere."""
    inputs = inputs_for("ada_snapkv", Prompt(batch=1, kv_heads=2, group=2, length=300), device)
    inputs.queries[:, 2:] = 0  # the second kv head's group attends evenly
    inputs.queries[:, :2, :, 0] = 8
    inputs.keys[:, 0, 100, 0] = 16
    for name in ("ada_snapkv", "critical_ada_snapkv", "ada_pyramidkv"):
        preset = policy.get(name)
        if safeguard != "blend":
            allocator = Adaptive(safeguard=safeguard, layers=preset.allocator.layers)
            preset = Policy(preset.scorer, allocator, preset.selector)
        sharp, even = kept_rows(preset.choose(inputs, BUDGET), 2)[0]
        assert len(even) > 1.5 * len(sharp), name
        assert 100 in sharp


@pytest.mark.parametrize("name", policy.names())
def test_choose_waits_for_no_device(name, monkeypatch):
    """Under fake tensors, which hold no numbers, reading one fails."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # so torch.ops.adakv runs
    preset = policy.get(name)
    with FakeTensorMode():
        x = torch.empty(2, 2, 300, 16)
        lengths = torch.empty(2, dtype=torch.int32)
        queries = torch.empty(2, 4, preset.window, 16)
        inputs = LayerInputs(queries, x, x, torch.empty(8, 64), (300, 250), 0, 4, lengths)
        kept = preset.choose(inputs, 100)
        assert kept.positions.shape == (sum(preset.totals(inputs, 100)),)


@pytest.mark.parametrize("name", policy.names())
def test_preset_keeps_everything_without_scoring_if_it_fits(device, name):
    """Neither queries nor norms can be had here."""
    preset = policy.get(name)
    scores = torch.full((2, 3, 70), float("nan"), device=device)
    inputs = bare_inputs(scores, queries=scores[..., None], num_layers=2)
    kept = preset.choose(inputs, max(70, preset.window))
    assert kept_rows(kept, 3) == [[list(range(70))] * 3] * 2


def test_get_names_what_it_knows():
    preset = Policy(Recency(), Uniform(), TopScore())
    assert policy.get(preset) is preset
    with pytest.raises(ValueError, match=r"critical_ada_snapkv.*got 'snapkvv'"):
        policy.get("snapkvv")
