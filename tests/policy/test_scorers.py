"""Scorers beyond the two papers' own: worked examples, computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from adakv.policy import (
    ColumnMax,
    Defensive,
    ExpectedAttention,
    KeyDiff,
    LastQuery,
    LayerInputs,
    Policy,
    PressScorer,
    PromptAttention,
    RankFusion,
    RepeatAttention,
    TopScore,
    Uniform,
    WindowAttention,
)
from adakv.step import Attention
from cases import Prompt
from policy.helpers import kept_rows, layer_inputs, rotate


def attention_inputs(
    probabilities: Any, device: torch.device, norms: list[list[float]] | None = None
) -> LayerInputs:
    """Inputs whose q head g of kv head h attends from row w with ``probabilities[h][g][w]``.

    The keys are unit vectors and the queries logarithms. Entry t of kv head h has the norm
    ``norms[h][t]``, or 1.
    """
    p = torch.tensor(probabilities, device=device)  # [Hkv, G, W, T]
    heads, group, window, length = p.shape
    queries = torch.zeros(1, heads * group, window, 16, device=device)
    queries[0, :, :, :length] = p.clamp(min=1e-30).log().flatten(0, 1)
    keys = torch.eye(length, 16, device=device).expand(1, heads, -1, -1)
    w_o = torch.zeros(heads, group, 16, device=device)
    w_o[..., :length] = torch.tensor(norms or [[1.0] * length] * heads, device=device)[:, None]
    return LayerInputs(
        queries, keys, keys, w_o.view(1, -1), (length,), 0, 1, attention=Attention(1.0)
    )


def check(scores: Tensor, expected: list[list[float]]) -> None:
    """The first scores of each kv head, of the only sequence."""
    exact = torch.tensor(expected)
    torch.testing.assert_close(scores[0, :, : exact.shape[1]].cpu(), exact)


# --- DefensiveKV, arXiv 2510.13334 ----------------------------------------------------------------

USUAL, ONCE = [0.2, 0, 0.15, 0.10, 0.05, 0.5, 0], [0.2, 0.45, 0.15, 0.10, 0.05, 0.05, 0]
TWICE = [[USUAL, USUAL], [USUAL, ONCE]]


def test_defensive_remembers_what_one_query_needed(device):
    """The maxima are .2 .45 .15 .10 .05, and their mean .19; the means alone would keep {0, 2}."""
    plain = Defensive(window=2, pool_width=1, pinned=0)
    inputs = attention_inputs([TWICE], device)
    check(plain.score(inputs), [[0.2, 0.45, 0.19, 0.19, 0.19]])
    assert kept_rows(Policy(plain, Uniform(), TopScore()).choose(inputs, 4), 1) == [[[0, 1, 5, 6]]]
    mean = WindowAttention(window=2, pool="none")
    assert kept_rows(Policy(mean, Uniform(), TopScore()).choose(inputs, 4), 1) == [[[0, 2, 5, 6]]]


@pytest.mark.parametrize(
    ("norm_share", "expected"),
    [
        ("none", [[0.2, 0.9, 0.19, 0.19, 0.76], [0.4, 0.45, 0.19, 0.19, 0.19]]),
        (
            "entries",
            [[0.2 / 9, 0.1, 0.19 / 9, 0.19 / 9, 0.76 / 9], [0.4 / 6, 0.075, *3 * [0.19 / 6]]],
        ),
        ("heads", [[0.2 / 3, 0.3, 0.095, 0.095, 0.152], [0.4 / 3, 0.15, 0.095, 0.095, 0.038]]),
    ],
)
def test_defensive_weighs_by_norms(device, norm_share, expected):
    """Norms 1 2 1 1 4 and 2 1 1 1 1: their sums over the candidates are 9 and 6."""
    norms = [[1.0, 2, 1, 1, 4, 50, 50], [2.0, 1, 1, 1, 1, 50, 50]]
    inputs = attention_inputs([TWICE, TWICE], device, norms)
    check(Defensive(2, 1, norm_share, pinned=0).score(inputs), expected)


def test_defensive_pools_each_row_and_keeps_its_sum(device):
    """Pooled by 5 with padding .14 .16 .18 .10 .08 .06, in sum .72 instead of 1; mean 1/6."""
    inputs = attention_inputs([[[[0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0]]]], device)
    pooled = [x / 0.72 for x in (0.14, 0.16, 0.18)]
    check(Defensive(window=1, pinned=0).score(inputs), [[*pooled, 1 / 6, 1 / 6, 1 / 6]])


# --- TOVA, arXiv 2401.06104, and KeyDiff, arXiv 2504.15364 ----------------------------------------


def test_last_query_is_one_score_for_all_heads(device):
    heads = [[[[0.5, 0.1, 0.4]], [[0.1, 0.2, 0.7]]], [[[0.3, 0.3, 0.4]], [[0.3, 0.4, 0.3]]]]
    scores = LastQuery().score(attention_inputs(heads, device))
    check(scores, [[0.3, 0.25], [0.3, 0.25]])
    assert scores[..., 2].isneginf().all()


def test_key_diff_prefers_the_odd_one_out(device):
    """Directions (1, 0) twice and (0, 1): the mean points to (2, 1) / sqrt(5)."""
    keys = torch.zeros(1, 1, 3, 16, device=device)
    keys[0, 0, :, :2] = torch.tensor([[3.0, 0], [1, 0], [0, 7]])
    inputs = LayerInputs(keys, keys, keys, None, (3,), 0, 1)
    check(KeyDiff().score(inputs), [[-2 / 5**0.5, -2 / 5**0.5, -1 / 5**0.5]])


# --- H2O, arXiv 2306.14048, and its relatives -----------------------------------------------------

CAUSAL = [[1.0, 0, 0, 0], [0.25, 0.75, 0, 0], [0.5, 0.3, 0.2, 0], [0.1, 0.2, 0.3, 0.4]]


@pytest.mark.parametrize(
    ("scorer", "expected"),
    [
        (PromptAttention(), [1.85, 1.25, 0.5, 0.4]),
        (PromptAttention(reduce="mean"), [1.85 / 4, 1.25 / 3, 0.25, 0.4]),
        (PromptAttention(reduce="max"), [1, 0.75, 0.3, 0.4]),
        (PromptAttention(distance=1), [0.85, 0.5, 0.3, 0]),
        (PromptAttention(reduce="max", distance=2), [0.5, 0.2, 0, 0]),
        (PromptAttention(stride=2), [0.35, 0.95, 0.3, 0.4]),
        (PromptAttention(reduce="mean", stride=2), [0.175, 0.475, 0.3, 0.4]),
        (PromptAttention(reduce="mean", distance=1), [0.85 / 3, 0.25, 0.3, 0]),
    ],
)
def test_prompt_attention_asks_all_queries(device, scorer, expected):
    check(scorer.score(attention_inputs([[CAUSAL]], device)), [expected])


@pytest.mark.parametrize(
    ("how", "expected"),
    [("mean", [1.45, 0.55]), ("sum", [2.9, 1.1]), ("max", [1.75, 0.85])],
)
def test_prompt_attention_reduces_the_group(device, how, expected):
    """Column sums 1.75 0.25 and 1.15 0.85 of two q heads."""
    first, second = [[1.0, 0], [0.75, 0.25]], [[1.0, 0], [0.15, 0.85]]
    scores = PromptAttention(group_reduce=how).score(attention_inputs([[first, second]], device))
    check(scores, [expected])


def test_prompt_attention_in_pieces_is_the_whole(device):
    """More rows than are held at a time, with the options of every model."""
    prompt = Prompt(batch=1, kv_heads=2, group=2, length=300, head_dim=16)
    inputs = layer_inputs(prompt, device, all_queries=True)
    sink_logits = torch.tensor([0.5, 1, 2, -1], device=device)
    inputs = replace(inputs, attention=Attention(softcap=3.0, sink_logits=sink_logits))
    q, k = inputs.queries.double().cpu(), inputs.keys.double().cpu().repeat_interleave(2, 1)
    z = 3 * torch.tanh(q @ k.mT / 4 / 3)
    z = z.masked_fill(~torch.ones(300, 300).tril().bool(), -torch.inf)
    extra = sink_logits.cpu().double().view(1, 4, 1, 1).expand(1, 4, 300, 1)
    p = torch.cat([z, extra], -1).softmax(-1)[..., :300]
    expected = p.sum(2).view(1, 2, 2, 300).mean(2)
    torch.testing.assert_close(PromptAttention().score(inputs).cpu(), expected.float())


# --- Column maxima --------------------------------------------------------------------------------


def test_column_max_has_a_floor_by_norms(device):
    """Column maxima .5 .3 .2 0 of the first three entries' later queries; norms 1 1 4 2."""
    inputs = attention_inputs([[CAUSAL]], device, norms=[[1.0, 1, 4, 2]])
    settings = {"window": 1, "distance": 1, "pinned": 0}
    mean = (0.5 + 0.3 + 0.3) / 3
    check(ColumnMax(**settings, weigh_by="none").score(inputs), [[0.5, 0.3, 0.3]])
    check(ColumnMax(**settings).score(inputs), [[0.5, 0.3, mean * 2]])
    check(ColumnMax(**settings, weigh_by="all").score(inputs), [[0.5, mean, 4 * mean]])
    strided = ColumnMax(**settings, stride=2, weigh_by="none").score(inputs)
    check(strided, [[0.25, 0.2, 0.3]])
    assert ColumnMax(window=1).score(inputs)[..., :4].isinf().all()


def test_column_max_takes_the_norm_that_is_asked_for(device):
    inputs = layer_inputs(Prompt(length=60), device, all_queries=True)
    highest = [
        ColumnMax(window=8, weigh_by="all", norm=norm, pinned=0).score(inputs) / inputs.norms(norm)
        for norm in ("l1", "l2_gram")
    ]
    torch.testing.assert_close(highest[0][..., :52], highest[1][..., :52])
    assert ColumnMax().norm == "l2_gram"


def test_column_max_weighs_the_window(device):
    """The last query gives at most .3, which pooling hands to its neighbours."""
    scorer = ColumnMax(window=1, distance=1, pinned=0, weigh_by="none", window_weight=1.5)
    check(scorer.score(attention_inputs([[CAUSAL]], device)), [[0.5, 0.45, 0.45]])
    with pytest.raises(ValueError, match="window_weight"):
        ColumnMax(window_weight=-1)
    with pytest.raises(ValueError, match="queries must be those of all 60 positions, got 8"):
        ColumnMax(window=8, window_weight=1).score(layer_inputs(Prompt(length=60), device))


# --- Rank fusion ----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"window_weight": 0.0}, {"key_factor": 1}], ids=str)
def test_rank_fusion_takes_the_better_of_two_ranks(device, settings: dict[str, float]):
    """By sorted lists, of prompts of 60 and 45 tokens."""
    prompt = Prompt(batch=2, length=60, head_dim=16)
    lengths = torch.tensor([60, 45], dtype=torch.int32, device=device)
    whole = layer_inputs(prompt, device, all_queries=True)
    inputs = replace(whole, prompt_lens=(60, 45), seq_lens=lengths)
    scorer = RankFusion(window=8, distance=4, stride=1, pinned=0, **settings)
    fused = scorer.score(inputs).cpu()
    weight = scorer.window_weight
    columns = ColumnMax(window=8, distance=4, weigh_by="all", pinned=0, window_weight=weight)
    by_looks = columns.score(inputs).cpu()
    by_keys = KeyDiff(window=8).score(inputs).cpu()
    for b, count in enumerate((52, 37)):
        for head in range(inputs.num_kv_heads):
            looks, keys = by_looks[b, head, :count].tolist(), by_keys[b, head, :count].tolist()
            values = sorted(looks, reverse=True)
            first, second = (
                {t: i for i, t in enumerate(sorted(range(count), key=lambda t: -scores[t]))}
                for scores in (looks, keys)
            )
            factor = scorer.key_factor
            places = [min(first[t], factor * (second[t] + 1) - 1) for t in range(count)]
            expected = torch.tensor([values[place] for place in places])
            assert torch.equal(fused[b, head, :count], expected)


def test_rank_fusion_finds_what_nothing_looked_at(device):
    """Queries look at all entries alike, and the key of entry 3 of four is unlike the others: it
    takes the second place, behind entry 0, which stands first."""
    inputs = attention_inputs([[[[0.2, 0.2, 0.2, 0.2, 0.2]] * 5]], device)
    keys = torch.tensor([[1.0, 1, 1, -1, 1]], device=device)[..., None].repeat(1, 1, 1, 16)
    inputs = replace(inputs, queries=torch.zeros_like(inputs.queries), keys=keys)
    scorer = RankFusion(window=1, distance=1, stride=1, pinned=0, window_weight=0)
    columns = ColumnMax(window=1, distance=1, weigh_by="all", pinned=0).score(inputs)[0, 0, :4]
    fused = scorer.score(inputs)[0, 0, :4]
    assert columns.argmax() == 0
    assert fused[3] == columns.sort(descending=True).values[1]


def test_rank_fusion_pins_the_first_entries_alone(device):
    scores = RankFusion().score(layer_inputs(Prompt(length=100), device, all_queries=True))
    assert scores[..., :4].isposinf().all()
    assert scores[..., 4:68].isfinite().all()


def test_rank_fusion_names_a_wrong_factor():
    with pytest.raises(ValueError, match=r"key_factor must .* got 0"):
        RankFusion(key_factor=0)


# --- KVzip, arXiv 2505.23416 ----------------------------------------------------------------------


def test_repeat_attention_is_the_most_that_a_repeating_query_gives(device):
    """Two queries behind a prompt of two entries; the rest is on the repetition itself."""
    rows = [[[0.5, 0.1, 0.4, 0], [0.2, 0.3, 0.1, 0.4]], [[0.1, 0.2, 0.7, 0], [0.6, 0.1, 0.1, 0.2]]]
    both = attention_inputs([rows], device)
    prompt = both.keys[:, :, :2]
    repeat = both.queries, both.keys[:, :, 2:]
    inputs = LayerInputs(
        prompt, prompt, prompt, None, (2,), 0, 1, attention=Attention(1.0), repeat=repeat
    )
    check(RepeatAttention(pinned=0).score(inputs), [[0.6, 0.3]])
    with pytest.raises(ValueError, match="repeat must be given"):
        RepeatAttention().score(both)


# --- Expected Attention, arXiv 2510.00636 ---------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "logit"),
    [({}, -1.5), ({"covariance": False}, -2.0), ({"num_future": 2}, -1 + 0.125)],
)
def test_expected_attention_turns_the_queries_on(device, settings, logit):
    """One pair that turns by 90 degrees a position; queries (1, 0) and (3, 0) before RoPE.

    Their mean is (2, 0) and their covariance diag(1, 0). At the next position, 2, that is (-2, 0);
    over the positions 2 and 3 the mean rotation is half of one by 180 and half of one by 270
    degrees, which makes (-1, -1) of the mean and [[1, 1], [1, 1]] / 4 of the covariance.
    """

    def quarter_turns(x: Tensor, positions: Tensor) -> Tensor:
        a, b = x.unbind(-1)
        angle = (positions * (math.pi / 2)).view(-1, 1, positions.shape[-1])
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1)

    queries = torch.tensor([[[[1.0, 0], [0, 3]]]], device=device)
    keys = torch.tensor([[[[0.0, 0], [1, 0]]]], device=device)
    values = torch.tensor([[[[3.0, 4], [0, 1]]]], device=device)
    inputs = LayerInputs(
        queries, keys, values, None, (2,), 0, 1, attention=Attention(1.0, rotate=quarter_turns)
    )
    settings = {"num_future": 1, **settings}
    weight = math.exp(logit)
    scores = ExpectedAttention(window=1, pinned=0, **settings).score(inputs)
    check(scores, [[5 / (1 + weight), weight / (1 + weight)]])
    plain = ExpectedAttention(window=1, pinned=0, value_norm=False, **settings).score(inputs)
    check(plain, [[1 / (1 + weight), weight / (1 + weight)]])
    raised = ExpectedAttention(window=1, pinned=0, epsilon=0.25, **settings).score(inputs)
    check(raised, [[5 / (1 + weight) + 1.25, weight / (1 + weight) + 0.25]])


def test_expected_attention_leaves_the_pinned_out(device):
    inputs = layer_inputs(Prompt(length=40, head_dim=16), device, all_queries=True)
    scores = ExpectedAttention(pinned=4).score(inputs)
    assert scores[..., :4].isposinf().all() and scores[..., 4:].isfinite().all()
    inputs.queries[:, :, :4] *= 100
    inputs.keys[:, :, :4] *= 100
    assert torch.equal(scores, ExpectedAttention(pinned=4).score(inputs))


# --- Scorers of kvpress ---------------------------------------------------------------------------


class Press:
    """Notes what it is handed; scores a token by its first value."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        self.calls.append(SimpleNamespace(**locals()))
        return values[..., 0]


@pytest.mark.parametrize("turns", [False, True])
def test_press_scorer_hands_over_a_layer(device, turns):
    prompt = Prompt(batch=2, group=2, length=50, head_dim=16, seq_lens=(50, 37))
    inputs = layer_inputs(prompt, device, all_queries=True)
    if not turns:
        inputs = replace(inputs, attention=Attention())
    press = Press()
    scores = PressScorer(press, pinned=1).score(inputs)
    for b, (call, length) in enumerate(zip(press.calls, (50, 37), strict=True)):
        assert torch.equal(scores[b, :, 1:length], inputs.values[b, :, 1:length, 0])
        assert scores[b, :, 0].isposinf().all() and scores[b, :, length:].isneginf().all()
        module, (cos, sin) = call.module, call.kwargs["position_embeddings"]
        queries = module.q_proj(call.hidden_states).view(1, length, 4, 16).transpose(1, 2)
        half = torch.cat([-queries[..., 8:], queries[..., :8]], -1)
        turned = queries * cos[:, None] + half * sin[:, None]
        torch.testing.assert_close(turned, inputs.queries[b : b + 1, :, :length])
        assert torch.equal(queries, turned) != turns
        later, _ = module.rotary_emb(queries, torch.arange(50, 53, device=device)[None])
        assert later.shape == (1, 3, 16)
        assert module.o_proj.weight is inputs.w_o and call.attentions is None
        assert (module.config.num_attention_heads, module.num_key_value_groups) == (4, 2)


def test_press_scorer_wants_a_press():
    with pytest.raises(ValueError, match="press must have a method score"):
        PressScorer(press="SnapKVPress")
    with pytest.raises(ValueError, match="needs must hold 'all_queries'"):
        PressScorer(Press(), needs=("w_o",))


# --- Needs and errors -----------------------------------------------------------------------------


def test_scorers_say_what_they_need():
    def needs(scorer: Any) -> frozenset[str]:
        return Policy(scorer, Uniform(), TopScore()).needs

    assert needs(WindowAttention()) == needs(KeyDiff()) == frozenset()
    assert needs(Defensive()) == {"w_o"}
    assert needs(PromptAttention()) == needs(ColumnMax(weigh_by="none")) == {"all_queries"}
    assert needs(ColumnMax()) == {"all_queries", "w_o"}
    assert needs(ExpectedAttention()) == {"all_queries", "rotate"}
    assert needs(RepeatAttention()) == {"repeat"}
    assert needs(PressScorer(Press(), needs=("all_queries", "w_o"))) == {"all_queries", "w_o"}


def test_scorers_name_what_is_missing(device):
    inputs = layer_inputs(Prompt(), device)
    with pytest.raises(ValueError, match="queries must be those of all 100 positions, got 8"):
        PromptAttention().score(inputs)
    with pytest.raises(ValueError, match=r"queries must be .* last 32 positions .*got 8"):
        Defensive().score(inputs)
    bare = replace(layer_inputs(Prompt(), device, all_queries=True), attention=Attention())
    with pytest.raises(ValueError, match="rotate must be given"):
        ExpectedAttention().score(bare)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Defensive(pool_width=2), "pool_width must be odd, got 2"),
        (lambda: Defensive(norm_share="x"), "norm_share must be one of none, entries, heads"),
        (lambda: LastQuery(pinned=-1), "pinned must be at least 0, got -1"),
        (lambda: KeyDiff(window=0), "window must be at least 1, got 0"),
        (lambda: PromptAttention(reduce="min"), "reduce must be one of mean, max, sum"),
        (lambda: PromptAttention(distance=-1), "distance must be at least 0, got -1"),
        (lambda: PromptAttention(stride=0), "stride must be at least 1, got 0"),
        (lambda: ExpectedAttention(num_future=0), "num_future must be at least 1, got 0"),
        (lambda: ExpectedAttention(epsilon=-1), "epsilon must be at least 0, got -1"),
    ],
)
def test_scorer_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rotate_of_the_tests_is_a_rotation():
    x = torch.randn(2, 3, 5, 16)
    positions = torch.arange(5)
    torch.testing.assert_close(rotate(rotate(x, positions), -positions), x)
