"""What is observed of prompts that come in by parts; tests of the adapters have the rest."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from adakv.policy import Budget, LayerInputs, get
from adakv.reading import Part, Reader
from cases import Prompt
from engine_steps import watched
from policy.helpers import kept_rows, layer_inputs

LENGTH, BUDGET = 150, 48


def whole_prompt(device: torch.device) -> LayerInputs:
    prompt = Prompt(group=3, length=LENGTH, head_dim=16)
    return layer_inputs(prompt, device, layer=0, num_layers=1, all_queries=True)


def take(reader: Reader, whole: LayerInputs, start: int, end: int, lse: Tensor | None) -> None:
    """A part of a prompt, whose memory is then used for something else."""
    queries = whole.queries[:, :, start:end].clone()
    lse = None if lse is None else lse[:, :, start:end].clone()
    entries = whole.keys[:, :, :end], whole.values[:, :, :end]
    w_o = whole.w_o
    assert w_o is not None
    reader.begin([end] * len(queries), end)
    reader.take(0, Part(queries, lambda: entries, whole.attention, lambda: w_o, lse))
    for used in (queries, *([] if lse is None else [lse])):
        used.fill_(float("nan"))


@pytest.mark.parametrize("name", ["ada_snapkv", "h2o", "ada_column_max"])
@pytest.mark.parametrize("cuts", [[], [10, 40], [60], [10, 49, 50, 149]], ids=str)
def test_parts_are_not_needed_once_they_were_taken(
    device: torch.device, name: str, cuts: list[int]
):
    whole, policy = whole_prompt(device), get(name)
    reader = Reader(Budget(policy, BUDGET), 1)
    for start, end in pairwise([0, *cuts, LENGTH]):
        take(reader, whole, start, end, None)
    (chosen,) = reader.finish(0)[0]
    if "all_queries" not in policy.needs:
        whole = replace(whole, queries=whole.queries[:, :, -policy.window :])
    assert kept_rows(chosen.kept, 2) == kept_rows(policy.choose(whole, BUDGET), 2)


@pytest.mark.parametrize("first_is_known", [True, False])
def test_log_sum_exp_goes_to_what_takes_parts_if_all_of_it_is_known(
    device: torch.device, first_is_known: bool
):
    policy, parts = watched(get("h2o"))
    whole = whole_prompt(device)
    keys = whole.keys.repeat_interleave(3, 1)
    unseen = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=device).triu(1)
    logits = (whole.queries @ keys.mT / 4).masked_fill(unseen, -torch.inf)
    lse = logits.logsumexp(-1)
    reader = Reader(Budget(policy, BUDGET), 1)
    take(reader, whole, 0, 20, lse if first_is_known else None)
    take(reader, whole, 20, 100, lse)
    take(reader, whole, 100, LENGTH, lse)
    first, second = parts
    assert second.lse is not None and second.lse.shape == (2, 6, 50)
    assert first_is_known == (first.lse is not None)
    assert first.lse is None or torch.equal(first.lse, lse[:, :, :100])
    (chosen,) = reader.finish(0)[0]
    assert kept_rows(chosen.kept, 2) == kept_rows(get("h2o").choose(whole, BUDGET), 2)
