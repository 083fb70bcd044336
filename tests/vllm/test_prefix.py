"""Whole engines on the CPU with prefix caching: what they read, write, and give back."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm.v1", reason="vllm isn't installed; make test-vllm runs these tests")

from adakv.vllm.config import Settings
from vllm_engine import (
    BLOCK,
    SMALL,
    Compression,
    Engine,
    Run,
    engine,
    random_text,
    save_gemma2,
    save_llama,
)
from vllm_reference import Reference, preferred

WINDOW = 32  # of ada_snapkv


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


def check_against_reference(
    model: str, settings: Settings, prompts: list[list[int]], run: Run
) -> None:
    reference, found = Reference(model, settings), {}
    for number, (prompt, tokens) in enumerate(zip(prompts, run.tokens, strict=True)):
        compressions = run.compressions[number]
        if len(tokens) == 1:  # it ended before anything was decided
            compressions = [Compression(len(prompt), 0, torch.zeros(3, 2))]
        if tokens:
            found[number] = reference.differences(prompt, tokens, compressions)
    assert not {i: places for i, places in found.items() if places}


def chats(it: Engine, seed: int, *, number: int, turns: int) -> tuple[list[list[int]], list[int]]:
    """Texts of conversations behind one system prompt, and the tokens that each turn read of them;
    the first of them is a step ahead of the others."""
    rng = random.Random(seed)
    system = random_text(rng, 200)
    texts = [system + random_text(rng, rng.randint(25, 60)) for _ in range(number)]
    read = []
    for _ in range(turns):
        run = it.run(texts, 20, come=[0, *[1] * (number - 1)])
        read.append(sum(map(len, texts)) - sum(run.cached))
        for text, tokens in zip(texts, run.tokens, strict=True):
            text += tokens + random_text(rng, rng.randint(25, 60))
        assert it.num_free == it.manager.block_pool.num_gpu_blocks - 1
    return texts, read


@pytest.mark.parametrize(
    ("policy", "runs_ahead", "pool"),
    [
        ("ada_snapkv", False, 300),
        ("ada_snapkv", True, 44),
        ("critical_ada_snapkv", False, 44),
        ("streaming", True, 300),
        ("layer_defensive", True, 44),
    ],
)
def test_chats_write_what_they_do_without_caching(
    model: str, policy: str, runs_ahead: bool, pool: int
):
    settings = Settings(policy, 64)
    options = {"num_gpu_blocks_override": pool, "runs_ahead": runs_ahead, "max_model_len": 1024}
    with engine(model, settings, **options) as it:
        expected, everything = chats(it, 1, number=4, turns=4)
    with engine(model, settings, enable_prefix_caching=True, **options) as it:
        texts, read = chats(it, 1, number=4, turns=4)
    assert texts == expected
    if pool == 300:  # in the first turn one for all, then what is new, and a part of a block
        assert read[0] <= everything[0] - 3 * (200 // BLOCK * BLOCK)
        most = 60 + 20 + BLOCK + WINDOW
        assert all(count <= 4 * most for count in read[1:])


def test_engine_without_compression_finds_what_plain_vllm_finds(model: str):
    """Texts that fit into the budget: also what was written is found."""
    options = {"enable_prefix_caching": True, "num_gpu_blocks_override": 300}
    with engine(model, **options) as plain:
        expected, least = chats(plain, 2, number=3, turns=3)
    with engine(model, Settings(budget=600), **options) as it:
        texts, read = chats(it, 2, number=3, turns=3)
    assert texts == expected
    # The window's tokens are read again where plain vLLM reads one token of a block.
    assert all(a <= b + 3 * (WINDOW + BLOCK) for a, b in zip(read, least, strict=True))


def run_random_requests(it: Engine) -> tuple[list[list[int]], Run]:
    """Chunks of 100 tokens, a pool so small that requests are preempted, some are aborted; their
    prompts, and what came of them."""
    rng = random.Random(5)
    begins = [random_text(rng, n) for n in (60, 150, 250)]
    prompts = [
        rng.choice(begins)[: rng.randint(100, 500)] + random_text(rng, rng.choice([0, 1, 40, 100]))
        for _ in range(30)
    ]
    prompts[20], prompts[25] = prompts[10], prompts[11]
    counts = [rng.choice([1, 5, 40, 140]) for _ in prompts]
    come = sorted(rng.randrange(60) for _ in prompts)
    leave = {number: come[number] + rng.randint(1, 12) for number in (3, 9, 17)}
    run = it.run(prompts, counts, come=come, leave=leave)
    assert it.num_free == 21
    assert not it.cache.prompts
    assert run.preemptions > 0 and sum(run.cached) > 400
    assert sum(not tokens for tokens in run.tokens) <= len(leave)
    return prompts, run


CACHING = SMALL | {"enable_prefix_caching": True}


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_random_requests_with_common_beginnings(model: str, runs_ahead: bool):
    settings = Settings(budget=64)
    with engine(model, settings, runs_ahead=runs_ahead, **CACHING) as it:
        prompts, run = run_random_requests(it)
        again = it.run(prompts[-2:], 20)
        assert it.num_free == 21
    check_against_reference(model, settings, prompts, run)
    check_against_reference(model, settings, prompts[-2:], again)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_random_requests_in_16_bits(
    model: str, dtype: str, record_property: Callable[[str, object], None]
):
    """Their tokens are the choices of a transformers model in float32, up to what 16 bits cost that
    model, which is less than what it costs to evict nothing: in the mean, in nats."""
    settings = Settings(budget=64, mode="exact")
    with engine(model, settings, runs_ahead=True, dtype=dtype, **CACHING) as it:
        prompts, run = run_random_requests(it)
    kind = getattr(torch, dtype)
    exact, rounded = (
        Reference(model, settings, dtype=of_model, engine_dtype=kind)
        for of_model in (torch.float32, kind)
    )
    gaps, errors, gaps_of_whole = [], [], []
    for prompt, tokens, compressions in zip(prompts, run.tokens, run.compressions, strict=True):
        if len(tokens) < 2 or not any(c.lengths.any() for c in compressions):
            continue
        given = prompt, tokens, compressions
        whole = [replace(c, lengths=torch.zeros_like(c.lengths)) for c in compressions]
        logits = exact.logits(*given)
        gaps.append(preferred(logits, tokens))
        errors.append((rounded.logits(*given) - logits).abs().amax(-1))
        gaps_of_whole.append(preferred(logits, exact.choices(prompt, tokens, whole)))
    assert len(gaps) > 10
    means = [torch.cat(x).mean().item() for x in (gaps, errors, gaps_of_whole)]
    record_property("gap of the engine, error of 16 bits, gap of whole prompts", means)
    assert means[0] <= means[1] < means[2] / 2


def test_sliding_windows_share_with_compressed_layers(tmp_path: Path):
    """Gemma2: a prefix is found where both kinds of layers have it."""
    model = save_gemma2(tmp_path)
    settings = Settings(budget=64)
    with engine(model, settings, num_gpu_blocks_override=200) as it:
        expected, everything = chats(it, 3, number=3, turns=3)
    with engine(model, settings, num_gpu_blocks_override=200, enable_prefix_caching=True) as it:
        texts, read = chats(it, 3, number=3, turns=3)
    assert texts == expected
    assert sum(read) < sum(everything) / 2


def test_policy_that_hears_all_queries_finds_nothing(model: str):
    settings = Settings("ada_column_max", 64)
    with engine(model, settings) as it:
        expected, everything = chats(it, 4, number=2, turns=2)
    with engine(model, settings, enable_prefix_caching=True) as it:
        texts, read = chats(it, 4, number=2, turns=2)
    assert texts == expected
    assert read == everything
