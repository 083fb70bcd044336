"""Whole engines on the CPU that choose from texts while they are written."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm.v1", reason="vllm isn't installed; make test-vllm runs these tests")

from adakv.vllm.config import Settings
from vllm_engine import (
    DRAFTS,
    SMALL,
    Engine,
    Run,
    elsewhere,
    engine,
    random_text,
    run_elsewhere,
    save_gemma2,
    save_llama,
)
from vllm_reference import Reference
from vllm_two_backends import FULL_ATTENTION, run_with_two_backends

#: Blocks of 32 tokens.
TEXT = {"decode_budget": 64, "every": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


def check_against_reference(
    model: str, settings: Settings, prompts: list[list[int]], run: Run
) -> None:
    """A request whose last step chose from its text is left out: what it kept is not known."""
    reference, rule = Reference(model, settings), settings.rule
    assert rule is not None
    num_ties = 0
    for number, prompt in enumerate(prompts):
        tokens = run.tokens[number]
        if not tokens or not run.compressions[number]:
            continue
        last = run.compressions[number][-1]
        due = (last.choices or (last.boundary + rule.budget,))[-1] + rule.every
        known = tokens[:-1] if due <= len(prompt) + len(tokens) - 1 else tokens
        expected = reference.choices(prompt, known, run.compressions[number])
        if expected != known:
            assert reference.is_tied(prompt, known, run.compressions[number]), (number, expected)
            num_ties += 1
    assert num_ties <= max(1, len(prompts) // 10)


def check_all_is_free(it: Engine) -> None:
    assert it.num_free == it.manager.block_pool.num_gpu_blocks - 1
    assert not it.manager._ledger.has_orders


@pytest.mark.parametrize(
    ("policy", "more", "runs_ahead"),
    [
        ("ada_snapkv", {}, False),
        ("ada_snapkv", {"mode": "exact", "decode_policy": "r_kv"}, True),
    ],
)
def test_long_answers_take_no_more_blocks(
    model: str, policy: str, more: dict[str, Any], runs_ahead: bool
):
    """450 tokens behind a prompt that is compressed, and one that stays whole."""
    rng = random.Random(0)
    prompts = [random_text(rng, 200), random_text(rng, 50)]
    settings = Settings(policy, 64, **TEXT, **more)
    with engine(model, settings, runs_ahead=runs_ahead) as it:
        run = it.run(prompts, 450)
        counts = it.manager._ledger.counts
        check_all_is_free(it)
    assert counts.texts_compressed == 10  # at 128, 192, ... 448 each, or one less
    used = [max(run.free_blocks) - free for free in run.free_blocks]
    later = [max(used[begin : begin + 64]) for begin in range(140, 400, 64)]
    assert max(later) - min(later) <= 1, later
    check_against_reference(model, settings, prompts, run)


def test_text_within_its_budget_is_plain_vllms(model: str):
    """Nothing is chosen before there are as many tokens as the budget and ``every``."""
    prompts = [random_text(random.Random(1), n) for n in (40, 131, 300)]
    with engine(model) as plain:
        expected = plain.run(prompts, 190)
    with engine(model, Settings(budget=800, decode_budget=128, every=64)) as it:
        run = it.run(prompts, 190)
        assert it.manager._ledger.counts.texts_compressed == 0
        check_all_is_free(it)
    assert run.tokens == expected.tokens


@pytest.mark.parametrize(
    ("policy", "more", "runs_ahead"),
    [
        ("ada_snapkv", {}, True),
        ("ada_snapkv", {"mode": "exact", "decode_policy": "critical_ada_snapkv"}, False),
        ("model_column_max", {"decode_policy": "r_kv"}, True),
        ("layer_defensive", {"decode_policy": "streaming", "mode": "exact"}, False),
        ("h2o", {"decode_policy": "corm"}, True),
    ],
)
def test_random_requests_write_what_transformers_write(
    model: str, policy: str, more: dict[str, Any], runs_ahead: bool
):
    """Chunks of 100 tokens, a pool so small that requests are preempted, some are aborted."""
    rng = random.Random(2)
    prompts = [random_text(rng, rng.randint(20, 300)) for _ in range(30)]
    counts = [rng.choice([3, 40, 150, 300]) for _ in prompts]
    come = sorted(rng.randrange(60) for _ in prompts)
    leave = {number: come[number] + rng.randint(1, 200) for number in (3, 9, 17)}
    settings = Settings(policy, 64, **TEXT, **more)
    with engine(model, settings, runs_ahead=runs_ahead, **SMALL) as it:
        run = it.run(prompts, counts, come=come, leave=leave)
        done = it.manager._ledger.counts
        check_all_is_free(it)
    assert run.preemptions > 0 and done.texts_compressed > 10
    check_against_reference(model, settings, prompts, run)


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_texts_beside_a_prefix_cache(model: str, runs_ahead: bool):
    """Common beginnings, also of prompts that stay whole, whose first blocks change."""
    rng = random.Random(3)
    begins = [random_text(rng, n) for n in (64, 150, 250)]
    prompts = [rng.choice(begins) + random_text(rng, rng.randint(1, 60)) for _ in range(20)]
    prompts += [begins[0] + random_text(rng, 40) for _ in range(4)]
    counts = [rng.choice([3, 150, 260]) for _ in prompts]
    settings = Settings("ada_snapkv", 64, **TEXT)
    options = {"enable_prefix_caching": True, "max_num_batched_tokens": 100}
    with engine(model, settings, runs_ahead=runs_ahead, **options) as it:
        run = it.run(prompts, counts, come=[3 * i for i in range(len(prompts))])
        again = it.run(prompts[-4:], 100)
        assert it.manager._ledger.counts.texts_compressed > 20
        check_all_is_free(it)
    assert sum(run.cached) > 400 and sum(again.cached) > 0
    check_against_reference(model, settings, prompts, run)
    check_against_reference(model, settings, prompts[-4:], again)


def test_texts_in_blocks_of_codes(model: str):
    prompts = [random_text(random.Random(4), n) for n in (50, 200, 333)]
    settings = Settings("ada_snapkv", 64, kv_dtype="int8", **TEXT)
    with engine(model, settings, dtype="bfloat16") as it:
        it.run(prompts, 400)
        assert it.manager._ledger.counts.texts_compressed == 3 * 5
        check_all_is_free(it)


def test_texts_with_the_backend_for_cuda(tmp_path: Path):
    """Steps of one token for each request lie in buffers, of which the next step learns."""
    model = save_gemma2(tmp_path)
    prompts = [random_text(random.Random(5), n) for n in (60, 200, 333)]
    settings = Settings("ada_snapkv", 64, decode_policy="critical_ada_snapkv", **TEXT)
    whole = Settings("ada_snapkv", 400, decode_budget=300)
    plain, same, (run, backends) = elsewhere(
        run_with_two_backends,
        [
            (model, None, {}),
            (model, whole, FULL_ATTENTION),
            (model, settings, FULL_ATTENTION),
        ],
        prompts,
        300,
    )
    assert same[0].tokens == plain[0].tokens and backends["CUSTOM"] == 2
    assert all(len(cs[-1].choices) >= 2 for cs in run.compressions)
    check_against_reference(model, settings, prompts, run)


def test_requests_that_stay_whole_keep_their_texts(model: str):
    prompts = [random_text(random.Random(6), n) for n in (100, 200)]
    with engine(model) as plain:
        expected = plain.run(prompts[:1], 300)
    settings = Settings("ada_snapkv", 64, **TEXT)
    with engine(model, settings) as it:
        run = it.run(prompts, 300, wishes={0: {"policy": "off"}})
        check_all_is_free(it)
    assert run.tokens[0] == expected.tokens[0] and not run.compressions[0][-1].choices
    assert len(run.compressions[1][-1].choices) == 3


def test_engine_refuses_what_texts_cannot_have(model: str):
    settings = Settings(decode_budget=64)
    with pytest.raises(Exception, match="decode_budget must not be given with drafts"):
        run_elsewhere(model, settings, [[1, 2, 3]], 1, speculative_config=DRAFTS)
    with (
        pytest.raises(
            Exception, match="every must be at least two blocks of 32 tokens each, got 9"
        ),
        engine(model, Settings(decode_budget=64, every=9)),
    ):
        pass


@pytest.mark.parametrize(
    ("policy", "more", "runs_ahead", "caches"),
    [
        ("ada_snapkv", {}, True, True),
        ("snapkv", {"mode": "exact", "decode_policy": "r_kv"}, False, False),
    ],
)
def test_texts_under_pressure(
    model: str, policy: str, more: dict[str, Any], runs_ahead: bool, caches: bool
):
    """Short prompts whose answers outgrow the pool, and long ones: nobody is preempted."""
    rng = random.Random(7)
    prompts = [random_text(rng, n) for n in (40, 50, 60, 70, 300, 320)]
    settings = Settings(policy, 64, when="pressure", **TEXT, **more)
    ample = {"num_gpu_blocks_override": 120, "enable_prefix_caching": caches}
    with engine(model) as plain:
        expected = plain.run(prompts, 300)
    with engine(model, settings, runs_ahead=runs_ahead, **ample) as it:
        run = it.run(prompts, 300)
        assert it.manager._ledger.counts.texts_compressed == 0
    assert run.tokens == expected.tokens
    short = ample | {"num_gpu_blocks_override": 62, "max_model_len": 640}
    with engine(model, settings, runs_ahead=runs_ahead, **short) as it:
        run = it.run(prompts, 300)
        done = it.manager._ledger.counts
        check_all_is_free(it)
    assert run.preemptions == 0 and done.texts_compressed > 4
    assert done.requests_compressed == done.compressed_under_pressure == 2
    check_against_reference(model, settings, prompts[:4], run)  # the others are cut down late
