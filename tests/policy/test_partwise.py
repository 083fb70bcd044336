"""Scorers that take a prompt part by part: the same as of the whole prompt, however it is cut."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from adakv import ops
from adakv.policy import (
    Adaptive,
    ColumnMax,
    ExpectedAttention,
    LayerInputs,
    PartwiseScorer,
    Policy,
    PromptAttention,
    RankFusion,
    TopScore,
    get,
    names,
)
from adakv.step import Attention
from cases import Prompt
from policy.helpers import kept_rows, layer_inputs, rotate

LENGTH = 150
REDUCES = get_args(ops.Reduce)
SCORERS = [
    *(PromptAttention(window=8, reduce=r, group_reduce=g) for r in REDUCES for g in REDUCES),
    PromptAttention(window=8, reduce="mean", group_reduce="max", stride=3, distance=5, pinned=2),
    PromptAttention(window=8, reduce="sum", stride=7, distance=1),
    ColumnMax(window=8),
    ColumnMax(window=8, stride=4, distance=0, weigh_by="all"),
    ColumnMax(window=8, stride=40, weigh_by="none", pinned=0),
    ColumnMax(window=8, weigh_by="all", window_weight=3),
    RankFusion(window=8, distance=4),
    RankFusion(window=8, stride=3, window_weight=0),
    ExpectedAttention(window=8, num_future=20),
    ExpectedAttention(window=8, num_future=20, covariance=False, pinned=0),
]


def scores_by_parts(scorer: Any, whole: LayerInputs, borders: list[int]) -> Tensor:
    """The scores of a prompt that comes in parts, which end at ``borders``."""
    taken = None
    for start, end in pairwise([0, *borders]):
        part = replace(
            whole,
            queries=whole.queries[:, :, start:end],
            keys=whole.keys[:, :, :end],
            values=whole.values[:, :, :end],
            prompt_lens=(end,) * len(whole.prompt_lens),
        )
        taken = scorer.take(taken, part)
    return scorer.finish(taken, replace(whole, queries=whole.queries[:, :, :0]))


@pytest.mark.parametrize("scorer", SCORERS, ids=str)
def test_scores_by_parts_are_those_of_the_whole_prompt(device: torch.device, scorer: Any):
    rng, policy = random.Random(0), Policy(scorer, Adaptive(), TopScore())
    prompt = Prompt(batch=2, group=3, length=LENGTH, head_dim=16)
    whole = replace(
        layer_inputs(prompt, device, all_queries=True),
        attention=Attention(0.4, 10.0, torch.randn(6, device=device), rotate),
    )
    exact = scorer.score(whole)
    kept = kept_rows(policy.choose(whole, 40), 2)
    for _ in range(4):
        cuts = rng.sample(range(1, LENGTH), rng.randint(0, 12))
        scores = scores_by_parts(scorer, whole, [*sorted(cuts), LENGTH])
        torch.testing.assert_close(scores, exact)
        assert kept_rows(policy.choose(whole, 40, scores=scores), 2) == kept


def test_finishing_changes_nothing_of_what_was_taken(device: torch.device):
    whole = layer_inputs(Prompt(length=60, head_dim=16), device, all_queries=True)
    for scorer in (PromptAttention(pinned=4), ColumnMax(), ExpectedAttention(num_future=9)):
        taken = scorer.take(None, whole)
        assert torch.equal(scorer.finish(taken, whole), scorer.finish(taken, whole))


def test_scorers_of_all_queries_take_prompts_in_parts():
    policies = [get(name) for name in names()]
    found = [p for p in policies if "all_queries" in p.needs]
    assert found == [p for p in policies if isinstance(p.scorer, PartwiseScorer)]
    assert len(found) == 10
