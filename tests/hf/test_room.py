"""Many prompts at once: numbers and pages are taken as they are needed."""

from __future__ import annotations

import pytest
import torch

import adakv
from adakv.hf.sampling import Sampling
from hf.test_batch import alone, caches_of_batches, llama, options, prompts, used_bytes

pytestmark = pytest.mark.model


def test_no_limit_takes_nothing_before_it_is_needed() -> None:
    model, ids = llama(), prompts()
    made = caches_of_batches(model)
    texts = [alone(model, prompt, 12, budget=40) for prompt in ids]
    eos = {text[i] for i, text in enumerate(texts)}
    settings = {"budget": 40, "options": options(eos_token_id=sorted(eos), max_batch=3)}
    expected = adakv.generate_batch(model, ids, max_new_tokens=12, **settings)
    before = used_bytes(torch.device("cpu"))
    assert adakv.generate_batch(model, ids, max_new_tokens=2**31 - 1, **settings) == expected
    assert used_bytes(torch.device("cpu")) - before < 2**28
    assert made[-1].max_row_pages < 300


@pytest.mark.parametrize("temperature", [0.0, 1.2])
@pytest.mark.parametrize("is_limited", [False, True])
def test_longer_texts_have_the_cache_grow(
    temperature: float, is_limited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = llama(), prompts()
    sampled = options(
        temperature=temperature, seed=3, max_batch=3, cache_bytes=2**28 if is_limited else None
    )
    settings = {"budget": 40, "max_new_tokens": (45, 3, 60, 21, 1, 2), "options": sampled}
    expected = adakv.generate_batch(model, ids, **settings)
    monkeypatch.setattr("adakv.hf.pool_size.FIRST_TOKENS", 7)
    made, sizes = caches_of_batches(model), []
    model.register_forward_pre_hook(lambda *_: sizes.extend(kv.num_pages for kv in made))
    assert adakv.generate_batch(model, ids, **settings) == expected
    if is_limited:  # up to the model's context everything is promised
        assert len(set(sizes)) == 1
    else:
        assert sizes[0] < sizes[-1] <= made[0].num_pages == made[0].num_free


def test_numbers_are_drawn_as_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of one draw, so that a seed gives the same text however many come at a time."""
    model, ids = llama(), prompts((30, 20))
    settings = {"budget": 40, "max_new_tokens": (40, 33)}
    sampled = options(temperature=1.2, seed=3)
    expected = adakv.generate_batch(model, ids, options=sampled, **settings)
    monkeypatch.setattr("adakv.hf.slots._UNIFORMS", 7)
    assert adakv.generate_batch(model, ids, options=sampled, **settings) == expected
    uniforms = torch.rand(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    text = torch.tensor(expected[0].tokens)
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, policy="full")
        whole = torch.cat([ids[0], text[:-1]])[None]
        logits = model(whole, past_key_values=cache).logits[0, len(ids[0]) - 1 :]
    assert torch.equal(Sampling(temperature=1.2).choose(logits, uniforms), text)
    drawn = []
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *n, **options: drawn.append(n) or rand(*n, **options))
    adakv.generate_batch(model, ids, options=options(), **settings)
    assert not drawn
