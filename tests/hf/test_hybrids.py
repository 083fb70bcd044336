"""Hybrid models: full attention is compressed, every other layer's states are transformers' own."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import adakv
from hf.families import HYBRIDS, V4, Family
from hf.forwards import ids
from tolerance import assert_close

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(V4, reason="their states are in caches of their own in this version"),
]

#: Families that stand for the orders in which states and keys are stored.
STOPPED = ("Qwen3Next", "FalconH1", "NemotronH")

hybrids = pytest.mark.parametrize("family", HYBRIDS, ids=str)


@torch.no_grad()
def logits(model: Any, tokens: Tensor, cache: Any, **options: Any) -> Tensor:
    return model(tokens, past_key_values=cache, **options).logits


def generate(model: Any, tokens: Tensor, cache: Any = None, **options: Any) -> Tensor:
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(tokens, past_key_values=cache, **settings)


@hybrids
def test_full_budget_gives_the_eager_models_tokens_in_two_turns(family: Family) -> None:
    model, prompt, more = family.model(), ids(40, 3), ids(7, 3)
    mask = (torch.arange(40) >= torch.tensor([9, 23, 0])[:, None]).long()
    texts = []
    with adakv.attach(model):
        ours = adakv.Cache(model, "ada_snapkv", budget=40)
        for cache in (DynamicCache(config=model.config), ours):
            turn = generate(model, prompt, cache, attention_mask=mask)
            second = torch.cat([mask, torch.ones(3, 19, dtype=torch.int64)], 1)
            turn = torch.cat([turn, more], 1)
            texts.append(generate(model, turn, cache, attention_mask=second))
    assert torch.equal(texts[1], texts[0])
    seen = 40 + 12 + 7 + 11 - torch.tensor([9, 23, 0])
    assert ours.stats()["seen"] == seen.tolist()


@torch.no_grad()
def forced_logits(model: Any, cache: Any, tokens: Tensor) -> Tensor:
    """Logits of the tokens after the prompt of 40, given one by one and then five at once."""
    parts = [(0, 40), *((i, i + 1) for i in range(40, 48)), (48, 53)]
    return torch.cat([logits(model, tokens[:, a:b], cache) for a, b in parts][1:], 1)


@hybrids
def test_full_budget_is_as_exact_as_the_eager_model(family: Family) -> None:
    model, tokens = family.model(), ids(53, 2)
    model.to(torch.bfloat16).double()
    expected = forced_logits(model, DynamicCache(config=model.config), tokens)
    model.to(torch.bfloat16)
    baseline = forced_logits(model, DynamicCache(config=model.config), tokens)
    with adakv.attach(model):
        actual = forced_logits(model, adakv.Cache(model, budget=40), tokens)
    assert_close(actual, expected, baseline)


@hybrids
@pytest.mark.parametrize("policy", ["ada_snapkv", "critical_ada_snapkv", "model_column_max"])
def test_a_small_budget_frees_bytes(family: Family, policy: str) -> None:
    model = family.model()
    with adakv.attach(model):
        cache = adakv.Cache(model, policy, budget=36, page_size=8)
        generate(model, ids(200, 2), cache)
    stats = cache.stats()
    num_full = stats["full_bytes"] // (
        2 * 211 * cache.pages.num_kv_heads * cache.pages.head_dim * 8
    )
    assert 0 < stats["bytes"] < stats["full_bytes"] / 2
    lengths = stats["lengths"]
    assert lengths.shape[0] == len(cache.layers)
    compressed = [i for i in range(len(cache.layers)) if lengths[i].any()]
    assert len(compressed) == num_full > 0
    assert lengths.sum() == num_full * 2 * lengths.shape[2] * (36 + 11)
    assert len(cache.kept(compressed[0])) == 2
    for other in {*range(len(cache.layers))} - {*compressed}:
        with pytest.raises(ValueError, match=f"layer {other} has no full attention"):
            cache.kept(other)


@hybrids
def test_a_cache_that_was_reset_takes_another_batch(family: Family) -> None:
    model, prompt = family.model(), ids(50, 3)
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40)
        logits(model, ids(60, 2), cache)
        cache.reset()
        assert torch.equal(
            logits(model, prompt, cache), logits(model, prompt, adakv.Cache(model, budget=40))
        )


@hybrids
def test_a_prompt_in_chunks_is_read_as_the_eager_model_does(family: Family) -> None:
    model, prompt = family.model(), ids(80, 2)
    own = DynamicCache(config=model.config)
    expected = generate(model, prompt, own, prefill_chunk_size=33)
    with adakv.attach(model):
        cache = adakv.Cache(model, "ada_snapkv", budget=80, chunked_prefill=True)
        assert torch.equal(generate(model, prompt, cache, prefill_chunk_size=33), expected)


@pytest.mark.parametrize("family", [f for f in HYBRIDS if str(f) in STOPPED], ids=str)
def test_a_forward_that_was_stopped_leaves_no_wrong_states(family: Family) -> None:
    """At every layer, in the prompt and in a step: the next forward is refused, or right."""
    model, prompt, token = family.model(), ids(50), ids(1)
    last = len(model.model.layers) - 1

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40)
        expected = [logits(model, part, cache) for part in (prompt, token)]
        for index, layer in enumerate(model.model.layers):
            places = [layer.register_forward_pre_hook]
            if index < last:  # after which all is done
                places.append(layer.register_forward_hook)
            for place, part in product(places, (prompt, token)):
                cache.reset()
                if part is token:
                    logits(model, prompt, cache)
                hook = place(stop)
                with pytest.raises(KeyboardInterrupt):
                    logits(model, part, cache)
                hook.remove()
                try:
                    again = logits(model, part, cache)
                except adakv.Error as error:
                    assert "reset()" in str(error)
                else:
                    assert torch.equal(again, expected[part is token])
        cache.reset()
        assert torch.equal(logits(model, prompt, cache), expected[0])


def test_what_needs_full_attention_everywhere_is_refused() -> None:
    model = HYBRIDS[0].model()
    with pytest.raises(ValueError, match="has layers without full attention, which many prompts"):
        adakv.generate_batch(model, [[5, 6, 7]], budget=40)
    with adakv.attach(model):
        cache = adakv.Cache(model, "kvzip", ratio=0.5)
        logits(model, ids(50), cache)
        with pytest.raises(ValueError, match="without full attention can't forget a repetition"):
            cache.repeat(ids(60))
        cache = adakv.Cache(model, budget=40)
        with pytest.raises(ValueError, match="without full attention have steps that can't be"):
            generate(model, ids(50), cache, custom_generate=adakv.cuda_graph_sample)


def test_a_cache_that_has_seen_tokens_is_initialized() -> None:
    """PaliGemma, HRM and Molmo2 make their masks by it."""
    model = HYBRIDS[0].model()
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40)
        assert not cache.is_initialized
        logits(model, ids(50), cache)
        assert cache.is_initialized
        cache.reset()
        assert not cache.is_initialized
