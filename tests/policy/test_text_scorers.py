"""Scorers made for texts: worked examples, computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adakv.policy import AhaKV, Earliest, LastImportant, LayerInputs, get
from adakv.policy.again import Competing
from adakv.step import Attention
from policy.helpers import kept_rows

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
    """16 of 64 tokens stay: gain .208139; squared norms 25 1 4 1, their means of three, with zeros
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


def corm_inputs(rows: list[list[float]], device: torch.device, **options: Any) -> LayerInputs:
    """One kv head whose window row w attends with ``rows[w]``, as far as its own entry."""
    length = len(rows[-1])
    logits = [[math.log(p) for p in row] + [FAR] * (length - len(row)) for row in rows]
    return text_inputs(logits, device, head_dim=16, attention=Attention(1.0), **options)


CORM = [[0.40, 0.10, 0.20, 0.30], [0.50, 0.05, 0.10, 0.15, 0.20]]


@pytest.mark.parametrize("seen", [None, 5])
def test_corm_drops_what_the_last_queries_found_unimportant(device, seen):
    """Thresholds 1/4 and 1/5: entry 0 is important to both queries, 1 and 2 to none."""
    inputs = corm_inputs(CORM, device, seen=seen)
    scores = LastImportant(window=2).score(inputs)
    assert scores[0, 0, :3].tolist() == [2, -math.inf, -math.inf]
    policy = replace(get("corm"), scorer=LastImportant(window=2))
    if seen is None:
        assert kept_rows(policy.choose(inputs, 4), 1) == [[[0, 3, 4]]]
    else:
        rows = Competing.of(policy, inputs, scores)
        kept = rows.pick(policy, inputs, rows.shares(policy, inputs, (4,)), 4)
        assert kept_rows(kept, 1) == [[[0, 3, 4]]]


def test_corm_counts_tokens_that_have_left(device):
    """With 20 tokens an attention of 1/20 is enough, which entry 1 gets of the newest."""
    scores = LastImportant(window=2).score(corm_inputs(CORM, device, seen=20))
    assert scores[0, 0, :3].tolist() == [2, 2, 2]


def test_corm_keeps_the_newest_important_ones_of_all_heads_under_its_cap(device):
    """What both heads found important is more than four entries, two of them the window's."""
    rows = [[0.4, 0.05, 0.4, 0.15], [0.05, 0.4, 0.4, 0.05, 0.1]]
    inputs = corm_inputs(rows, device)
    other = corm_inputs([[0.9, 0.04, 0.03, 0.03], [0.9, 0.03, 0.03, 0.02, 0.02]], device)
    both = [torch.cat([getattr(x, y) for x in (inputs, other)], 1) for y in ("queries", "keys")]
    inputs = LayerInputs(*both, both[1], None, (5,), 0, 1, attention=Attention(1.0))
    policy = replace(get("corm"), scorer=LastImportant(window=2))
    assert policy.scorer.score(inputs)[0, :, :3].tolist() == [
        [1, 2, 2],
        [2, -math.inf, -math.inf],
    ]
    assert kept_rows(policy.choose(inputs, 4), 2) == [[[0, 1, 2, 3, 4], [0, 3, 4]]]
    assert kept_rows(policy.choose(inputs, 3), 2) == [[[1, 3, 4], [0, 3, 4]]]


def test_corm_takes_queries_that_have_not_come_for_all_alike(device):
    """A ring begins with zeros, to which everything is as important as to the mean."""
    inputs = corm_inputs([CORM[1]] * 2, device, seen=5)
    inputs.queries.zero_()
    assert LastImportant(window=2).score(inputs)[0, 0, :3].tolist() == [2, 2, 2]


def test_earliest_and_newest(device):
    inputs = text_inputs([[0.0] * 8], device)
    policy = replace(get("prefixkv_text"), scorer=Earliest(window=2))
    assert kept_rows(policy.choose(inputs, 5), 1) == [[[0, 1, 2, 6, 7]]]
