"""Caches with several formats in one row under transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import adakv
from hf import tiered
from hf.families import LLAMA
from hf.test_bits import divergence, llama, logits
from hf.test_hf import GREEDY, prompts

pytestmark = pytest.mark.model

POLICIES = ["snapkv", "ada_snapkv", "critical_ada_snapkv", "model_column_max", "model_rank_fusion"]
KINDS = pytest.mark.parametrize("kind", ["auto:1/4 + int8:3/4", "int8:1/4 + int2:3/4"])
SIX = "auto:1/2 + auto:1/3 + auto:1/6"


def tiers_of(cache: Any, layer: int) -> list[list[list[torch.Tensor]]]:
    """Positions, by tier, sequence and kv head."""
    return [part.positions(layer) for part in cache.pages.caches]


@pytest.mark.parametrize("policy", POLICIES)
def test_tiers_of_one_format_are_one_cache(policy: str) -> None:
    """In float32, whatever is in which tier: the same entries, the same logits but for rounding."""
    model = LLAMA.model()
    whole = adakv.Cache(model, policy, budget=64)
    expected = logits(model, whole)
    cache = adakv.Cache(model, policy, budget=64, kv_dtype=SIX)
    got = logits(model, cache)
    assert (got - expected).abs().max() < 2e-5 * expected.abs().max()
    for layer in range(2):
        for ours, theirs in zip(cache.kept(layer), whole.kept(layer), strict=True):
            assert all(map(torch.equal, ours, theirs))
    assert torch.equal(cache.stats()["lengths"], whole.stats()["lengths"])


@KINDS
def test_the_loop_of_slots_writes_the_same_text(kind: str) -> None:
    assert torch.equal(*tiered.texts_of_loops(llama(torch.bfloat16), kind))


@pytest.mark.parametrize("policy", ["snapkv", "model_column_max"])
def test_a_batch_writes_what_each_prompt_gets_alone(policy: str) -> None:
    model = llama(torch.bfloat16)
    given, settings = tiered.given_to_batches(policy, "auto:1/4 + int8:3/4")
    options = adakv.BatchOptions(max_batch=3, eos_token_id=())
    results = adakv.generate_batch(model, given, options=options, **settings)
    few = adakv.BatchOptions(max_batch=3, eos_token_id=(), cache_bytes=400_000)
    fewer = adakv.generate_batch(model, given, options=few, **settings)
    for prompt, result, other in zip(given, results, fewer, strict=True):
        alone = tiered.written_alone(model, prompt, settings)
        assert result.tokens == other.tokens == alone
    with pytest.raises(adakv.Error, match=r"prompts can never fit, .*1000"):
        none = adakv.BatchOptions(cache_bytes=1000)
        adakv.generate_batch(model, given, options=none, **settings)


@pytest.mark.parametrize("policy", ["snapkv", "model_column_max"])
def test_a_budget_above_the_prompt_is_the_full_cache(policy: str) -> None:
    model = LLAMA.model()
    expected = logits(model, adakv.Cache(model, "full"))
    got = logits(model, adakv.Cache(model, policy, budget=500, kv_dtype=SIX))
    assert (got - expected).abs().max() < 2e-5 * expected.abs().max()


def test_the_first_tier_has_the_window_and_the_highest_scores_and_grows() -> None:
    model = llama(torch.bfloat16)
    cache = adakv.Cache(model, "snapkv", budget=64, kv_dtype="auto:1/4 + int4:3/4")
    logits(model, cache, steps=20)
    first, second = tiers_of(cache, 0)
    for b, n in enumerate([150, 117, 50]):  # of the prompts; budget 64, window 32
        kept = min(n, 64)
        of_first = 32 + -(-(kept - 32) // 4)
        for h in range(2):
            assert first[b][h].tolist()[-20:] == list(range(n, n + 20))
            assert set(range(n - 32, n)) <= set(first[b][h].tolist())
            assert len(first[b][h]) == of_first + 20
            assert len(second[b][h]) == kept - of_first


@pytest.mark.parametrize("policy", ["snapkv", "model_column_max", "model_rank_fusion"])
def test_where_all_is_kept_scores_say_what_is_in_which_tier(policy: str) -> None:
    """Nearly the same as where one entry of a head had to go; without scores it were the first
    entries."""
    model, first = LLAMA.model(), []
    for budget in (149, 150):
        cache = adakv.Cache(model, policy, budget=budget, kv_dtype="auto:1/4 + auto:3/4")
        with adakv.attach(model), torch.no_grad():
            torch.manual_seed(1)
            model(**prompts(150, (0,)), past_key_values=cache)
        first.append([set(row.tolist()) for x in range(4) for row in tiers_of(cache, x)[0][0]])
    same = sum(len(a & b) for a, b in zip(*first, strict=True))
    assert same > 0.9 * sum(map(len, first[1]))


def test_bytes_are_those_of_the_tiers_pages() -> None:
    model = llama(torch.bfloat16)
    cache = adakv.Cache(model, "snapkv", budget=96, kv_dtype="auto:1/4 + int4:3/4")
    logits(model, cache)
    kv = cache.pages
    assert kv is not None
    caches: Any = kv.caches  # type: ignore[union-attr]
    assert [part.kv_dtype for part in caches] == ["auto", "int4"]
    stats = cache.stats()
    assert stats["bytes"] == sum(part.bytes_used for part in caches) == kv.bytes_used
    assert stats["kv_dtype"] == "auto:1/4 + int4:3/4"
    lengths = caches[1].lengths()  # each row ends a page, and has a fresh one
    assert caches[1].pages_used <= int(lengths.sum()) // 32 + 3 * lengths.numel()
    assert "auto:1/4 + int4:3/4" in repr(cache)


def test_more_bits_are_nearer_to_the_full_cache() -> None:
    model = llama(torch.bfloat16)
    full = logits(model, adakv.Cache(model, "full"))
    lost = [
        divergence(logits(model, adakv.Cache(model, "snapkv", budget=500, kv_dtype=kind)), full)
        for kind in ("auto:1/2 + int8:1/2", "int8:1/2 + int4:1/2", "int4", "int2")
    ]
    assert lost == sorted(lost)
    assert lost[0] < lost[2] / 4


@KINDS
def test_forks_and_beams_have_all_tiers(kind: str) -> None:
    model = llama(torch.bfloat16)
    batch = prompts(150, (0, 33))
    with adakv.attach(model):
        tokens = [
            model.generate(
                **batch,
                past_key_values=adakv.Cache(model, "snapkv", budget=64, kv_dtype=kv_dtype),
                **{**GREEDY, "num_beams": 3, "max_new_tokens": 12},
            )
            for kv_dtype in (kind, "auto")
        ]
        cache = adakv.Cache(model, "snapkv", budget=64, kv_dtype=kind)
        with torch.no_grad():
            model(**batch, past_key_values=cache)
        forks = cache.fork(2)
        assert [x.stats()["bytes"] > 0 for x in forks] == [True, True]
        token = torch.full((2, 1), 5)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
        given: dict[str, Any] = {"attention_mask": mask}
        with torch.no_grad():
            outs = [model(token, past_key_values=x, **given).logits for x in (*forks, cache)]
    assert tokens[0].shape == tokens[1].shape
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_tokens_behind_the_prompt_are_taken_back_and_moved() -> None:
    model = llama(torch.bfloat16)
    batch = prompts(150, (0,))
    cache = adakv.Cache(model, "snapkv", budget=64, kv_dtype="auto:1/4 + int4:3/4")
    with adakv.attach(model), torch.no_grad():
        model(**batch, past_key_values=cache)
        token = torch.full((1, 1), 5)
        first = model(token, past_key_values=cache).logits
        model(token, past_key_values=cache)
        cache.crop(-2)
        cache.move_to("cpu")
        assert torch.equal(model(token, past_key_values=cache).logits, first)
        with pytest.raises(ValueError, match="can't be taken back from several tiers"):
            cache.crop(-5)


def test_budgets_in_bytes_count_the_pages_of_all_tiers() -> None:
    """As many entries as have room: no more bytes than were given, and not much less."""
    model = llama(torch.bfloat16)
    batch = prompts(1500, (0,))
    for kind in ("auto:1/4 + int4:3/4", "int8:1/2+int4:1/2", "auto:1/2 + int2:1/2"):
        for policy in ("snapkv", "model_column_max"):
            cache = adakv.Cache(model, policy, budget_bytes="40%", kv_dtype=kind)
            with adakv.attach(model), torch.no_grad():
                model(**batch, past_key_values=cache)
            stats, kv = cache.stats(), cache.pages
            assert kv is not None
            allowed = 0.4 * stats["full_bytes"]
            assert 0.8 * allowed < stats["bytes"] + kv.caches[0].table_bytes <= allowed


def test_mikv_holds_what_h2o_would_evict_in_fewer_bits() -> None:
    """The bytes of a budget of .7 hold all: the window and a fifth of the rest in 16 bits."""
    model = llama(torch.bfloat16)
    cache = adakv.Cache(model, "mikv", ratio=0.7)
    h2o, batch = adakv.Cache(model, "h2o", budget=32 + 294), prompts(1500, (0,))
    with adakv.attach(model), torch.no_grad():
        for each in (cache, h2o):
            model(**batch, past_key_values=each)
    assert int(cache.stats()["lengths"].min()) == 1500
    first, second = tiers_of(cache, 1)
    for h in range(2):
        assert len(first[0][h]) == 32 + 294
        assert len(second[0][h]) == 1500 - 32 - 294
        assert torch.equal(first[0][h], h2o.kept(1)[0][h])
    assert cache.stats()["bytes"] < 0.7 * cache.stats()["full_bytes"]


def test_tokens_that_stand_out_keep_their_bits() -> None:
    """KVSink: those with the largest numbers in a channel, beside the window; all else in int4."""
    model = llama(torch.bfloat16)
    batch = prompts(400, (0,))
    text = "HiddenOutlier(channel=3, layer=1) * Uniform(layers=Everything()) * TopScore()"
    cache = adakv.Cache(model, text, ratio=1.0, kv_dtype="auto:1/64 + int4:63/64")
    with adakv.attach(model), torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
        model(**batch, past_key_values=cache)
    assert int(cache.stats()["lengths"].min()) == 400
    normed = model.model.layers[2].input_layernorm(states[2])[0, :368, 3].float().abs()
    expected = [list(range(6)), sorted(normed.topk(6).indices.tolist())]  # 368 / 64, rounded up
    for layer, tokens in zip((0, 2), expected, strict=True):
        first, _ = tiers_of(cache, layer)
        for row in first[0]:
            assert row.tolist() == [*tokens, *range(368, 400)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decode_budget": 64}, "decode_budget must be left out with several tiers, got kv_dtype"),
        ({"chunk_budget": 64}, "chunk_budget must be left out with several tiers"),
        ({"read": "Quest(share=0.25)"}, "read must be left out with several tiers"),
        ({"keep_scores": True}, "keep_scores must be left out with several tiers"),
        (
            {"policy": "KeyDiff() * Uniform() * TopScore() * Folded(biases=False)"},
            "kv_dtype: Folded",
        ),
        ({"page_size": 16}, "page_size must be 32 for pages of int4, got 16"),
        ({"kv_dtype": "auto:1/4 + int4:1/4"}, "shares above 0 that sum to 1"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_what_tiers_do_not_go_with_is_named(settings: dict[str, Any], message: str) -> None:
    model = llama(torch.bfloat16)
    given = {"policy": "snapkv", "budget": 64, "kv_dtype": "auto:1/4 + int4:3/4"}
    with pytest.raises(ValueError, match=message):
        adakv.Cache(model, **{**given, **settings})


def test_models_in_float32_and_what_comes_later_are_refused(tmp_path: Any) -> None:
    model = llama(torch.bfloat16)
    cache = adakv.Cache(model, "snapkv", budget=64, kv_dtype="auto:1/4 + int4:3/4")
    with adakv.attach(model), torch.no_grad():
        model(**prompts(150, (0,)), past_key_values=cache)
    with pytest.raises(ValueError, match="save: files hold one format, got kv_dtype"):
        cache.save(tmp_path / "cache.safetensors")
    with pytest.raises(ValueError, match="shrink: entries stay in the tier"):
        cache.shrink(budget=40)
    given: dict[str, Any] = {"policy": "snapkv", "budget": 64, "kv_dtype": "auto:1/4 + int4:3/4"}
    for name, more in (
        ("decode_budget", {"decode_budget": 64}),
        ("prefix", {"prefix": torch.arange(3, 90)}),
        ("park", {"options": adakv.BatchOptions(park="cpu")}),
        ("read", {"options": adakv.BatchOptions(read="Quest(share=0.25)")}),
    ):
        with pytest.raises(ValueError, match=f"{name} must be left out with several tiers"):
            adakv.generate_batch(model, [torch.arange(3, 60)], **given, **more)
    small = LLAMA.model()
    cache = adakv.Cache(small, "snapkv", budget=64, kv_dtype="auto:1/4 + int4:3/4")
    with (
        adakv.attach(small),
        torch.no_grad(),
        pytest.raises(ValueError, match="pages of int4 take float16 and bfloat16"),
    ):
        small(**prompts(150, (0,)), past_key_values=cache)
