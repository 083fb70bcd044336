"""What a GPU chooses of a prompt is what the CPU chooses, in thousands of cases full of ties."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from adakv import ops
from cases import random_scores

pytestmark = pytest.mark.gpu

SAFEGUARDS = ("blend", "hard_floor", "official_round", "none")


def hostile_scores(kind: str, batch: int, heads: int, length: int) -> Tensor:
    scores = random_scores(batch, heads, length)
    if kind == "levels":
        return random_scores(batch, heads, length, levels=8)
    if kind == "equal":
        return torch.full_like(scores, 0.25)
    if kind == "bfloat16":
        return scores.bfloat16().float()
    if kind == "zeros":
        scores = torch.zeros_like(scores)
        scores[..., ::2] = -0.0
    if kind == "inf and NaN":
        scores[..., ::7], scores[..., 3::11], scores[..., 5::13] = -torch.inf, torch.nan, torch.inf
    if kind == "one head":
        scores[:, 0] += 1
    return scores


KINDS = ("plain", "levels", "equal", "bfloat16", "zeros", "inf and NaN", "one head")


def choose(scores: Tensor, budget: int, allocation: Any, selection: Any, total: int) -> Any:
    budgets = ops.allocate(scores, budget, **allocation)
    return budgets, ops.select(scores, budgets, total=total, **selection)


def check_equal(scores: Tensor, rng: random.Random) -> None:
    """One case on both devices, with options drawn at random."""
    batch, _, length = scores.shape
    window = rng.choice((0, 1, 8, 32))
    budget = window + rng.choice((0, 1, 2, 7, length // 5, length // 2, length))
    seq_lens = None
    if rng.random() < 0.6:
        seq_lens = torch.randint(0, length + 1, (batch,), dtype=torch.int32)
    norms = None
    if rng.random() < 0.5:
        norms = torch.floor(torch.rand_like(scores) * rng.choice((2, 1000)))
    shared = {"window": window, "seq_lens": seq_lens}
    allocation = {
        **shared,
        "floor": rng.choice((0, 0.2, 0.37, 1)),
        "safeguard": rng.choice(SAFEGUARDS),
    }
    selection = {**shared, "norms": norms, "first": rng.choice((0, 0.3, 0.5, 1))}
    total = scores[..., 0].numel() * length
    expected, wanted = choose(scores, budget, allocation, selection, total)
    for options in (allocation, selection):
        options.update({k: x.cuda() for k, x in options.items() if isinstance(x, Tensor)})
    budgets, kept = choose(scores.cuda(), budget, allocation, selection, total)
    assert torch.equal(budgets.cpu(), expected), (scores.shape, budget, allocation)
    assert torch.equal(kept.indptr.cpu(), wanted.indptr)
    assert torch.equal(kept.positions.cpu(), wanted.positions), (scores.shape, budget, selection)


@pytest.mark.parametrize("seed", range(10))
def test_a_thousand_cases_equal_the_cpu(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(1000):
        longest = rng.choice((9, 50, 300, 5000))
        shape = rng.randint(1, 3), rng.choice((1, 2, 3, 8, 9, 17)), rng.randint(1, longest)
        check_equal(hostile_scores(rng.choice(KINDS), *shape), rng)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [32768, 50001, 131072, 400000])
def test_long_prompts_equal_the_cpu(length: int, kind: str) -> None:
    scores = hostile_scores(kind, 1, 8, length)
    for seed in range(3):
        check_equal(scores, random.Random(seed))


def test_replay_reads_what_is_there_then() -> None:
    scores = random_scores(2, 3, 3000).cuda()
    options = {"window": 8}

    def run() -> tuple[Tensor, ops.Kept]:
        budgets = ops.allocate(scores, 200, **options)
        return budgets, ops.select(scores, budgets, total=1200, **options)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        budgets, kept = run()
    for _ in range(3):
        scores.copy_(random_scores(2, 3, 3000))
        graph.replay()
        expected, wanted = choose(scores.cpu(), 200, options, options, 1200)
        assert torch.equal(budgets.cpu(), expected)
        assert torch.equal(kept.positions.cpu(), wanted.positions)


def test_replay_of_score_and_value_norm() -> None:
    queries = torch.randn(2, 8, 32, 128, device="cuda").bfloat16()
    keys = torch.randn(2, 2, 3000, 128, device="cuda").bfloat16()
    w_o = torch.randn(512, 8 * 128, device="cuda").bfloat16()

    def run() -> tuple[Tensor, ...]:
        norms = (ops.value_norm(keys, w_o, norm=norm) for norm in ("l1", "l2_gram"))
        return ops.score(queries, keys), *norms

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        keys.normal_()
        graph.replay()
        for got, wanted in zip(captured, run(), strict=True):
            assert torch.equal(got, wanted)  # the same inputs, the same bits
