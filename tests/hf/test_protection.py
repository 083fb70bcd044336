"""What must stay of prompts, in caches of models: batches, padding, chunks, repetitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import adakv
from adakv.policy import get
from hf.families import LLAMA, VOCAB
from hf.test_hf import GREEDY, prompts
from hf.test_model_wide import held

pytestmark = pytest.mark.model

LENGTH, PADDING, BUDGET = 150, (0, 33, 60), 60
SPANS = [(3, 12), (50, 60)]
PROTECTED = {*range(3, 12), *range(50, 60)}
NAMES = ["ada_snapkv", "h2o", "layer_defensive", "model_column_max"]


def rows(cache: adakv.Cache) -> list[list[set[int]]]:
    """``[B][L * Hkv]`` positions."""
    kept = held(cache)
    return [[{*row} for layer in kept for row in layer[b]] for b in range(len(kept[0]))]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [None, 37])
def test_each_sequence_keeps_its_own(name: str, chunk: int | None) -> None:
    model, batch = LLAMA.model(), prompts(LENGTH, PADDING)
    own = [SPANS, None, torch.arange(LENGTH - 60) % 9 == 1]
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, name, BUDGET, protect=own, chunked_prefill=chunk is not None)
        given = {} if chunk is None else {"prefill_chunk_size": chunk}
        model.generate(**batch, **given, past_key_values=cache, **GREEDY)
    first, second, third = rows(cache)
    assert all(row >= PROTECTED for row in first)
    assert not all(row >= PROTECTED for row in second)
    assert all(row >= {*range(1, 90, 9)} for row in third)


def test_spans_for_all_count_own_tokens() -> None:
    model, batch = LLAMA.model(), prompts(LENGTH, PADDING)
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, "snapkv", BUDGET, protect=SPANS)
        model(**batch, past_key_values=cache)
        assert all(row >= PROTECTED for sequence in rows(cache) for row in sequence)
        cache.reset()
        model(**prompts(LENGTH), past_key_values=cache)
    assert all(row >= PROTECTED for sequence in rows(cache) for row in sequence)


def test_tokens_are_found_by_their_ids() -> None:
    model, batch = LLAMA.model(), prompts(LENGTH, PADDING)
    batch["input_ids"][:, 100:110] = 7
    spans = adakv.spans_of(batch["input_ids"], [7], batch["attention_mask"])
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, "snapkv", BUDGET, protect=spans)
        model(**batch, past_key_values=cache)
    for sequence, padding in zip(rows(cache), PADDING, strict=True):
        assert all(row >= {*range(100 - padding, 110 - padding)} for row in sequence)


def test_separators_and_the_last_line_are_all_that_stays() -> None:
    """What a model with anchors would be left with, where they have the budget."""
    model, batch = LLAMA.model(), prompts(LENGTH)
    lines, separators = 11, {*range(10, 150, 13)}
    ids = batch["input_ids"][:1]
    ids[ids == 7] = 8
    ids[0, sorted(separators)] = 7
    last = {*range(150 - lines, 150)}
    policy, budget = "Recency(pinned=0) * Uniform() * TopScore()", len(separators | last)
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, policy, budget, protect=adakv.spans_of(ids, [7]))
        model(ids, past_key_values=cache)
    assert all(row == separators | last for row in rows(cache)[0])


@pytest.mark.parametrize(
    ("protect", "message"),
    [
        (
            [(0, 29)],
            "sequence 0 has 29 protected tokens; .* and one of layer 0 has room for 60",
        ),
        (
            [[], [], [(0, 29)]],
            "sequence 2 has 29 protected tokens; with the policy.s window of 32",
        ),
        ([[(0, 1)]] * 2, "one list or row for each of 3 sequences, got 2"),
        (torch.ones(3, LENGTH, dtype=torch.bool), "sequence 1 has 117, and its mask 150"),
    ],
    ids=str,
)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_refused_prompt_changes_nothing(protect: Any, message: str, chunked: bool) -> None:
    model, batch = LLAMA.model(), prompts(LENGTH, PADDING)
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, "ada_snapkv", BUDGET, protect=protect, chunked_prefill=chunked)
        if chunked:
            model(**batch, past_key_values=cache)
            step = torch.full((3, 1), 5)
            mask = torch.cat([batch["attention_mask"], torch.ones_like(step)], 1)
            batch = {"input_ids": step, "attention_mask": mask}
        seen = cache.seen
        with pytest.raises(ValueError, match=message):
            model(**batch, past_key_values=cache)
        assert cache.pages is None and cache.seen == seen
        with pytest.raises(ValueError, match=message):  # it can be tried again
            model(**batch, past_key_values=cache)


def test_a_repeated_prompt_keeps_it() -> None:
    model, batch = LLAMA.model(), prompts(LENGTH)
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, "kvzip", BUDGET, protect=SPANS)
        model(**batch, past_key_values=cache)
        cache.repeat(batch["input_ids"])
        assert all(row >= PROTECTED for sequence in rows(cache) for row in sequence)
        cache = adakv.Cache(model, "kvzip", get("kvzip").window + 18, protect=SPANS)
        model(**batch, past_key_values=cache)
        with pytest.raises(ValueError, match="sequence 0 has 19 protected tokens"):
            cache.repeat(batch["input_ids"])
        assert cache.pages is None


def test_everything_may_be_protected_where_nothing_is_evicted() -> None:
    model, batch = LLAMA.model(), prompts(LENGTH)
    with adakv.attach(model):
        cache = adakv.Cache(model, "full", protect=[(0, LENGTH)])
        ours = model.generate(**batch, past_key_values=cache, **GREEDY)
    theirs = model.generate(**batch, past_key_values=DynamicCache(config=model.config), **GREEDY)
    assert torch.equal(ours, theirs)


def test_a_batch_protects_for_each_prompt() -> None:
    """What a prompt gets in a cache of its own."""
    model = LLAMA.model()
    texts = [torch.randint(8, VOCAB, (n,)) for n in (150, 120, 140)]
    for text in texts:
        text[70:75] = 7
    own = [SPANS, [], [(0, 20)]]
    expected = []
    for text, spans in zip(texts, own, strict=True):
        with adakv.attach(model):
            protect = [*spans, *adakv.spans_of(text, [7])]
            cache = adakv.Cache(model, "ada_snapkv", BUDGET, protect=protect)
            out = model.generate(text[None], past_key_values=cache, **GREEDY)
        expected.append(out[0, len(text) :].tolist())
    settings: dict[str, Any] = {"policy": "ada_snapkv", "budget": BUDGET, "max_new_tokens": 12}
    results = adakv.generate_batch(model, texts, protect=own, protect_tokens=[7], **settings)
    assert [x.tokens for x in results] == [tokens[:12] for tokens in expected]
    for protect, message in (
        ([(0, 29)], r"prompts\[0\] has 29 protected tokens"),
        ([[], [(0, 29)], []], r"prompts\[1\] has 29 protected tokens"),
        ([[]], "one list or row for each of 3 sequences"),
    ):
        with pytest.raises(ValueError, match=message):
            adakv.generate_stream(model, texts, protect=protect, **settings)
    with pytest.raises(ValueError, match="protect_tokens must be a list of token ids, got 7"):
        adakv.generate_stream(model, texts, protect_tokens=7, **settings)  # type: ignore[arg-type]
