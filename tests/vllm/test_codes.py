"""Whole engines on the CPU whose blocks hold codes."""

from __future__ import annotations

import random
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm.v1", reason="vllm isn't installed; make test-vllm runs these tests")

from transformers import AttentionInterface, AutoModelForCausalLM

import codes
from adakv.vllm.config import Settings
from vllm_engine import (
    BLOCK,
    DRAFTS,
    SMALL,
    elsewhere,
    engine,
    random_text,
    run_elsewhere,
    save_gemma2,
    save_llama,
)
from vllm_two_backends import run_with_two_backends

HEADS, DIM = 2, 32  # of a random model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


def prompts(*lengths: int) -> list[list[int]]:
    rng = random.Random(2)
    return [random_text(rng, length) for length in lengths]


def steps_of(lengths: list[int], most: int) -> list[list[int]]:
    """How many tokens of prompts that come at once each of their steps reads."""
    steps: list[list[int]] = [[] for _ in lengths]
    while any(sum(of) < n for of, n in zip(steps, lengths, strict=True)):
        room = most
        for of, length in zip(steps, lengths, strict=True):
            count = min(length - sum(of), room)
            room -= count or 1  # those that write are first
            of += [count] * (count > 0)
    return steps


def stands_for(kv_dtype: str, k: torch.Tensor, v: torch.Tensor) -> tuple[Any, Any]:
    """What codes of keys and values ``[1, Hkv, T, D]`` in float16 stand for, in float32; of int4
    as far as pages are full."""
    if kv_dtype != "int4":
        return tuple(codes.dequantise(*codes.quantise(x, kv_dtype), torch.float32) for x in (k, v))
    keys, values = k.float(), v.float()
    for head in range(k.shape[1]):
        for end in range(BLOCK, k.shape[2] + 1, BLOCK):
            page = (0, head, slice(end - BLOCK, end))
            held = codes.quantise_page(k[page], v[page])
            keys[page], values[page] = codes.dequantise_page(*held, torch.float32)
    return keys, values


@torch.no_grad()
def logits(
    folder: str,
    kv_dtype: str,
    dtype: torch.dtype,
    text: list[int],
    count: int,
    steps: list[int] | None = None,
) -> torch.Tensor:
    """What a model says before each of a text's last tokens, which always attends to what codes
    stand for, of keys and values in float16. Of int4 these are the pages that are full after each
    of the ``steps``; one that a single token fills is codes behind it."""
    ends = list(accumulate([*(steps or []), *[1] * (count - 1)]))
    starts = [0, *ends]
    full = [(end - (end - begin == 1)) // BLOCK * BLOCK for begin, end in pairwise(starts)]
    counts = torch.tensor([end - begin for begin, end in pairwise(starts)])

    def attend(module: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
        k, v = k.half(), v.half()
        keys, values = stands_for(kv_dtype, k, v)
        group, place = q.shape[1] // k.shape[1], torch.arange(k.shape[2])
        is_code = torch.ones(len(place), len(place), dtype=torch.bool)
        if kv_dtype == "int4":
            is_code = place < torch.tensor(full).repeat_interleave(counts)[:, None]
        k, v, keys, values = (x.float().repeat_interleave(group, 1) for x in (k, v, keys, values))
        weights = torch.where(is_code, q.float() @ keys.mT, q.float() @ k.mT) * q.shape[-1] ** -0.5
        weights = weights.masked_fill(place > place[:, None], -torch.inf).softmax(-1)
        out = (weights * is_code) @ values + (weights * ~is_code) @ v
        return out.to(q.dtype).transpose(1, 2), None

    AttentionInterface.register("codes", attend)
    it = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="codes")
    return it(torch.tensor([text[:-1]]), use_cache=False).logits[0, -count:].float()


@pytest.mark.parametrize(("kv_dtype", "entry_bytes"), [("int8", 72), ("fp8", 68), ("int4", 40)])
def test_engine_reads_prompts_and_writes_over_codes(model: str, kv_dtype: str, entry_bytes: int):
    """Its choices are a model's whose attention sees what codes stand for, up to what float16
    costs that model, which is less than what other codes do; blocks are as small as codes and
    scales are."""
    settings = Settings(budget=400, kv_dtype=kv_dtype)
    given = prompts(60, 200, 333)
    with engine(model, settings, dtype="float16", max_num_batched_tokens=150) as it:
        run = it.run(given, 24)
        spec, pool = it.manager.kv_cache_spec, it.manager.block_pool
        assert spec.page_size_bytes == HEADS * BLOCK * entry_bytes
        assert it.num_free == pool.num_gpu_blocks - 1
        assert pool.num_gpu_blocks * 3 * spec.page_size_bytes > 0.99 * 2**30
    other = "fp8" if kv_dtype == "int8" else "int8"
    gaps, errors, gaps_of_other = [], [], []
    chunks = steps_of([len(prompt) for prompt in given], 150)
    for prompt, tokens, steps in zip(given, run.tokens, chunks, strict=True):
        exact, rounded, of_other = (
            logits(model, codes_of, dtype, prompt + tokens, len(tokens), steps)
            for codes_of, dtype in (
                (kv_dtype, torch.float32),
                (kv_dtype, torch.float16),
                (other, torch.float32),
            )
        )
        for found, choice in ((gaps, torch.tensor(tokens)), (gaps_of_other, of_other.argmax(1))):
            found.append(exact.amax(1) - exact.gather(1, choice[:, None])[:, 0])
        errors.append((exact - rounded).abs().amax(1))
    assert torch.cat(gaps).max() <= torch.cat(errors).max() < torch.cat(gaps_of_other).max()


@pytest.mark.parametrize("policy", ["ada_snapkv", "model_column_max"])
def test_engine_compresses_codes(model: str, policy: str):
    """As much of a prompt is kept as without codes. What the prefix cache holds is as it was; but
    in int4 a text also depends on where chunks end, which what is found there changes."""
    given = prompts(60, 200, 333)
    kept = []
    for kv_dtype in ("auto", "int8", "int4"):
        settings = Settings(policy, 64, "exact", kv_dtype=kv_dtype)
        with engine(model, settings, dtype="float16", enable_prefix_caching=True) as it:
            run = it.run(given, 24)
            again = it.run(given, 24)
            assert it.num_free == it.manager.block_pool.num_gpu_blocks - 1
        assert again.tokens == run.tokens or kv_dtype == "int4"
        assert again.tokens[0] == run.tokens[0]  # of which nothing is found
        assert any(again.cached) == (policy == "ada_snapkv")
        kept.append([c.lengths.sum() for of_request in run.compressions for c in of_request])
    assert kept[0] == kept[1] == kept[2] and [bool(n) for n in kept[0]] == [False, True, True]


def test_backend_for_cuda_writes_the_same(model: str):
    """Whose decode steps lie in buffers that CUDA graphs read."""
    given, expected, cases = prompts(60, 200, 333), [], []
    for kv_dtype in ("int8", "int4"):
        settings = Settings(budget=64, kv_dtype=kv_dtype)
        with engine(model, settings, dtype="float16", max_num_batched_tokens=100) as it:
            expected.append(it.run(given, 24).tokens)
        cases.append((model, settings, {"dtype": "float16", "attention_backend": "CUSTOM"}))
    results = elsewhere(run_with_two_backends, cases, given, 24)
    assert [run.tokens for run, _ in results] == expected
    assert [backends for _, backends in results] == [{"CUSTOM": 3}] * 2


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_engine_compresses_codes_under_pressure(model: str, kv_dtype: str):
    """Instead of preempting anybody; what requests have written moves with its scales, or is
    quantised anew."""
    settings = Settings(budget=64, when="pressure", kv_dtype=kv_dtype)
    pool = {"num_gpu_blocks_override": 40, "max_model_len": 640}
    with engine(model, settings, dtype="float16", **pool) as it:
        run = it.run(prompts(*[400] * 6), 60)
        assert it.num_free == it.manager.block_pool.num_gpu_blocks - 1
    late = [c for of_request in run.compressions for c in of_request if c.at is not None]
    assert run.preemptions == 0 and any(c.at > c.boundary for c in late)


@pytest.mark.parametrize(
    ("kv_dtype", "options", "message"),
    [
        ("int8", {"dtype": "float32"}, "pages of int8 take float16 and bfloat16"),
        ("int4", {"block_size": 16}, "block_size must be 32 for int4, got 16"),
    ],
)
def test_engine_refuses_codes_at_start(model: str, kv_dtype: str, options: dict, message: str):
    given = {"additional_config": {"adakv": {"kv_dtype": kv_dtype}}, "dtype": "float16"}
    with (
        pytest.raises(Exception, match=message),
        engine(model, None, **given | options),
    ):
        pass


def test_engine_preempts_requests_over_int4(model: str):
    """Requests come and go, and start again, in a pool that is too short for those that stay whole,
    beside others."""
    lengths, leave = [60, 90, 40, 31, 64, 333, 100, 420, 250, 380], {6: 9}
    counts = [160] * 5 + [40] * 5
    wishes: dict[int, dict] = {number: {"policy": "off"} for number in range(5)}
    settings = Settings("ada_snapkv", 96, "exact", kv_dtype="int4")
    with engine(model, settings, dtype="float16", **SMALL) as it:
        come = [0, 0, 1, 1, 3, 5, 5, 8, 8, 8]
        given = {"come": come, "leave": leave, "wishes": wishes | {8: {"budget": 64}}}
        run = it.run(prompts(*lengths), counts, **given)
        assert it.num_free == it.manager.block_pool.num_gpu_blocks - 1
        assert not it.cache.prompts
    assert run.preemptions > 0 and run.most_running > 2
    counts[6] = 0
    assert list(map(len, run.tokens)) == counts
    sums = [c.lengths.sum(1).tolist() for of_request in run.compressions for c in of_request]
    assert sums.count([HEADS * 96] * 3) > 2 and [HEADS * 64] * 3 in sums


def test_engine_refuses_drafts_over_int4(model: str):
    settings = Settings(budget=64, kv_dtype="int4")
    options = {"dtype": "float16", "speculative_config": DRAFTS}
    with pytest.raises(Exception, match="drafts must not be used with blocks of int4"):
        run_elsewhere(model, settings, [[1, 2, 3]], 1, **options)


def test_engine_refuses_codes_beside_sliding_windows(tmp_path: Path):
    settings = Settings(budget=64, kv_dtype="int8")
    with (
        pytest.raises(Exception, match="kv_dtype must be \"auto\" for such models, got 'int8'"),
        engine(save_gemma2(tmp_path), settings, dtype="bfloat16"),
    ):
        pass
