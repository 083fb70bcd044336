"""Whole engines on the CPU that compress when blocks run short, and not before."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytest.importorskip("vllm.v1", reason="vllm isn't installed; make test-vllm runs these tests")

from adakv.vllm.config import Settings
from vllm_engine import (
    DRAFTS,
    SMALL,
    Engine,
    Run,
    engine,
    random_text,
    run_elsewhere,
    save_gemma2,
    save_llama,
)
from vllm_reference import Reference, comparable


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


def check_against_reference(
    model: str, settings: Settings, prompts: list[list[int]], run: Run
) -> int:
    """How many requests were compressed after they had written something."""
    reference, found = Reference(model, settings), {}
    for number, (prompt, tokens) in enumerate(zip(prompts, run.tokens, strict=True)):
        compressions = run.compressions[number]
        if not compressions or not tokens:
            continue
        known = comparable(prompt, tokens, compressions)
        found[number] = reference.differences(prompt, known, compressions)
    assert not {i: places for i, places in found.items() if places}
    compressions = [c for cs in run.compressions for c in cs]
    return sum(c.at is not None and c.at > c.boundary for c in compressions)


def check_all_is_free(it: Engine) -> None:
    assert it.num_free == it.manager.block_pool.num_gpu_blocks - 1
    assert not it.manager._ledger.has_orders


@pytest.mark.parametrize(
    ("policy", "runs_ahead", "caches"),
    [("ada_snapkv", False, True), ("model_column_max", True, False)],
)
def test_engine_with_an_ample_pool_writes_what_plain_vllm_writes(
    model: str, policy: str, runs_ahead: bool, caches: bool
):
    rng = random.Random(0)
    prompts = [random_text(rng, n) for n in (40, 131, 300, 700, 222, 510)]
    options = {"num_gpu_blocks_override": 120, "enable_prefix_caching": caches}
    with engine(model, **options) as plain:
        expected = plain.run(prompts, 40)
    settings = Settings(policy, 64, when="pressure")
    with engine(model, settings, runs_ahead=runs_ahead, **options) as it:
        run = it.run(prompts, 40)
        counts = it.manager._ledger.counts
        check_all_is_free(it)
    assert run.tokens == expected.tokens
    assert counts.requests_compressed == counts.compressed_under_pressure == 0


@pytest.mark.parametrize(
    ("policy", "mode", "runs_ahead", "caches"),
    [
        ("ada_snapkv", "fill", True, True),
        ("ada_snapkv", "exact", False, False),
        ("ada_column_max", "exact", True, False),
        ("model_column_max", "exact", True, False),
        ("critical_ada_snapkv", "fill", False, True),
    ],
)
def test_engine_with_a_short_pool_preempts_nobody(
    model: str, policy: str, mode: str, runs_ahead: bool, caches: bool
):
    """Twelve requests where three whole ones fit, which write until some are compressed."""
    rng = random.Random(1)
    prompts = [random_text(rng, rng.randint(250, 500)) for _ in range(12)]
    counts = [rng.randint(10, 60) for _ in prompts]
    pool = {"num_gpu_blocks_override": 56, "max_model_len": 640, "enable_prefix_caching": caches}
    settings = Settings(policy, 64, mode, when="pressure")
    with engine(model, settings, runs_ahead=runs_ahead, **pool) as it:
        run = it.run(prompts, counts)
        done = it.manager._ledger.counts
        check_all_is_free(it)
    assert run.preemptions == 0 and run.most_running >= 7
    assert done.compressed_under_pressure == done.requests_compressed >= 6
    assert check_against_reference(model, settings, prompts, run) >= 3


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_random_requests_under_pressure(model: str, runs_ahead: bool):
    """Chunks of 100 tokens, common beginnings, a pool so small that requests are preempted, some
    are aborted."""
    rng = random.Random(2)
    begins = [random_text(rng, n) for n in (60, 150, 250)]
    prompts = [
        rng.choice(begins)[: rng.randint(100, 300)] + random_text(rng, rng.choice([0, 1, 40, 100]))
        for _ in range(30)
    ]
    counts = [rng.choice([3, 5, 40, 240]) for _ in prompts]
    come = sorted(rng.randrange(60) for _ in prompts)
    leave = {number: come[number] + rng.randint(1, 12) for number in (3, 9, 17)}
    settings = Settings(budget=64, when="pressure")
    options = SMALL | {"enable_prefix_caching": True, "num_gpu_blocks_override": 27}
    with engine(model, settings, runs_ahead=runs_ahead, **options) as it:
        run = it.run(prompts, counts, come=come, leave=leave)
        done = it.manager._ledger.counts
        check_all_is_free(it)
    assert run.preemptions > 0 and sum(run.cached) > 400
    assert done.compressed_under_pressure > 5 and done.prefix_tokens_found >= sum(run.cached)
    assert check_against_reference(model, settings, prompts, run) >= 1


def test_sliding_windows_beside_layers_under_pressure(tmp_path: Path):
    model = save_gemma2(tmp_path)
    rng = random.Random(3)
    prompts = [random_text(rng, n) for n in (300, 333, 410, 290)]
    options = {"max_model_len": 640, "enable_prefix_caching": True}
    with engine(model, num_gpu_blocks_override=200, **options) as plain:
        expected = plain.run(prompts, 50)
    settings = Settings(budget=64, when="pressure")
    with engine(model, settings, num_gpu_blocks_override=200, **options) as it:
        ample = it.run(prompts, 50)
        check_all_is_free(it)
    with engine(model, settings, num_gpu_blocks_override=44, **options) as it:
        run = it.run(prompts, 50)
        counts = it.manager._ledger.counts
        check_all_is_free(it)
    assert ample.tokens == expected.tokens and run.preemptions == 0
    assert counts.compressed_under_pressure > 0


def test_engine_refuses_drafts_under_pressure(model: str):
    settings = Settings(when="pressure")
    with pytest.raises(Exception, match='drafts need "when": "always", got "pressure"'):
        run_elsewhere(model, settings, [[1, 2, 3]], 1, speculative_config=DRAFTS)
