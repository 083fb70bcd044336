"""Whole engines on the CPU: tokens, totals and blocks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytest.importorskip("vllm.v1", reason="vllm isn't installed; make test-vllm runs these tests")

from adakv.vllm.config import Settings
from adakv.vllm.pages import spans_layers
from adakv.vllm.plan import plan
from vllm_engine import (
    BLOCK,
    DRAFTS,
    SMALL,
    Run,
    elsewhere,
    engine,
    run_elsewhere,
    save_gemma2,
    save_llama,
)
from vllm_reference import Reference
from vllm_two_backends import FULL_ATTENTION, run_with_two_backends


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


def random_prompts(seed: int, lengths: list[int]) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(length)] for length in lengths]


def check_against_reference(
    model: str, settings: Settings, prompts: list[list[int]], run: Run
) -> None:
    reference = Reference(model, settings)
    requests = zip(prompts, run.tokens, run.compressions, strict=True)
    found = {i: reference.differences(*request) for i, request in enumerate(requests)}
    assert not {i: places for i, places in found.items() if places}


def test_engine_with_a_large_budget_writes_what_plain_vllm_writes(model: str):
    prompts = random_prompts(0, [40, 131, 300, 700])
    with engine(model) as plain:
        assert plain.cache is None
        expected = plain.run(prompts, 24)
    with engine(model, Settings(budget=800), enable_prefix_caching=True) as it:
        it.run(prompts[:2], 1)  # such requests end before anything is decided
        run = it.run(prompts, 24)
        assert it.num_free == it.manager.block_pool.num_gpu_blocks - 1
        assert not it.cache.prompts
    assert run.tokens == expected.tokens
    assert not any(c.lengths.any() for cs in run.compressions for c in cs)


@pytest.mark.parametrize(
    ("policy", "mode", "runs_ahead"),
    [
        ("ada_snapkv", "fill", False),
        ("ada_snapkv", "exact", True),
        ("h2o", "fill", True),
        ("ada_column_max", "exact", False),
        ("ada_expected", "fill", False),
        ("model_column_max", "fill", False),
        ("layer_defensive", "exact", True),
        ("ada_pyramidkv", "exact", False),
    ],
)
def test_engine_writes_what_transformers_writes(
    model: str, policy: str, mode: str, runs_ahead: bool
):
    """Unequal lengths, chunks of 100 tokens, a pool so small that requests are preempted; also with
    the next step scheduled while one runs."""
    rng = random.Random(1)
    prompts = random_prompts(2, [rng.randint(20, 500) for _ in range(30)])
    counts = [rng.randint(3, 140) for _ in prompts]
    settings = Settings(policy, 64, mode)
    with engine(model, settings, runs_ahead=runs_ahead, **SMALL) as it:
        assert it.core.batch_queue_size == (2 if runs_ahead else 1)
        run = it.run(prompts, counts)
        assert it.num_free == 21
    assert run.preemptions > 0
    check_against_reference(model, settings, prompts, run)
    wide = spans_layers(settings.preset)
    heads = None if wide else 2
    for compression in (c for cs in run.compressions for c in cs):
        planned = plan(compression.boundary, budget=64, block_size=BLOCK, num_kv_heads=heads)
        assert compression.lengths.any() == (planned is not None)
        if planned is not None and mode == "exact":
            kept = compression.lengths.sum(1)  # of each layer
            assert kept.sum() == 3 * 2 * 64 if wide else (kept == 2 * 64).all()
            assert not wide or len(set(kept.tolist())) > 1


@pytest.mark.parametrize(
    "policy",
    [
        "critical_ada_snapkv",  # weighs values by the output projection
        "r_kv",  # these two are made for texts while they are written, and take prompts here
        "vase",
    ],
)
def test_engine_keeps_what_the_policy_keeps_under_transformers(model: str, policy: str):
    prompts = random_prompts(4, [200, 400])
    settings = Settings(policy, 64, "exact")
    with engine(model, settings) as it:
        run = it.run(prompts, 12)
    check_against_reference(model, settings, prompts, run)


def test_engine_runs_three_times_the_requests_in_the_same_memory(model: str):
    """Blocks for four whole requests of 1060 tokens: twelve compressed ones run at once."""
    prompts = random_prompts(5, [1000] * 14)
    pool = {"num_gpu_blocks_override": 4 * -(-1060 // BLOCK) + 1, "max_model_len": 1100}
    with engine(model, **pool) as plain:
        whole = plain.run(prompts, 60)
    with engine(model, Settings(budget=128), **pool) as it:
        run = it.run(prompts, 60)
        assert it.num_free == it.manager.block_pool.num_gpu_blocks - 1
    assert whole.most_running <= 5
    assert run.most_running >= 12
    assert run.steps < whole.steps


@pytest.mark.parametrize("policy", ["ada_snapkv", "ada_column_max", "layer_defensive"])
def test_engine_leaves_sliding_windows_to_vllm(tmp_path: Path, policy: str):
    """Gemma2: the other layers are compressed, with capped logits and a scale of their own."""
    model = save_gemma2(tmp_path)
    prompts = random_prompts(6, [60, 200, 333])
    settings = Settings(policy, 64)
    with engine(model, settings, max_num_batched_tokens=100, enable_prefix_caching=True) as it:
        it.run(prompts[1:], 20)
        run = it.run(prompts, 20)
        assert it.cache.num_layers == 2
        assert it.num_free == it.manager.block_pool.num_gpu_blocks - 1
    check_against_reference(model, settings, prompts, run)


def test_backend_for_cuda_leaves_sliding_windows_to_another_one(tmp_path: Path):
    """It is asked for by the kind of a layer; the others have vLLM's own."""
    even, uneven = save_gemma2(tmp_path / "even"), save_gemma2(tmp_path / "uneven", "ssfsss")
    prompts = random_prompts(6, [60, 200, 333])
    caching = FULL_ATTENTION | {"enable_prefix_caching": True}
    small = Settings(budget=64)
    plain, whole, *runs, wrong, none, joined = elsewhere(
        run_with_two_backends,
        [
            (even, None, {}),
            (even, Settings(budget=400), FULL_ATTENTION),
            (even, small, caching),
            (uneven, small, FULL_ATTENTION),
            (even, small, {"attention_backend": "CUSTOM"}),
            (even, small, {}),
            (even, small, FULL_ATTENTION | {"disable_hybrid_kv_cache_manager": True}),
        ],
        prompts,
        20,
    )
    assert (plain[1], whole[1]) == ({"CPU_ATTN": 4}, {"CPU_ATTN": 2, "CUSTOM": 2})
    assert whole[0].tokens == plain[0].tokens
    assert [counts["CUSTOM"] for _, counts in runs] == [2, 1]
    for model, (run, _) in zip((even, uneven), runs, strict=True):
        assert [c.lengths.any() for cs in run.compressions for c in cs] == [False, True, True]
        check_against_reference(model, small, prompts, run)
    assert "instead of attention_backend" in wrong and "full_attention" in wrong
    assert "instead of CPU_ATTN" in none and "full_attention" in none
    assert "disable_hybrid_kv_cache_manager must be off" in joined


def test_engine_refuses_a_policy_of_all_layers_whose_layers_it_splits(tmp_path: Path):
    """Into groups of two, as many as there are of the other kind."""
    model = save_gemma2(tmp_path, "sffsff")
    with (
        pytest.raises(Exception, match="one group of the engine's caches, got one of 2 of 4"),
        engine(model, Settings("layer_defensive", 64)),
    ):
        pass


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({"policy": "kvzip"}, {}, "reads the prompt twice"),
        ({}, {"block_size": 96}, "block_size must be a power of two"),
        ({}, {"kv_cache_dtype": "fp8"}, "kv_cache_dtype must be that of the model"),
    ],
)
def test_engine_refuses_at_start(model: str, given: dict, options: dict, message: str):
    with (
        pytest.raises(Exception, match=message),
        engine(model, None, additional_config={"adakv": given}, **options),
    ):
        pass


def test_engine_drafts_without_changing_the_text(model: str):
    """N-gram drafts: several tokens of a request in one step, some of them taken back."""
    period = random_prompts(3, [9, 7, 5])
    prompts = [(p * 60)[:length] for p, length in zip(period, (170, 260, 333), strict=True)]
    settings = Settings(budget=64)
    with engine(model, settings, max_num_batched_tokens=100) as it:
        expected = it.run(prompts, 40)
    options = {"max_num_batched_tokens": 100, "speculative_config": DRAFTS}
    run = run_elsewhere(model, settings, prompts, 40, **options)
    assert run.tokens == expected.tokens
    assert run.most_at_once > 1
    check_against_reference(model, settings, prompts, run)
