"""Texts that are evicted from while they are written, on a GPU: the same tokens as on the CPU in
float32, with and without CUDA graphs."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import adakv
from hf.families import LLAMA, VOCAB
from hf.test_texts import POLICIES, evicting, write

pytestmark = [pytest.mark.gpu, pytest.mark.model]

# Two of them draw. Keys of the same token are equally long but for rounding, which is each device's
# own.
REPEATABLE = [policy for policy in POLICIES if policy not in ("random", "vase", "knorm")]


def both() -> dict[str, Any]:
    model = LLAMA.model()
    return {"cpu": model, "cuda": copy.deepcopy(model).cuda()}


@pytest.mark.parametrize("pin_prompt", [True, False])
@pytest.mark.parametrize("policy", REPEATABLE)
def test_texts_equal_the_cpu(policy: str, pin_prompt: bool) -> None:
    prompt, written = torch.randint(3, VOCAB, (2, 70)), {}
    for device, model in both().items():
        cache = evicting(model, policy, pin_prompt=pin_prompt)
        written[device] = write(model, cache, prompt.to(device), 90).cpu()
    assert written["cuda"].equal(written["cpu"])


@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("policy", REPEATABLE)
def test_batches_equal_the_cpu(policy: str, cuda_graph: bool) -> None:
    prompts = [torch.randint(3, VOCAB, (n,)).tolist() for n in (70, 40, 90, 60)]
    texts = {}
    for device, model in both().items():
        results = adakv.generate_batch(
            model,
            prompts,
            policy="ada_snapkv",
            budget=48,
            decode_policy=policy,
            decode_budget=40,
            every=8,
            max_new_tokens=[90, 60, 100, 30],
            options=adakv.BatchOptions(max_batch=2, eos_token_id=[], cuda_graph=cuda_graph),
        )
        texts[device] = [result.tokens for result in results]
    assert texts["cuda"] == texts["cpu"]


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8", "int4", "int2"])
@pytest.mark.parametrize("policy", POLICIES)
def test_quantised_pages_are_evicted_from(policy: str, kv_dtype: str) -> None:
    model = both()["cuda"].bfloat16()
    prompt = torch.randint(3, VOCAB, (2, 70), device="cuda")
    cache = evicting(model, policy, kv_dtype=kv_dtype)
    write(model, cache, prompt, 80)
    assert cache.stats()["lengths"].float().mean() <= 48 + 40 + 8
    assert cache.seen == [149, 149]


def recorded(model: Any, cache: adakv.Cache, ids: Tensor) -> Tensor:
    """Texts ``[B, T]``, gone on with by 70 tokens each in recorded steps."""
    written: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        custom_generate=adakv.cuda_graph_sample,
        max_new_tokens=70,
        do_sample=False,
        eos_token_id=None,
    )
    return written


@pytest.mark.parametrize("policy", REPEATABLE)
def test_recorded_loops_equal_the_cpu(policy: str) -> None:
    """Choices lie between replays; and the pool may grow, which has the step recorded anew."""
    prompt, written = torch.randint(3, VOCAB, (2, 70)), {}
    for device, model in both().items():
        cache, ids = evicting(model, policy), prompt.to(device)
        with adakv.attach(model):
            for _ in range(2):
                ids = recorded(model, cache, ids)
        written[device] = ids.cpu()
    assert written["cuda"].equal(written["cpu"])


def test_a_cache_that_becomes_garbage_ends_no_recording() -> None:
    """Its memory is freed by the driver, which no recording survives."""
    prompt, model = torch.randint(3, VOCAB, (2, 70)).cuda(), both()["cuda"]
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        with adakv.attach(model):
            for _ in range(3):
                cache = evicting(model, REPEATABLE[0])
                cache.itself = cache  # a cycle, which only the collector ends
                assert recorded(model, cache, prompt).shape == (2, 140)
    finally:
        gc.set_threshold(*before)
