"""LongRoPE: a text that grows across the limit of its frequencies is refused, and said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import adakv
from hf.families import V4, VOCAB, Family
from hf.test_hf import GREEDY

pytestmark = pytest.mark.model

LIMIT = 64
ROPE = {"short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)]}
ROPE |= {"rope_theta": 10000.0, "original_max_position_embeddings": LIMIT}
SETTINGS: dict[str, Any] = {
    "sliding_window": None,
    "num_hidden_layers": 2,
    "original_max_position_embeddings": LIMIT,
    **({"rope_scaling": {"type": "longrope", **ROPE}} if V4 else {}),
    **({} if V4 else {"rope_parameters": {"rope_type": "longrope", **ROPE}}),
}
PHI = Family("Phi3", SETTINGS)


def ids(length: int) -> Tensor:
    return torch.randint(3, VOCAB, (1, length))


def generate(model: Any, prompt: Tensor, cache: Any, new: int, **options: Any) -> Tensor:
    settings = {**GREEDY, "attention_mask": torch.ones_like(prompt), "max_new_tokens": new}
    return model.generate(prompt, past_key_values=cache, **settings, **options)


@pytest.mark.parametrize("length", [LIMIT - 4, LIMIT + 10])
def test_generate_that_leaves_the_cache_says_so(length: int) -> None:
    model, prompt = PHI.model(), ids(length)
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40)
        with pytest.raises(adakv.Error, match=f"RoPE changes at {LIMIT} tokens"):
            generate(model, prompt, cache, 12)
        # Other caches are none of its business.
        assert generate(model, prompt, DynamicCache(config=model.config), 12).shape[1] > length


def test_texts_on_one_side_are_the_models_own() -> None:
    model = PHI.model()
    for length, options in (
        (LIMIT - 12, {}),
        (LIMIT + 1, {"custom_generate": adakv.cuda_graph_sample}),
    ):
        prompt = ids(length)
        expected = generate(model, prompt, None, 12)
        with adakv.attach(model):
            cache = adakv.Cache(model, ratio=1.0)
            assert torch.equal(generate(model, prompt, cache, 12, **options), expected)
        results = adakv.generate_batch(model, [prompt[0]], ratio=1.0, max_new_tokens=12)
        assert results[0].tokens == expected[0, length:].tolist()


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_a_text_may_not_grow_across(num_tokens: int) -> None:
    model, tokens = PHI.model(), ids(LIMIT + num_tokens)
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, budget=40)
        model(tokens[:, :LIMIT], past_key_values=cache)
        with pytest.raises(ValueError, match=f"the text crosses {LIMIT} tokens"):
            model(tokens[:, LIMIT:], past_key_values=cache)
    assert cache.seen == [LIMIT]


def test_many_prompts_are_refused_before_any_work() -> None:
    model, short, long = PHI.model(), ids(LIMIT - 12)[0], ids(LIMIT + 9)[0]
    settings = {"budget": 40, "max_new_tokens": 13}
    assert len(adakv.generate_batch(model, [short], **settings)[0].tokens) <= 13
    message = rf"max_new_tokens: prompts\[1\] has 53 tokens, .* of 13 more crosses {LIMIT}"
    with pytest.raises(ValueError, match=message):
        adakv.generate_batch(model, [short, ids(LIMIT - 11)[0]], **settings)
    with pytest.raises(ValueError, match=r"prompts\[0\] has at most 64 tokens and prompts\[1\]"):
        adakv.generate_batch(model, [short, long], **settings)
    with adakv.attach(model), pytest.raises(ValueError, match="max_new_tokens: the prompt has 53"):
        loop = {"custom_generate": adakv.cuda_graph_sample}
        generate(model, ids(LIMIT - 11), adakv.Cache(model, budget=40), 13, **loop)
