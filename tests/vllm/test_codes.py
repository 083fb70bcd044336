"""Whole engines on the CPU whose blocks hold codes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("vllm.v1", reason="vllm isn't installed; make test-vllm runs these tests")

from transformers import AttentionInterface, AutoModelForCausalLM

import codes
from adakv.vllm.config import Settings
from vllm_engine import BLOCK, elsewhere, engine, random_text, save_gemma2, save_llama
from vllm_two_backends import run_with_two_backends

HEADS, DIM = 2, 32  # of a random model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


def prompts(*lengths: int) -> list[list[int]]:
    rng = random.Random(2)
    return [random_text(rng, length) for length in lengths]


@torch.no_grad()
def logits(
    folder: str, kv_dtype: str, dtype: torch.dtype, text: list[int], count: int
) -> torch.Tensor:
    """What a model says before each of a text's last tokens, which always attends to what codes
    stand for, of keys and values in float16."""

    def attend(module: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
        k, v = (
            codes.dequantise(*codes.quantise(x.half(), kv_dtype), torch.float32) for x in (k, v)
        )
        out = F.scaled_dot_product_attention(q.float(), k, v, is_causal=True, enable_gqa=True)
        return out.to(q.dtype).transpose(1, 2), None

    AttentionInterface.register("codes", attend)
    it = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="codes")
    return it(torch.tensor([text[:-1]]), use_cache=False).logits[0, -count:].float()


@pytest.mark.parametrize(("kv_dtype", "entry_bytes"), [("int8", 72), ("fp8", 68)])
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
    for prompt, tokens in zip(given, run.tokens, strict=True):
        exact, rounded, of_other = (
            logits(model, codes_of, dtype, prompt + tokens, len(tokens))
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
    """As much of a prompt is kept as without codes. What the prefix cache holds is as it was."""
    given = prompts(60, 200, 333)
    kept = []
    for kv_dtype in ("auto", "int8"):
        settings = Settings(policy, 64, "exact", kv_dtype=kv_dtype)
        with engine(model, settings, dtype="float16", enable_prefix_caching=True) as it:
            run = it.run(given, 24)
            again = it.run(given, 24)
            assert it.num_free == it.manager.block_pool.num_gpu_blocks - 1
        assert again.tokens == run.tokens
        assert any(again.cached) == (policy == "ada_snapkv")
        kept.append([c.lengths.sum() for of_request in run.compressions for c in of_request])
    assert kept[0] == kept[1] and [bool(n) for n in kept[0]] == [False, True, True]


def test_backend_for_cuda_writes_the_same(model: str):
    """Whose decode steps lie in buffers that CUDA graphs read."""
    settings, given = Settings(budget=64, kv_dtype="int8"), prompts(60, 200, 333)
    options = {"dtype": "float16"}
    with engine(model, settings, max_num_batched_tokens=100, **options) as it:
        expected = it.run(given, 24)
    options |= {"attention_backend": "CUSTOM"}
    ((run, backends),) = elsewhere(run_with_two_backends, [(model, settings, options)], given, 24)
    assert run.tokens == expected.tokens and backends == {"CUSTOM": 3}


def test_engine_compresses_codes_under_pressure(model: str):
    """Instead of preempting anybody; what requests have written moves with its scales."""
    settings = Settings(budget=64, when="pressure", kv_dtype="int8")
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
        ("int4", {}, "kv_dtype must be one of .*, got 'int4': the last entries of its rows"),
    ],
)
def test_engine_refuses_codes_at_start(model: str, kv_dtype: str, options: dict, message: str):
    given = {"additional_config": {"adakv": {"kv_dtype": kv_dtype}}, "dtype": "float16"}
    with (
        pytest.raises(Exception, match=message),
        engine(model, None, **given | options),
    ):
        pass


def test_engine_refuses_codes_beside_sliding_windows(tmp_path: Path):
    settings = Settings(budget=64, kv_dtype="int8")
    with (
        pytest.raises(Exception, match="kv_dtype must be \"auto\" for such models, got 'int8'"),
        engine(save_gemma2(tmp_path), settings, dtype="bfloat16"),
    ):
        pass
