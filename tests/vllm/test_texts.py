"""Whole engines on the CPU that choose from texts while they are written."""

from __future__ import annotations

import random
from typing import Any

import pytest

pytest.importorskip("vllm.v1", reason="vllm isn't installed; make test-vllm runs these tests")

from adakv.vllm.config import Settings
from vllm_engine import Engine, Run, engine, random_text, save_llama
from vllm_reference import Reference

#: Blocks of 32 tokens.
TEXT = {"decode_budget": 64, "every": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


def check_against_reference(
    model: str, settings: Settings, prompts: list[list[int]], run: Run
) -> None:
    reference = Reference(model, settings)
    for number, (prompt, tokens) in enumerate(zip(prompts, run.tokens, strict=True)):
        if tokens and run.compressions[number]:
            choices = reference.choices(prompt, tokens, run.compressions[number])
            assert choices == tokens, number


def check_all_is_free(it: Engine) -> None:
    assert it.num_free == it.manager.block_pool.num_gpu_blocks - 1
    assert not it.cache.prompts


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
