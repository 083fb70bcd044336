"""Worked examples of the two papers and of the methods they stand on, computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from adakv import ops
from adakv.policy import (
    Adaptive,
    LayerInputs,
    Policy,
    Pyramid,
    Selector,
    TopScore,
    TwoStage,
    Uniform,
    WindowAttention,
)
from adakv.step import Attention
from policy.helpers import bare_inputs, kept_rows, with_window
from tolerance import assert_close

NEWEST = WindowAttention(window=1)


def kept_candidates(
    candidates: list[list[float]],
    b: int,
    device: torch.device,
    allocator: Adaptive | Uniform,
    selector: Selector = TopScore(),  # noqa: B008
    **options: object,
) -> list[set[int]]:
    """What each head keeps of its candidates, with a window of one behind them."""
    scores = with_window(candidates, 1, device)
    policy = Policy(NEWEST, allocator, selector)
    kept = policy.choose(bare_inputs(scores, **options), b + 1, scores=scores)
    newest = scores.shape[2] - 1
    rows = kept_rows(kept, len(candidates))[0]
    assert all(row[-1] == newest for row in rows)
    return [set(row[:-1]) for row in rows]


# --- Ada-KV, arXiv 2407.11550, Algorithms 1 and 2 -------------------------------------------------

SHARP_AND_FLAT = [
    [0.12, 0.20, 0.06, 0.14, 0.09, 0.15, 0.11, 0.13],
    [0.045, 0.03, 0.70, 0.02, 0.10, 0.055, 0.01, 0.04],
]


@pytest.mark.parametrize(
    ("floor", "safeguard", "expected"),
    [
        (1.0, "blend", [{1, 3, 5}, {2, 4, 5}]),
        (0.0, "blend", [{0, 1, 3, 5, 7}, {2}]),
        (0.0, "none", [{0, 1, 3, 5, 7}, {2}]),
        (0.2, "blend", [{0, 1, 3, 5, 7}, {2}]),
        (0.2, "hard_floor", [{0, 1, 3, 5, 7}, {2}]),
        (0.2, "official_round", [{1, 3, 5, 7}, {2}]),
        (0.5, "blend", [{1, 3, 5, 7}, {2, 4}]),
        (0.7, "hard_floor", [{1, 3, 5, 7}, {2, 4}]),
    ],
)
def test_adaptive_budgets_follow_the_scores(device, floor, safeguard, expected):
    allocator = Adaptive(floor=floor, safeguard=safeguard)
    assert kept_candidates(SHARP_AND_FLAT, 3, device, allocator) == expected


@pytest.mark.parametrize(
    ("safeguard", "expected"),
    [
        ("blend", [set(range(10)), {0, 2, 4, 5, 8, 9}]),
        ("official_round", [{0, 1, 3, 4, 5, 6, 7, 8, 9}, {0, 2, 4, 5, 8, 9}]),
    ],
)
def test_adaptive_keeps_the_window_beside_its_candidates(device, safeguard, expected):
    candidates = [
        [0.05, 0.21, 0.04, 0.12, 0.11, 0.13, 0.10, 0.14],
        [0.035, 0.02, 0.62, 0.03, 0.08, 0.045, 0.015, 0.025],
    ]
    scores = with_window(candidates, 2, device)
    policy = Policy(WindowAttention(window=2), Adaptive(safeguard=safeguard), TopScore())
    rows = kept_rows(policy.choose(bare_inputs(scores), 8, scores=scores), 2)[0]
    assert [set(row) for row in rows] == expected


@pytest.mark.parametrize(("safeguard", "expected"), [("blend", [7, 3]), ("hard_floor", [8, 2])])
def test_adaptive_floor_as_a_share_and_as_a_guarantee_differ(device, safeguard, expected):
    candidates = [
        [x / 1000 for x in range(30, 18, -1)],
        [x / 1000 for x in (90, 9, 8, 7, 6, 5, 4, 3, 2, 1.5, 1, 0.5)],
    ]
    rows = kept_candidates(candidates, 5, device, Adaptive(floor=0.4, safeguard=safeguard))
    assert rows == [set(range(count)) for count in expected]


# --- SnapKV, arXiv 2404.14469 ---------------------------------------------------------------------


def attention_inputs(probabilities: list[list[list[float]]], device: torch.device) -> LayerInputs:
    """Inputs of one kv head whose q head g attends from window row w with ``probabilities[g][w]``.

    The keys are unit vectors and the queries logarithms; the rows need not sum to one.
    """
    p = torch.tensor(probabilities, device=device)  # [G, W, T]
    group, window, length = p.shape
    queries = torch.zeros(1, group, window, 16, device=device)
    queries[0, :, :, :length] = p.clamp(min=1e-30).log()
    keys = torch.eye(length, 16, device=device)[None, None]
    return LayerInputs(queries, keys, keys, None, (length,), 0, 1, attention=Attention(1.0))


def rest(row: list[float]) -> list[float]:
    """The row of a softmax: what is missing to one goes to the newest entry."""
    return [*row, 1 - math.fsum(row)]


def check_scores(scores: Tensor, expected: list[float]) -> None:
    exact = torch.tensor(expected, dtype=torch.float64)
    assert_close(scores[0, 0, : len(expected)], exact, exact.float())
    assert scores[0, 0, len(expected) :].isneginf().all()


def test_window_attention_is_causal_and_counts_the_window_in_its_softmax(device):
    inputs = attention_inputs([[[1, 2, 1, 7], [2, 2, 2, 2]]], device)
    check_scores(WindowAttention(window=2, pool="none").score(inputs), [0.25, 0.375])


GROUP_OF_TWO = [[rest([0, 0.24, 0, 0, 0.10, 0])], [rest([0, 0, 0, 0.22, 0.10, 0.06])]]


@pytest.mark.parametrize(
    ("order", "expected", "best"),
    [
        ("group_first", [0.12, 0.12, 0.12, 0.11, 0.11, 0.10], [0, 1, 2]),
        ("pool_first", [0.12, 0.12, 0.23, 0.16, 0.16, 0.10], [2, 3, 4]),
    ],
)
def test_window_attention_order_of_group_and_pool_matters(device, order, expected, best):
    inputs = attention_inputs(GROUP_OF_TWO, device)
    scorer = WindowAttention(window=1, pool_width=3, order=order)
    check_scores(scorer.score(inputs), expected)
    kept = Policy(scorer, Uniform(), TopScore()).choose(inputs, 4)
    assert kept_rows(kept, 1) == [[[*best, 6]]]


def test_window_attention_average_pool_counts_its_padding(device):
    inputs = attention_inputs([[rest([0.5, 0.1, 0.1, 0.1, 0.1, 0.1])]], device)
    scorer = WindowAttention(window=1, pool="avg", pool_width=5)
    check_scores(scorer.score(inputs), [0.14, 0.16, 0.18, 0.10, 0.08, 0.06])


def test_snapkv_plateaus_keep_their_first_positions(device):
    spikes = [x / 4 for x in (0.1, 0.1, 0.9, 0.1, 0.1, 0.8, 0.1, 0.1)]
    inputs = attention_inputs([[rest(spikes)]], device)
    policy = Policy(WindowAttention(window=1, pool_width=3), Uniform(), TopScore())
    assert kept_rows(policy.choose(inputs, 6), 1) == [[[1, 2, 3, 4, 5, 8]]]


# --- CriticalKV, arXiv 2502.03805, Theorem 3.3 and Algorithm 1 ------------------------------------

ATTENTION = [0.30, 0.25, 0.05, 0.20, 0.15, 0.05]
VALUES = [[1, 0], [0.5, 0], [0, 5], [1, 0], [0, 0.9], [1, 2]]
PROJECTION = [[1, 0], [0, 2]]


@pytest.mark.parametrize(
    ("selector", "expected", "error"),
    [
        (TopScore(), {0, 1, 3, 4}, 0.6894),
        (TwoStage(first=0.0), {0, 2, 4, 5}, 0.8323),
        (TwoStage(), {0, 1, 2, 4}, 0.1650),
    ],
)
def test_two_stages_move_the_output_least(device, selector, expected, error):
    values = torch.zeros(1, 1, 7, 16, device=device)
    values[0, 0, :6, :2] = torch.tensor(VALUES)
    w_o = torch.zeros(2, 16, device=device)
    w_o[:, :2] = torch.tensor(PROJECTION).T
    kept = kept_candidates([ATTENTION], 4, device, Uniform(), selector, values=values, w_o=w_o)
    assert kept == [expected]
    # The output error that the paper bounds, in plain torch.
    a = torch.tensor(ATTENTION, dtype=torch.float64)
    projected = torch.tensor(VALUES, dtype=torch.float64) @ torch.tensor(PROJECTION).double()
    left = sorted(expected)
    output = a[left] @ projected[left] / a[left].sum()
    assert round(float((a @ projected - output).abs().sum()), 4) == error


def norm_inputs(norms: list[list[list[float]]], device: torch.device) -> dict[str, Tensor]:
    """``values`` and ``w_o`` for which q head g of kv head h has ``norms[h][g][t]``."""
    n = torch.tensor(norms, device=device)  # [Hkv, G, T]
    heads, _, length = n.shape
    values = torch.eye(length + 1, 16, device=device).expand(1, heads, -1, -1)
    w_o = torch.zeros(*n.shape[:2], 16, device=device)
    w_o[..., :length] = n
    return {"values": values, "w_o": w_o.reshape(1, -1)}


NORMS = [[[1, 1, 9, 1, 1, 1, 4, 1]], [[1, 8, 1, 30, 1, 1, 1, 1]]]


def test_critical_ada_budgets_from_scores_then_two_stages(device):
    norms = norm_inputs(NORMS, device)
    rows = kept_candidates(SHARP_AND_FLAT, 3, device, Adaptive(floor=0.5), TwoStage(), **norms)
    assert rows == [{1, 2, 5, 6}, {2, 3}]


def test_critical_ada_budgets_from_the_weighed_scores(device):
    """S * N is .12 .2 .54 .14 .09 .15 .44 .13 and .045 .24 .7 .6 .1 .055 .01 .04."""
    norms = norm_inputs(NORMS, device)
    allocator = Adaptive(floor=0.0, budgets_from="critical")
    rows = kept_candidates(SHARP_AND_FLAT, 3, device, allocator, **norms)
    assert rows == [{1, 3, 5}, {2, 4, 5}]


def test_critical_norm_is_the_mean_over_the_group(device):
    norms = norm_inputs([[[1, 1, 1, 9], [1, 1, 5, 1]]], device)
    mean_scores = [[0.3, 0.225, 0.235, 0.24]]
    rows = kept_candidates(mean_scores, 1, device, Uniform(), TwoStage(), **norms)
    assert rows == [{3}]


def test_critical_products_per_q_head_come_in_as_scores(device):
    """Each q head's attention times its own norm, then the mean: another order, another winner."""
    attention = torch.tensor([[0.5, 0.3, 0.12, 0.08], [0.1, 0.15, 0.35, 0.40]], device=device)
    tensors = norm_inputs([[[1, 1, 1, 9], [1, 1, 5, 1]]], device)
    heads = tensors["w_o"].split(16, dim=1)
    norms = torch.cat([ops.value_norm(tensors["values"], w_o)[0, :, :4] for w_o in heads])
    product = (attention * norms).mean(0)
    torch.testing.assert_close(product.cpu(), torch.tensor([0.3, 0.225, 0.935, 0.56]))
    rows = kept_candidates([product.tolist()], 1, device, Uniform(), TopScore(), **tensors)
    assert rows == [{2}]


# --- PyramidKV, arXiv 2406.02069 ------------------------------------------------------------------


def pyramid(budget: int, prompt_len: int, rounding: str) -> list[int]:
    """Candidates per kv head of 32 layers."""
    return [
        Pyramid(rounding=rounding).budget(
            budget, window=32, prompt_len=prompt_len, layer=layer, num_layers=32
        )
        - 32
        for layer in range(32)
    ]


@pytest.mark.parametrize(
    ("budget", "prompt_len", "first", "step", "last", "total"),
    [
        (1024, 8000, 1935, 60, 75, 32160),
        (1024, 1500, 1468, 30, 538, 32096),
        (128, 8000, 188, 5, 33, 3536),
    ],
)
def test_pyramid_official_rounding_overspends(budget, prompt_len, first, step, last, total):
    layers = pyramid(budget, prompt_len, "official")
    assert layers == list(range(first, last - 1, -step))
    assert sum(layers) == total


@pytest.mark.parametrize(
    ("budget", "prompt_len", "first", "last"),
    [(1024, 8000, 1934, 50), (1024, 1500, 1468, 516), (128, 8000, 187, 5)],
)
def test_pyramid_exact_conserves_the_mean(budget, prompt_len, first, last):
    layers = pyramid(budget, prompt_len, "exact")
    assert (layers[0], layers[-1]) == (first, last)
    assert sum(layers) == 32 * (budget - 32)
    assert layers == sorted(layers, reverse=True)
