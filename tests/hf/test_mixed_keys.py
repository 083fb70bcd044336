"""Caches whose keys have channels in 16, 4 and 2 bits, in an order that each row has for itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adakv
from hf import tiered
from hf.test_bits import divergence, llama, logits
from hf.test_hf import GREEDY, captured, prompts
from hf.test_tiers import POLICIES

pytestmark = pytest.mark.model

#: For heads of 16: half of the channels have 4 bits, the others 2. Alone, and behind a first tier.
MIXED = ["mixed3", "auto:1/4 + mixed3:3/4"]


@pytest.mark.parametrize("policy", POLICIES)
def test_where_all_channels_have_four_bits_it_is_int4(policy: str) -> None:
    """Whatever the order of the channels is: but for the rounding of sums."""
    model = llama(torch.bfloat16)
    int4 = adakv.Cache(model, policy, budget=64, kv_dtype="int4")
    full = adakv.Cache(model, policy, budget=64)
    expected, exact = logits(model, int4), logits(model, full)
    cache = adakv.Cache(model, policy, budget=64, kv_dtype="mixed4")
    got = logits(model, cache)
    assert divergence(got, expected) < 0.2 * divergence(expected, exact)
    for layer in range(2):
        for ours, theirs in zip(cache.kept(layer), int4.kept(layer), strict=True):
            assert all(map(torch.equal, ours, theirs))
    assert cache.stats()["kv_dtype"] == "mixed4"


def test_more_bits_are_nearer_to_the_full_cache_and_take_more_bytes() -> None:
    model = llama(torch.bfloat16)
    exact = logits(model, adakv.Cache(model, "snapkv", budget=500))
    lost, taken = [], []
    for kind in ("mixed2", "mixed3", "mixed4", "mixed8"):
        cache = adakv.Cache(model, "snapkv", budget=500, kv_dtype=kind)
        lost.append(divergence(logits(model, cache), exact))
        kv: Any = cache.pages
        taken.append(kv.first.page_bytes)
        assert cache.stats()["bytes"] == kv.bytes_used
    assert lost == sorted(lost, reverse=True)
    assert taken == sorted(taken)


@pytest.mark.parametrize("chunks", [None, 40])
@pytest.mark.parametrize("policy", ["ada_snapkv", "h2o", "model_column_max"])
def test_channels_lie_in_the_order_of_what_their_codes_would_change(
    policy: str, chunks: int | None
) -> None:
    """By MixKVQ's definition, for each prompt of a batch alone."""
    model = llama(torch.bfloat16)
    given = prompts(150, (0, 33) if chunks is None else (0, 0))
    positions = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with captured(model) as calls, torch.no_grad():
        model(**given, position_ids=positions)
    cache = adakv.Cache(
        model, policy, budget=64, kv_dtype="mixed3", chunked_prefill=chunks is not None
    )
    size: dict[str, Any] = {} if chunks is None else {"prefill_chunk_size": chunks}
    with adakv.attach(model):
        model.generate(**given, past_key_values=cache, **GREEDY | size | {"max_new_tokens": 2})
    basis: Any = cache.pages.basis  # type: ignore[union-attr]
    for layer, call in enumerate(calls):
        for b, start in enumerate((150 - given["attention_mask"].sum(1)).tolist()):
            for h, kept in enumerate(cache.pages.positions(layer)[b]):  # type: ignore[union-attr]
                queries = call["query"][b, 2 * h : 2 * h + 2, -32:].float()
                kept = kept[kept < 150 - start]  # of the prompt
                held = call["key"][b, h, start:][kept.long()].float()
                ranges = [page.amax(0) - page.amin(0) for page in held.split(32)]
                errors = queries.abs().mean((0, 1)) * torch.stack(ranges).sum(0)
                in_order = errors[basis.keys[layer, b, h]]
                assert (in_order.diff() <= 0.02 * errors.max()).all()


@pytest.mark.parametrize("kind", MIXED)
def test_the_loop_of_slots_writes_the_same_text(kind: str) -> None:
    assert torch.equal(*tiered.texts_of_loops(llama(torch.bfloat16), kind))


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("policy", ["snapkv", "model_column_max"])
def test_a_batch_writes_what_each_prompt_gets_alone(policy: str, kind: str) -> None:
    model = llama(torch.bfloat16)
    given, settings = tiered.given_to_batches(policy, kind)
    options = adakv.BatchOptions(max_batch=3, eos_token_id=())
    results = adakv.generate_batch(model, given, options=options, **settings)
    for prompt, result in zip(given, results, strict=True):
        assert result.tokens == tiered.written_alone(model, prompt, settings)


@pytest.mark.parametrize("kind", MIXED)
def test_forks_and_moves_have_the_orders_of_their_sequences(kind: str) -> None:
    model = llama(torch.bfloat16)
    with adakv.attach(model), torch.no_grad():
        of = tiered.Branched(model, kind)
        outs = [of.logits(x) for x in (of.cache, of.fork, of.moved)]
        beams = of.beams()
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    assert beams.shape == (2, 162)


def test_budgets_in_bytes_count_orders_and_pages() -> None:
    model = llama(torch.bfloat16)
    batch = prompts(1500, (0,))
    for kind in MIXED:
        cache = adakv.Cache(model, "snapkv", budget_bytes="40%", kv_dtype=kind)
        with adakv.attach(model), torch.no_grad():
            model(**batch, past_key_values=cache)
        stats, kv = cache.stats(), cache.pages
        assert kv is not None
        allowed = 0.4 * stats["full_bytes"]
        taken = stats["bytes"] + kv.caches[0].table_bytes  # type: ignore[union-attr]
        assert 0.8 * allowed < taken <= allowed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decode_budget": 64}, "decode_budget must be left out with mixed keys"),
        ({"keep_scores": True}, "keep_scores must be left out with mixed keys"),
        ({"read": "Quest(share=0.25)"}, "read must be left out with mixed keys"),
        ({"page_size": 16}, "page_size must be 32 for pages of mixed3, got 16"),
        ({"kv_dtype": "mixed1"}, "mixed keys must have 2 to 8 bits, got 'mixed1'"),
        ({"kv_dtype": "mixed3/channels=.5"}, "mixed keys have all of their channels"),
        (
            {"kv_dtype": "auto:1/2 + mixed3:1/4 + rank=1/2:1/4"},
            "tiers must have ranks or channels, not both, nor mixed keys beside them",
        ),
    ],
    ids=str,
)
def test_what_mixed_keys_do_not_go_with_is_named(settings: dict[str, Any], message: str) -> None:
    given = {"policy": "snapkv", "budget": 64, "kv_dtype": "mixed3"}
    with pytest.raises(ValueError, match=message):
        adakv.Cache(llama(torch.bfloat16), **{**given, **settings})


def test_files_cropping_and_shrinking_are_refused(tmp_path: Path) -> None:
    model = llama(torch.bfloat16)
    cache = adakv.Cache(model, "snapkv", budget=64, kv_dtype="mixed3")
    with adakv.attach(model), torch.no_grad():
        model(**prompts(150, (0,)), past_key_values=cache)
    with pytest.raises(ValueError, match="save: files hold one format, got kv_dtype='mixed3'"):
        cache.save(tmp_path / "cache.safetensors")
    with pytest.raises(ValueError, match="shrink"):
        cache.shrink(budget=40)
    with pytest.raises(ValueError, match="crop"):
        cache.crop(-5)
