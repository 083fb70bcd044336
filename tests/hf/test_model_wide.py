"""Policies that wait for the last layer, or for all queries, under transformers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import adakv
import reference
from adakv.policy import (
    Adaptive,
    LayerInputs,
    ModelWide,
    Policy,
    RepeatAttention,
    TopScore,
    TwoStage,
    Uniform,
    WindowAttention,
)
from hf.families import FAMILIES, LLAMA, V4, VOCAB, Family
from hf.test_hf import GREEDY, captured, prompts
from policy.helpers import kept_rows

pytestmark = pytest.mark.model

WIDE = Policy(WindowAttention(), ModelWide(), TwoStage())


def held(cache: adakv.Cache) -> list[list[list[list[int]]]]:
    """Positions of each full-attention layer, sequence and kv head."""
    layers = [i for i, layer in enumerate(cache.layers) if not layer.is_sliding]
    return [[[row.tolist() for row in rows] for rows in cache.kept(i)] for i in layers]


@pytest.mark.parametrize("family", [LLAMA, FAMILIES[9], FAMILIES[10]], ids=str)
def test_kept_is_what_the_definitions_choose_model_wide(family: Family) -> None:
    model, padding = family.model(), (0, 50, 21)
    batch = prompts(120, padding)
    with torch.no_grad(), captured(model) as calls:
        model(**batch, past_key_values=DynamicCache(config=model.config))
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, WIDE, budget=48)
        model(**batch, past_key_values=cache)
    calls = [c for c, layer in zip(calls, cache.layers, strict=True) if not layer.is_sliding]
    positions = held(cache)
    for b, start in enumerate(padding):
        scores, norms = zip(*(definitions(call, b, start) for call in calls), strict=True)
        heads = scores[0].shape[1]
        budgets = reference.allocate(torch.cat(scores, 1), 48, window=32, floor=0.0)
        for layer, share in enumerate(budgets.split(heads, 1)):
            kept, indptr = reference.select(scores[layer], share, window=32, norms=norms[layer])
            expected = [kept[i:j].tolist() for i, j in itertools.pairwise(indptr)]
            assert positions[layer][b] == expected


def definitions(call: dict[str, Any], b: int, start: int) -> tuple[Tensor, Tensor]:
    sinks = call.get("s_aux")
    scores = reference.score(
        call["query"][b : b + 1, :, -32:],
        call["key"][b : b + 1, :, start:],
        sink_logits=None if sinks is None else sinks.detach(),
        scale=call["scaling"],
        softcap=call.get("softcap"),
    )
    weight = call["module"].o_proj.weight.detach()
    return scores, reference.value_norm(call["value"][b : b + 1, :, start:], weight)


@pytest.mark.parametrize("page_size", [8, 32])
def test_model_wide_with_floor_one_generates_what_uniform_does(page_size: int) -> None:
    """The pages are dealt in another order; what stands in them, and what follows, is the same."""
    model, batch = LLAMA.model(), prompts(150, (0, 30, 97))
    settings = {**GREEDY, "max_new_tokens": 40}
    texts, caches = [], []
    with adakv.attach(model):
        for allocator in (Uniform(), ModelWide(floor=1.0)):
            policy = Policy(WindowAttention(), allocator, TopScore())
            caches.append(adakv.Cache(model, policy, ratio=0.4, page_size=page_size))
            texts.append(model.generate(**batch, past_key_values=caches[-1], **settings))
    assert torch.equal(*texts)
    assert held(caches[0]) == held(caches[1])


def test_model_wide_pages_have_one_owner_and_hold_its_entries() -> None:
    model, batch = LLAMA.model(), prompts(150, (0, 33))
    with torch.no_grad(), captured(model) as calls:
        model(**batch, past_key_values=DynamicCache(config=model.config))
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, WIDE, budget=50)
        model(**batch, past_key_values=cache)
        kv = cache.pages
        assert kv is not None
        owned: list[int] = []
        for layer, b, h in itertools.product(range(4), range(2), range(2)):
            view = kv.layer(layer)
            kept = cache.kept(layer)[b][h]
            table = view.block_table[b, h, : -(-len(kept) // 16)].tolist()
            owned += [*table, int(view.fresh_pages[b, h, 0])]
            keys = view.pages[table, 0].flatten(0, 1)[: len(kept)]
            start = 33 * b
            assert torch.equal(keys, calls[layer]["key"][b, h, start + kept.long()])
        assert len(set(owned)) == len(owned) <= cache.stats()["pages_used"]
        assert min(owned) >= 0
        assert kv.layer(0).seen.tolist() == [150, 117]
        cache.reset()
        assert cache.stats()["pages_used"] == 0


def test_model_wide_with_enough_budget_is_the_models_own_text() -> None:
    model, batch = LLAMA.model(), prompts(60, (0, 20, 33))
    expected = model.generate(**batch, **GREEDY)
    with adakv.attach(model):
        cache = adakv.Cache(model, WIDE, ratio=1.0)
        assert torch.equal(model.generate(**batch, past_key_values=cache, **GREEDY), expected)


@pytest.mark.parametrize("policy", ["layer_defensive", "h2o", "expected", WIDE], ids=str)
@pytest.mark.parametrize("padding", [(0,), (0, 30)], ids=str)
def test_chunked_prefill_keeps_what_one_prefill_keeps(policy: Any, padding: Any) -> None:
    model, ids = LLAMA.model(), torch.randint(3, VOCAB, (len(padding), 120))
    mask = (torch.arange(120) >= torch.tensor(padding)[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), adakv.attach(model):
        whole = adakv.Cache(model, policy, budget=48)
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=whole)
        chunked = adakv.Cache(model, policy, budget=48, chunked_prefill=True)
        # generate of 4.57 leaves a prompt's last token to a forward of its own.
        for part in itertools.starmap(slice, itertools.pairwise([0, 40, 80, *[119] * V4, 120])):
            model(
                ids[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=positions[:, part],
                past_key_values=chunked,
            )
        for cache in (whole, chunked):
            model.generate(
                torch.cat([ids, ids[:, :1]], 1),
                attention_mask=torch.cat([mask, mask[:, -1:]], 1),
                past_key_values=cache,
                **GREEDY,
            )
    assert held(whole) == held(chunked)


ROTARY = [
    f for f in FAMILIES if f.is_available and str(f) not in ("Cohere2", "SmolLM3", "StableLm")
]


@pytest.mark.parametrize("family", ROTARY, ids=str)
def test_rotation_undoes_the_models_own(family: Family) -> None:
    """Equal tokens have equal keys in layer 0 once they are turned back."""
    from adakv.hf import families

    model = family.model()
    ids = torch.full((1, 9), 5)
    if model.config.model_type not in families.ROTARY:
        with pytest.raises(ValueError, match=r"the policy foresees queries.*llama.*not for"):
            adakv.Cache(model, "expected", ratio=0.5)
        return
    with torch.no_grad(), captured(model) as calls:
        model(ids, use_cache=False)
        rotate = families.rotation(model)
        keys = rotate(calls[0]["key"], -torch.arange(9))
        torch.testing.assert_close(keys, keys[:, :, :1].expand_as(keys), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(calls[0]["key"], keys)
        torch.testing.assert_close(keys.norm(dim=-1), calls[0]["key"].norm(dim=-1))


REPEAT = [adakv.policy.get("kvzip"), Policy(RepeatAttention(), Adaptive(), TopScore())]


@pytest.mark.parametrize("policy", REPEAT, ids=["model-wide", "adaptive"])
def test_repeat_keeps_what_the_repetition_looks_at(policy: Policy) -> None:
    model, ids = LLAMA.model(), torch.randint(3, VOCAB, (2, 70))
    repetition = torch.cat([torch.full((2, 4), 7), ids], 1)
    with torch.no_grad(), captured(model) as calls:
        model(torch.cat([ids, repetition], 1), use_cache=False)
    layers, scores = [], []
    for index, call in enumerate(calls):
        keys = call["key"].repeat_interleave(2, 1).double()
        z = call["query"][:, :, 70:].double() @ keys.mT * call["scaling"]
        z = z.masked_fill(torch.arange(144) > torch.arange(70, 144)[:, None], -torch.inf)
        attention = z.softmax(-1)[..., :70].unflatten(1, (2, 2)).amax((2, 3))
        attention[..., :4] = torch.inf
        scores.append(attention)
        prompt = call["key"][:, :, :70]
        layers.append(LayerInputs(prompt[:, :, :1], prompt, prompt, None, (70, 70), index, 4))
    expected = [kept_rows(kept, 2) for kept in policy.choose_all(layers, 20, scores=scores)]
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, policy, budget=20)
        model(ids, past_key_values=cache)
        cache.repeat(repetition)
        assert cache.get_seq_length() == 70
        assert held(cache) == expected
        assert cache.stats()["seen"] == [70, 70]
        ids = torch.cat([ids, ids[:, :3]], 1)
        assert model.generate(ids, past_key_values=cache, **GREEDY).shape == (2, 85)
        assert cache.stats()["lengths"].sum() == 2 * 4 * 2 * (20 + 14)


def test_repeat_with_enough_budget_is_the_models_own_text() -> None:
    model, ids = LLAMA.model(), torch.randint(3, VOCAB, (1, 40))
    longer = torch.cat([ids, ids[:, :5]], 1)
    expected = model.generate(longer, **GREEDY)
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, REPEAT[0], ratio=1.0)
        model(ids, past_key_values=cache)
        cache.repeat(ids)
        assert torch.equal(model.generate(longer, past_key_values=cache, **GREEDY), expected)


def test_repeat_names_what_is_wrong() -> None:
    model, ids = LLAMA.model(), torch.randint(3, VOCAB, (2, 40))
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, REPEAT[0], ratio=0.5)
        with pytest.raises(adakv.Error, match="repeated once, right after it was read"):
            cache.repeat(ids)
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="input_ids must repeat the 2 prompts"):
            cache.repeat(ids[:1])
        with pytest.raises(ValueError, match=r"repeat must be given: call Cache\.repeat"):
            model(ids[:, :1], past_key_values=cache)
        cache.reset()
        model(ids, past_key_values=cache)
        cache.repeat(ids)
        with pytest.raises(adakv.Error, match="repeated once, right after it was read"):
            cache.repeat(ids)
        plain = adakv.Cache(model, "snapkv", ratio=0.9)
        model(ids, past_key_values=plain)
        with pytest.raises(ValueError, match="policy: it doesn't score what a repetition looks at"):
            plain.repeat(ids)
        padded = adakv.Cache(model, REPEAT[0], ratio=0.5)
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        model(ids, attention_mask=mask, past_key_values=padded)
        with pytest.raises(ValueError, match="all of one length and without padding"):
            padded.repeat(ids)
    with pytest.raises(ValueError, match="read twice needs a cache of its own"):
        adakv.generate_batch(model, [[5, 6]], policy=REPEAT[0], ratio=0.5)
    sliding = FAMILIES[9].model()
    with torch.no_grad(), adakv.attach(sliding):
        cache = adakv.Cache(sliding, REPEAT[0], ratio=0.5)
        sliding(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="without full attention can't forget"):
            cache.repeat(ids)


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_nothing_comes_between_a_prompt_and_its_repetition(num_tokens: int) -> None:
    model, ids, more = LLAMA.model(), torch.randint(3, VOCAB, (2, 40)), torch.ones(2, 5).long()
    with torch.no_grad(), adakv.attach(model):
        caches = [adakv.Cache(model, REPEAT[0], ratio=0.5) for _ in range(2)]
        for cache in caches:
            model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match=r"repeat must be given: .*chunked_prefill=True"):
            model(more[:, :num_tokens], past_key_values=caches[0])
        logits = []
        for cache in caches:  # nothing has changed in the first one
            cache.repeat(ids)
            logits.append(model(more[:, :num_tokens], past_key_values=cache).logits)
        chunked = adakv.Cache(model, REPEAT[0], ratio=0.5, chunked_prefill=True)
        for part in ids.split(20, 1):
            model(part, past_key_values=chunked)
        chunked.repeat(ids)
    assert torch.equal(*logits)
    assert held(caches[0]) == held(caches[1])
    assert chunked.stats()["lengths"].sum() == 2 * 4 * 2 * 20


def test_generate_reads_a_prompt_twice_by_itself() -> None:
    model, ids = LLAMA.model(), torch.randint(3, VOCAB, (2, 40))
    settings = {**GREEDY, "attention_mask": torch.ones_like(ids)}
    with adakv.attach(model):
        by_hand, by_itself = (adakv.Cache(model, REPEAT[0], ratio=0.5) for _ in range(2))
        with torch.no_grad():
            first = model(ids, past_key_values=by_hand).logits[:, -1:].argmax(-1)
        by_hand.repeat(ids)
        mask = torch.ones(2, 41)
        expected = model.generate(
            torch.cat([ids, first], 1),
            past_key_values=by_hand,
            **{**settings, "attention_mask": mask, "max_new_tokens": 11},
        )
        by_itself.repeat_after_prompt(ids)
        actual = model.generate(ids, past_key_values=by_itself, **settings)
        with pytest.raises(adakv.Error, match=r"call repeat\(\) now"):
            by_itself.repeat_after_prompt(ids)
        with pytest.raises(ValueError, match="policy: it doesn't score what a repetition"):
            adakv.Cache(model, "snapkv", ratio=0.9).repeat_after_prompt(ids)
    assert torch.equal(actual, expected)
    assert held(by_itself) == held(by_hand)
