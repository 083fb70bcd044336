"""Tokens that stand out in one channel of the hidden states."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from adakv.policy import HiddenOutlier, LayerInputs, get
from cases import Prompt
from policy.helpers import layer_inputs

LENGTH, WIDTH = 40, 6


def inputs_of(device: torch.device, *, layer: int) -> LayerInputs:
    inputs = layer_inputs(Prompt(length=LENGTH), device, layer=layer, num_layers=4)
    batch = inputs.keys.shape[0]
    return replace(inputs, hidden=torch.randn(batch, LENGTH, WIDTH, device=device))


def test_outliers_by_hand(device: torch.device) -> None:
    """Scores are the sizes of the second numbers of (1, -7), (2, 3), (0, 5), for both kv heads."""
    hidden = torch.tensor([[[1.0, -7], [2, 3], [0, 5]]], device=device).bfloat16()
    entries = torch.zeros(1, 2, 3, 8, device=device)
    inputs = LayerInputs(entries, entries, entries, None, (3,), 2, 4, hidden=hidden)
    scores = HiddenOutlier(channel=1, window=1).score(inputs)
    assert scores.dtype is torch.float32
    assert scores.tolist() == [[[7, 3, 5]] * 2]
    pinned = HiddenOutlier(channel=1, layer=3, window=1, pinned=1).score(inputs)
    assert pinned.tolist() == [[[math.inf, 0, 0]] * 2]


def test_prompts_in_parts_score_the_same(device: torch.device) -> None:
    inputs, scorer = inputs_of(device, layer=1), HiddenOutlier(channel=4, layer=1, window=8)
    hidden, taken = inputs.hidden, None
    assert hidden is not None
    for begin, end in ((0, 13), (13, 14), (14, LENGTH)):
        taken = scorer.take(taken, replace(inputs, hidden=hidden[:, begin:end]))
    expected = hidden[:, None, :, 4].abs().expand(inputs.shape)
    whole = replace(inputs, hidden=None)
    assert torch.equal(scorer.finish(taken, whole), expected)
    assert torch.equal(scorer.score(inputs), expected)
    with pytest.raises(ValueError, match="hidden must be that of all 40 positions, got 14"):
        scorer.finish(taken[:, :14], whole)  # type: ignore[index]


def test_outliers_name_what_is_wrong(device: torch.device) -> None:
    inputs = inputs_of(device, layer=0)
    with pytest.raises(ValueError, match=r"channel must be below 6, .* got 6"):
        HiddenOutlier(channel=6).score(inputs)
    with pytest.raises(ValueError, match=r"hidden must be given .* got None"):
        HiddenOutlier(channel=5).score(replace(inputs, hidden=None))


def test_outliers_are_written_down() -> None:
    text = "HiddenOutlier(channel=507, layer=12) * Uniform() * TopScore()"
    policy = get(text)
    assert policy.needs == {"hidden", "layer"}
    assert get(str(policy)) == policy
