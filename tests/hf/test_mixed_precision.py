"""Mixed precision: autocast hands over queries, keys and values of several dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import adakv
from hf.families import FAMILIES, LLAMA, VOCAB, Family
from hf.test_families import forced_logits
from tolerance import assert_close

pytestmark = pytest.mark.model

SOME = [f for f in FAMILIES if f.prefix in ("Llama", "Qwen3", "Gemma2", "GptOss")]
POLICIES = ("ada_snapkv", "critical_ada_snapkv", "model_column_max")


def autocast(enabled: bool = True) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


@pytest.mark.parametrize("inner", ["eager", "sdpa"])
@pytest.mark.parametrize("family", SOME, ids=str)
def test_autocast_is_as_exact_as_with_a_full_cache(family: Family, inner: str) -> None:
    if inner == "sdpa" and family.prefix in ("GptOss", "Gemma2"):
        pytest.skip("transformers' sdpa leaves sink logits and the softcap out")
    model, tokens = family.model(attn_implementation=inner), torch.randint(3, VOCAB, (3, 53))
    expected = forced_logits(model.double(), DynamicCache(config=model.config), tokens)
    model.float()
    with autocast():
        baseline = forced_logits(model, DynamicCache(config=model.config), tokens)
        with adakv.attach(model):
            cache = adakv.Cache(model, budget=40)
            actual = forced_logits(model, cache, tokens)
    assert_close(actual, expected, baseline)
    assert cache.pages is not None and cache.pages.dtype == torch.bfloat16


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_prompts_are_cut_under_autocast(policy: str, chunked: bool) -> None:
    model, tokens = LLAMA.model(attn_implementation="sdpa"), torch.randint(3, VOCAB, (2, 120))
    with torch.no_grad(), autocast(), adakv.attach(model):
        cache = adakv.Cache(model, policy, budget=40, chunked_prefill=chunked)
        for part in tokens.split(60 if chunked else 120, 1):
            model(part, past_key_values=cache)
        model(tokens[:, :1], past_key_values=cache)
        model(tokens[:, :1], past_key_values=cache)
    assert (cache.stats()["lengths"].sum((0, 2)) == 4 * 2 * (40 + 2)).all()


@pytest.mark.parametrize("policy", [*POLICIES, "full"])
def test_many_prompts_run_under_autocast(policy: str) -> None:
    model = LLAMA.model(attn_implementation="sdpa", num_hidden_layers=2)
    prompts = [torch.randint(3, VOCAB, (n,)) for n in (60, 41, 50)]
    with autocast():
        results = adakv.generate_batch(model, prompts, policy=policy, ratio=1.0, max_new_tokens=6)
    assert [len(result.tokens) for result in results] == [6, 6, 6]


def test_a_repetition_runs_under_autocast() -> None:
    model, prompt = LLAMA.model(attn_implementation="sdpa"), torch.randint(3, VOCAB, (1, 90))
    with torch.no_grad(), autocast(), adakv.attach(model):
        cache = adakv.Cache(model, "kvzip", budget=40)
        model(prompt, past_key_values=cache)
        cache.repeat(prompt)
        model(prompt[:, :1], past_key_values=cache)
    assert cache.stats()["lengths"].sum() == 4 * 2 * (40 + 1)


def test_precision_may_not_change_after_the_prompt() -> None:
    model, prompt = LLAMA.model(attn_implementation="sdpa"), torch.randint(3, VOCAB, (1, 60))

    def read(tokens: Tensor, cache: Any, enabled: bool) -> None:
        with autocast(enabled):
            model(tokens, past_key_values=cache)

    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, budget=40)
        read(prompt, cache, True)
        with pytest.raises(ValueError, match="dtype and device must stay"):
            read(prompt[:, :1], cache, False)
        read(prompt[:, :1], cache, True)
