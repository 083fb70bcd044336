"""What must hold for any policy, and what each part does."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from adakv.policy import (
    Adaptive,
    Capped,
    KeyNorm,
    LayerInputs,
    Policy,
    PromptAttention,
    Pyramid,
    Random,
    Recency,
    TopScore,
    TwoStage,
    Uniform,
    WholePages,
    WindowAttention,
    get,
)
from cases import Prompt
from policy.helpers import bare_inputs, kept_rows, layer_inputs, with_window

SCORER = WindowAttention(window=8)
RAGGED = Prompt(batch=3, kv_heads=4, group=2, length=90, head_dim=16, seq_lens=(90, 47, 71))
BUDGET = 30

ADAPTIVE = [
    Adaptive(safeguard=safeguard, floor=floor, layers=layers)
    for safeguard in ("blend", "hard_floor", "none", "official_round")
    for floor in (0.0, 0.2, 1.0)
    for layers in (Uniform().layers, Pyramid())
]


def chosen(policy: Policy, inputs: LayerInputs, budget: int = BUDGET, scores=None):
    return kept_rows(policy.choose(inputs, budget, scores=scores), inputs.num_kv_heads)


def random_inputs(device, prompt: Prompt = RAGGED) -> LayerInputs:
    return layer_inputs(prompt, device)


# --- Invariants of the methods --------------------------------------------------------------------


@pytest.mark.parametrize("selector", [TopScore(), TwoStage()])
@pytest.mark.parametrize("safeguard", ["blend", "hard_floor", "official_round"])
def test_adaptive_with_floor_one_is_uniform(device, safeguard, selector):
    inputs = random_inputs(device)
    adaptive = Policy(SCORER, Adaptive(floor=1.0, safeguard=safeguard), selector)
    assert chosen(adaptive, inputs) == chosen(Policy(SCORER, Uniform(), selector), inputs)


@pytest.mark.parametrize("safeguard", ["blend", "hard_floor", "official_round", "none"])
def test_adaptive_with_floor_zero_is_one_top_k_over_the_layer(device, safeguard):
    inputs = random_inputs(device)
    scores = torch.rand(3, 4, 90, device=device)
    policy = Policy(SCORER, Adaptive(floor=0.0, safeguard=safeguard), TopScore())
    for rows, sequence, length in zip(
        chosen(policy, inputs, scores=scores), scores, inputs.prompt_lens, strict=True
    ):
        n = length - 8
        best = sequence[:, :n].reshape(-1).topk(4 * (BUDGET - 8)).indices
        expected = {(int(i) // n, int(i) % n) for i in best}
        assert {(h, t) for h, row in enumerate(rows) for t in row if t < n} == expected


@pytest.mark.parametrize("allocator", [Uniform(), Adaptive(), Adaptive(layers=Pyramid())])
def test_two_stages_with_equal_norms_are_one(device, allocator):
    inputs = random_inputs(device)
    inputs = replace(inputs, values=torch.ones_like(inputs.keys))
    two_stage = Policy(SCORER, allocator, TwoStage(eps=0.0))
    assert chosen(two_stage, inputs) == chosen(Policy(SCORER, allocator, TopScore()), inputs)


@pytest.mark.parametrize("first", [0.0, 0.5, 1.0])
def test_two_stages_keep_the_first_share_by_score(device, first):
    inputs = random_inputs(device)
    scores = torch.rand(3, 4, 90, device=device)
    rows = chosen(Policy(SCORER, Uniform(), TwoStage(first=first)), inputs, scores=scores)
    budget = 8 + int(first * (BUDGET - 8))
    by_score = chosen(Policy(SCORER, Uniform(), TopScore()), inputs, budget, scores)
    for row, best in zip(itertools.chain(*rows), itertools.chain(*by_score), strict=True):
        assert set(best) <= set(row)
    assert (rows == chosen(Policy(SCORER, Uniform(), TopScore()), inputs, scores=scores)) == (
        first == 1.0
    )


@pytest.mark.parametrize(
    "allocator",
    # Not "blend" between 0 and 1: equal remainders go to the lower head.
    [Uniform(), *(a for a in ADAPTIVE if a.safeguard != "blend" or a.floor in (0, 1))],
    ids=repr,
)
@pytest.mark.parametrize("selector", [TopScore(), TwoStage()])
def test_choose_permutes_with_the_heads(device, allocator, selector):
    inputs = random_inputs(device)
    order = torch.tensor([2, 0, 3, 1])
    group = (order[:, None] * 2 + torch.arange(2)).flatten()
    w_o = inputs.w_o.view(96, 8, 16)[:, group].reshape(96, 128)
    permuted = replace(
        inputs,
        queries=inputs.queries[:, group],
        keys=inputs.keys[:, order],
        values=inputs.values[:, order],
        w_o=w_o,
    )
    policy = Policy(WindowAttention(window=8, pool="none"), allocator, selector)
    rows = chosen(policy, inputs)
    assert chosen(policy, permuted) == [[row[h] for h in order] for row in rows]


@pytest.mark.parametrize("allocator", ADAPTIVE, ids=repr)
def test_choose_ignores_the_rest_of_the_batch(device, allocator):
    """Any order, alone, and padded differently."""
    inputs = random_inputs(device)
    policy = Policy(SCORER, allocator, TwoStage())
    rows = chosen(policy, inputs)
    for b, length in enumerate(inputs.prompt_lens):
        alone = replace(
            inputs,
            queries=inputs.queries[b : b + 1],
            keys=inputs.keys[b : b + 1, :, :length],
            values=inputs.values[b : b + 1, :, :length],
            prompt_lens=(length,),
            seq_lens=None,
        )
        assert chosen(policy, alone) == [rows[b]]


@pytest.mark.parametrize("factor", [2.0**-6, 8.0])
@pytest.mark.parametrize("allocator", [Uniform(), *ADAPTIVE], ids=repr)
def test_choose_ignores_the_scale_of_scores(device, allocator, factor):
    inputs = random_inputs(device)
    scores = torch.rand(3, 4, 90, device=device)
    for one, other in [
        (TopScore(), TopScore()),
        (TwoStage(), TwoStage(eps=1e-4 * factor)),
    ]:
        rows = chosen(Policy(SCORER, allocator, one), inputs, scores=scores)
        assert chosen(Policy(SCORER, allocator, other), inputs, scores=scores * factor) == rows


@pytest.mark.parametrize("allocator", [Uniform(), *ADAPTIVE], ids=repr)
@pytest.mark.parametrize("extra", [0, 1, 1000])
def test_choose_with_enough_budget_keeps_everything(device, allocator, extra):
    inputs = random_inputs(device)
    rows = chosen(Policy(SCORER, allocator, TwoStage()), inputs, 90 + extra)
    assert rows == [[list(range(length))] * 4 for length in inputs.prompt_lens]


@pytest.mark.parametrize("budget", [8, 9, 46, 47, 89])
@pytest.mark.parametrize("allocator", ADAPTIVE, ids=repr)
def test_totals_are_exact_at_the_edges(device, allocator, budget):
    inputs = random_inputs(device)
    policy = Policy(SCORER, allocator, TopScore())
    counts = [sum(map(len, rows)) for rows in chosen(policy, inputs, budget)]
    totals = policy.totals(inputs, budget)
    if allocator.safeguard == "official_round":
        assert all(c <= t <= c + 4 for c, t in zip(counts, totals, strict=True))
    else:
        assert counts == list(totals)
    if allocator.layers == Uniform().layers and allocator.safeguard != "official_round":
        assert list(totals) == [4 * min(budget, n) for n in inputs.prompt_lens]


@pytest.mark.parametrize("num_layers", [1, 2, 7, 32])
@pytest.mark.parametrize("prompt_len", [5, 33, 100, 4000])
@pytest.mark.parametrize("mean", [32, 33, 64, 1024])
def test_pyramid_conserves_the_mean(mean, prompt_len, num_layers):
    layers = [
        Pyramid().budget(mean, window=32, prompt_len=prompt_len, layer=i, num_layers=num_layers)
        for i in range(num_layers)
    ]
    kept = [min(x, prompt_len) for x in layers]
    assert sum(kept) == num_layers * min(mean, prompt_len)
    assert kept == sorted(kept, reverse=True)
    assert min(kept) >= min(32, prompt_len)


# --- Parts ----------------------------------------------------------------------------------------


def test_recency_keeps_the_first_and_the_last(device):
    inputs = random_inputs(device)
    rows = chosen(Policy(Recency(pinned=4), Uniform(), TopScore()), inputs, 10)
    assert rows == [[[0, 1, 2, 3, *range(n - 6, n)]] * 4 for n in inputs.prompt_lens]


def test_key_norm_keeps_the_shortest_keys(device):
    inputs = random_inputs(device)
    rows = chosen(Policy(KeyNorm(window=8), Uniform(), TopScore()), inputs)
    for b, n in enumerate(inputs.prompt_lens):
        for h, row in enumerate(rows[b]):
            lengths = inputs.keys[b, h, : n - 8].norm(dim=-1)
            shortest = lengths.topk(BUDGET - 8, largest=False).indices.sort().values
            assert row == [*shortest.tolist(), *range(n - 8, n)]


def test_random_is_even_and_depends_on_seed_layer_head_and_position_alone(device):
    prompt = Prompt(batch=2, kv_heads=2, group=1, length=4000, head_dim=8, window=1)
    noise = Random().score(layer_inputs(prompt, device))
    assert torch.equal(noise[0], noise[1])
    assert noise.min() >= 0 and noise.max() < 1 and abs(float(noise.mean()) - 0.5) < 0.02
    histogram = torch.histc(noise[0].cpu(), 10, 0, 1)
    assert histogram.min() > 600, histogram
    correlation = torch.corrcoef(noise[0].cpu())[0, 1]
    assert abs(float(correlation)) < 0.05
    short = Prompt(batch=1, kv_heads=2, group=1, length=100, head_dim=8, window=1)
    assert torch.equal(Random().score(layer_inputs(short, device))[0], noise[0, :, :100])
    for other in (
        Random(seed=1).score(layer_inputs(prompt, device)),
        Random().score(layer_inputs(prompt, device, layer=2)),
    ):
        assert not torch.equal(noise, other)


@pytest.mark.parametrize(
    "scorer", [WindowAttention(window=8, pinned=3), KeyNorm(window=8, pinned=3), Random(pinned=3)]
)
@pytest.mark.parametrize("allocator", [Uniform(), Adaptive(floor=0.0), Adaptive(floor=0.2)])
@pytest.mark.parametrize("selector", [TopScore(), TwoStage(), TwoStage(first=0.0)])
def test_first_entries_are_pinned(device, scorer, allocator, selector):
    prompt = Prompt(**{**vars(RAGGED), "window": scorer.window})
    inputs = random_inputs(device, prompt)
    inputs.values[:, :, :3] = 0  # their norm is 0, and still they stay
    rows = chosen(Policy(scorer, allocator, selector), inputs, scorer.window + 4)
    assert all(row[:3] == [0, 1, 2] for row in itertools.chain(*rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_choose_takes_scores_from_outside(device, dtype):
    scores = with_window([[5, 1, 4, 2, 3], [1, 2, 3, 4, 5]], 1, device).to(dtype)
    policy = Policy(WindowAttention(window=1), Uniform(), TopScore())
    assert chosen(policy, bare_inputs(scores), 3, scores) == [[[0, 2, 5], [3, 4, 5]]]
    scores[0, 0, 1] = float("inf")
    scores[0, 1, 4] = float("nan")
    assert chosen(policy, bare_inputs(scores), 3, scores) == [[[0, 1, 5], [2, 3, 5]]]


def test_capped_leaves_prompts_whole_that_fit(device):
    """Beside one that doesn't, of which what has no score leaves, too."""
    inputs = layer_inputs(replace(RAGGED, seq_lens=(90, 30, 71)), device)
    scores = torch.rand(3, 4, 90, device=device)
    scores[..., ::2] = -torch.inf
    rows = chosen(Policy(SCORER, Capped(), TopScore()), inputs, 60, scores)
    for b, length in ((0, 90), (2, 71)):
        assert rows[b] == [[*range(1, length - 8, 2), *range(length - 8, length)]] * 4
    assert rows[1] == [list(range(30))] * 4


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WindowAttention(window=0), "window must be at least 1, got 0"),
        (lambda: WindowAttention(pool_width=4), "pool_width must be odd, got 4"),
        (lambda: WindowAttention(pool_width=65), r"pool_width must be in \[1, 63\], got 65"),
        (lambda: WindowAttention(pinned=-1), "pinned must be at least 0, got -1"),
        (
            lambda: WindowAttention(pool="median"),
            "pool must be one of max, avg, none; got 'median'",
        ),
        (lambda: WindowAttention(order="x"), "order must be one of group_first, pool_first"),
        (lambda: WindowAttention(group_reduce="x"), "group_reduce must be one of mean, max, sum"),
        (lambda: WindowAttention(window_reduce="x"), "window_reduce must be one of"),
        (lambda: KeyNorm(window=0), "window must be at least 1, got 0"),
        (lambda: Recency(pinned=-1), "pinned must be at least 0, got -1"),
        (lambda: Random(seed=-1), r"seed must be in \[0, 2147483647\], got -1"),
        (lambda: Adaptive(floor=1.5), r"floor must be in \[0, 1\], got 1.5"),
        (lambda: Adaptive(floor=float("nan")), r"floor must be in \[0, 1\], got nan"),
        (lambda: Adaptive(safeguard="soft"), "safeguard must be one of blend, hard_floor"),
        (lambda: Adaptive(budgets_from="x"), "budgets_from must be one of scores, critical"),
        (lambda: Pyramid(beta=0), "beta must be at least 1, got 0"),
        (lambda: Pyramid(rounding="up"), "rounding must be one of exact, official; got 'up'"),
        (lambda: Pyramid(short_prompts="x"), "short_prompts must be one of pyramid, flat"),
        (lambda: TwoStage(first=-0.1), r"first must be in \[0, 1\], got -0.1"),
        (lambda: TwoStage(eps=-1), "eps must be at least 0, got -1"),
        (lambda: TwoStage(norm="l3"), "norm must be one of l1, l2_gram; got 'l3'"),
    ],
)
def test_part_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_lens": (90, 47)}, "prompt_lens must hold the length of each of the 3 sequences"),
        ({"prompt_lens": (91, 47, 71)}, r"prompt_lens must be in \[0, 90\]"),
        ({"seq_lens": None}, "seq_lens must be given when prompts are shorter than T = 90"),
        ({"layer": 4}, r"layer must be in \[0, 4\), got 4"),
        ({"values": torch.zeros(3, 4, 89, 8)}, r"keys and values must be \[B, Hkv, T, D\] and"),
    ],
)
def test_layer_inputs_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(random_inputs(torch.device("cpu")), **changes)


def test_choose_names_what_is_wrong(device):
    inputs = random_inputs(device)
    policy = Policy(SCORER, Uniform(), TopScore())
    with pytest.raises(ValueError, match=r"at least 8 entries .*window 8, pinned 0.*got 7"):
        policy.choose(inputs, 7)
    with pytest.raises(ValueError, match=r"at least 11 entries .*window 8, pinned 3.*got 10"):
        Policy(WindowAttention(window=8, pinned=3), Uniform(), TopScore()).totals(inputs, 10)
    with pytest.raises(ValueError, match=r"queries must be .* last 32 positions .*got 8"):
        get("snapkv").choose(inputs, 40)
    with pytest.raises(ValueError, match="w_o must be given"):
        Policy(SCORER, Uniform(), TwoStage()).choose(replace(inputs, w_o=None), 30)
    for scores in (
        torch.zeros(3, 4, 89, device=device),
        torch.zeros(3, 4, 90, device=device).int(),
    ):
        with pytest.raises(ValueError, match=r"scores must be floating point \[B, Hkv, T\]"):
            policy.choose(inputs, 30, scores=scores)


def test_policy_says_what_it_needs():
    assert get("ada_snapkv").window == 32
    assert get("ada_snapkv").needs == frozenset()
    assert get("critical_ada_snapkv").needs == {"w_o"}
    by_norms = Adaptive(budgets_from="critical")
    assert Policy(SCORER, by_norms, TopScore()).needs == {"w_o"}
    assert Policy(SCORER, WholePages(by_norms), TopScore()).needs == {"w_o"}
    assert Policy(PromptAttention(), by_norms, TwoStage()).needs == {"all_queries", "w_o"}


def test_policy_parts_are_values():
    """Equal settings are equal policies, and a policy can be a key."""
    assert len({get("snapkv"), Policy(WindowAttention(), Uniform(), TopScore())}) == 1


def test_norms_are_computed_once_for_a_layer(device):
    inputs = random_inputs(device)
    assert inputs.norms() is inputs.norms("l1")
    assert inputs.norms("l2_gram") is not inputs.norms()


def test_pin_window_marks_the_last_entries_of_each_sequence(device):
    inputs = random_inputs(device)
    pinned = inputs.pin_window(torch.zeros(3, 4, 90, device=device), 5).isposinf()
    expected = torch.zeros(3, 4, 90, dtype=torch.bool)
    for b, n in enumerate(inputs.prompt_lens):
        expected[b, :, n - 5 : n] = True
    assert torch.equal(pinned.cpu(), expected)
