"""Caches whose entries have some of their dimensions, under transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import adakv
from hf import tiered
from hf.families import LLAMA
from hf.test_bits import divergence, llama, logits
from hf.test_hf import GREEDY, captured, prompts
from hf.test_tiers import POLICIES

pytestmark = pytest.mark.model

#: For heads of 16: channels are 8 of them, and so are ranks.
NARROW = ["channels=1/2", "auto:1/4 + rank=1/2:3/4", "auto | rank=1/2 : 3/4"]


@pytest.mark.parametrize("kind", ["channels=1", "auto:1/4 + rank=1:1/4 + rank=9/10:1/2"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_basis_of_all_dimensions_is_the_cache_without(policy: str, kind: str) -> None:
    """In float32, but for rounding: the same entries, the same logits."""
    model = LLAMA.model()
    whole = adakv.Cache(model, policy, budget=64)
    expected = logits(model, whole)
    cache = adakv.Cache(model, policy, budget=64, kv_dtype=kind)
    got = logits(model, cache)
    assert (got - expected).abs().max() < 5e-5 * expected.abs().max()
    for layer in range(2):
        for ours, theirs in zip(cache.kept(layer), whole.kept(layer), strict=True):
            assert all(map(torch.equal, ours, theirs))
    assert cache.stats()["kv_dtype"] == kind


@pytest.mark.parametrize("chunks", [None, 40])
@pytest.mark.parametrize("policy", ["ada_snapkv", "h2o", "model_column_max"])
def test_channels_are_those_of_the_newest_queries_and_of_the_keys_that_stay(
    policy: str, chunks: int | None
) -> None:
    """By ThinK's definition, for each prompt of a batch alone; the window is whole."""
    model = LLAMA.model()
    given = prompts(150, (0, 33) if chunks is None else (0, 0))
    positions = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with captured(model) as calls, torch.no_grad():
        model(**given, position_ids=positions)
    cache = adakv.Cache(
        model, policy, budget=64, kv_dtype="channels=1/2", chunked_prefill=chunks is not None
    )
    size: dict[str, Any] = {} if chunks is None else {"prefill_chunk_size": chunks}
    with adakv.attach(model):
        model.generate(**given, past_key_values=cache, **GREEDY | size)
    window, kv = cache.budget.policy.window, cache.pages
    basis: Any = kv.basis  # type: ignore[union-attr]
    for layer, call in enumerate(calls):
        for b, start in enumerate((150 - given["attention_mask"].sum(1)).tolist()):
            first, second = (x.positions(layer)[b] for x in kv.caches)  # type: ignore[union-attr]
            for h in range(2):
                kept = torch.cat([first[h], second[h]]).sort().values
                end = 150 - start
                held = kept[kept < end - window].long()
                assert torch.equal(second[h].long(), held)
                keys = call["key"][b, h, start:][held].double()
                queries = call["query"][b, 2 * h : 2 * h + 2, -32:].double()
                score = queries.square().mean((0, 1)) * keys.square().mean(0)
                expected = score.topk(8).indices.sort().values
                assert torch.equal(basis.keys[layer, b, h].sort().values, expected)


@pytest.mark.parametrize("kind", NARROW)
def test_the_loop_of_slots_writes_the_same_text(kind: str) -> None:
    assert torch.equal(*tiered.texts_of_loops(LLAMA.model(), kind))


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("policy", ["snapkv", "model_column_max"])
def test_a_batch_writes_what_each_prompt_gets_alone(policy: str, kind: str) -> None:
    model = LLAMA.model()
    given, settings = tiered.given_to_batches(policy, kind)
    options = adakv.BatchOptions(max_batch=3, eos_token_id=())
    results = adakv.generate_batch(model, given, options=options, **settings)
    for prompt, result in zip(given, results, strict=True):
        assert result.tokens == tiered.written_alone(model, prompt, settings)


@pytest.mark.parametrize("kind", NARROW)
def test_forks_moves_and_second_turns_have_the_bases_of_their_sequences(kind: str) -> None:
    model = LLAMA.model()
    with adakv.attach(model), torch.no_grad():
        of = tiered.Branched(model, kind)
        outs = [of.logits(x) for x in (of.fork, of.moved)]
        one_by_one = [
            model(
                of.turn[:, i : i + 1],
                past_key_values=of.cache,
                attention_mask=of.mask[:, : 151 + i],
            )
            for i in range(5)
        ]
        beams = of.beams()
    assert torch.equal(*outs)
    last = one_by_one[-1].logits[:, -1]
    assert (outs[0][:, -1] - last).abs().max() < 1e-4 * last.abs().max()
    assert beams.shape == (2, 162)


def test_fewer_dimensions_are_further_from_the_full_cache_and_take_fewer_bytes() -> None:
    model = LLAMA.model(hidden_size=256)  # heads of 64
    full = logits(model, adakv.Cache(model, "full"), steps=8)
    for kinds in (
        ("channels=.8", "channels=.6", "channels=.2"),
        ("rank=.9", "rank=1/2", "rank=1/4"),
    ):
        lost, taken = [], []
        for kind in kinds:
            cache = adakv.Cache(model, "snapkv", budget=500, kv_dtype=kind)
            lost.append(divergence(logits(model, cache, steps=8), full))
            kv: Any = cache.pages
            taken.append(kv.caches[1].page_bytes)
            assert cache.stats()["bytes"] == kv.bytes_used
        assert lost == sorted(lost)
        assert taken == sorted(taken, reverse=True)
        assert taken[1] == 16 * (4 * (40 + 64 if kinds[0][0] == "c" else 32 + 32) + 4)


def test_think_is_snapkv_whose_keys_lose_two_fifths_of_their_channels() -> None:
    """The bytes of a budget hold more entries, as each takes fewer."""
    model = LLAMA.model(hidden_size=256).to(torch.bfloat16)
    batch = prompts(1500, (0,))
    cache = adakv.Cache(model, "think", budget=500)
    snapkv = adakv.Cache(model, "snapkv", budget=500)
    with adakv.attach(model), torch.no_grad():
        for each in (cache, snapkv):
            model(**batch, past_key_values=each)
    kv: Any = cache.pages
    assert kv.caches[1].page_bytes == 16 * (2 * (40 + 64) + 4)
    assert 1.05 * 500 < int(cache.stats()["lengths"].min()) < 260 / 212 * 500
    assert cache.stats()["bytes"] <= snapkv.stats()["bytes"]


def test_budgets_in_bytes_count_bases_and_the_pages_of_all_tiers() -> None:
    model = llama(torch.bfloat16)
    batch = prompts(1500, (0,))
    for kind in NARROW:
        for policy in ("snapkv", "model_column_max"):
            cache = adakv.Cache(model, policy, budget_bytes="40%", kv_dtype=kind)
            with adakv.attach(model), torch.no_grad():
                model(**batch, past_key_values=cache)
            stats, kv = cache.stats(), cache.pages
            assert kv is not None
            allowed = 0.4 * stats["full_bytes"]
            taken = stats["bytes"] + kv.caches[0].table_bytes  # type: ignore[union-attr]
            assert 0.8 * allowed < taken <= allowed


@pytest.mark.parametrize("policy", ["ada_snapkv", "model_rank_fusion"])
def test_mixed_tiers_take_their_share_of_the_bytes_in_each_layer(policy: str) -> None:
    """Some of what a policy keeps goes, but for its window, and all the rest lies once in a tier,
    for each prompt of a batch as alone."""
    model = LLAMA.model(hidden_size=256)
    whole = adakv.Cache(model, policy, budget=100)
    logits(model, whole)
    cache = adakv.Cache(model, policy, budget=100, kv_dtype="auto | rank=1/2 | rank=1/4 : 1/2")
    logits(model, cache)
    window, kv = cache.budget.policy.window, cache.pages
    caches: Any = kv.caches  # type: ignore[union-attr]
    costs = [part.page_bytes for part in caches]
    assert sum(len(part.layers) and int(part.lengths().sum()) > 0 for part in caches) == 3
    for layer in range(4):
        kept, held = whole.kept(layer), cache.kept(layer)
        tiers = [part.positions(layer) for part in caches]
        for b, n in enumerate((150, 117, 50)):
            spent = rest = 0
            for h in range(2):
                before = [p for p in kept[b][h].tolist() if p < n - window]
                new = [p for p in kept[b][h].tolist() if p >= n - window]
                rest += len(before)
                spent -= costs[0] * len(new)
                spent += sum(c * len(t[b][h]) for c, t in zip(costs, tiers, strict=True))
                every = sorted(p for tier in tiers for p in tier[b][h].tolist())
                assert every == held[b][h].tolist()
                assert set(new) <= set(tiers[0][b][h].tolist())
                assert set(every) - set(new) <= set(before)
            assert rest * costs[0] / 2 - max(costs) <= spent <= rest * costs[0] / 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decode_budget": 64}, "decode_budget must be left out with several tiers, got kv_dtype"),
        ({"keep_scores": True}, "keep_scores must be left out with several tiers"),
        ({"kv_dtype": "rank=1/4:1"}, "the first tier must have whole entries, got 'rank=1/4:1'"),
        ({"kv_dtype": "auto:1/2 + rank=2:1/2"}, "width must be rank= or channels= and a share"),
        (
            {"kv_dtype": "auto:1/2 + rank=1/2:1/4 + channels=1/2:1/4"},
            "tiers must have ranks or channels, not both",
        ),
    ],
    ids=str,
)
def test_what_narrow_tiers_do_not_go_with_is_named(settings: dict[str, Any], message: str) -> None:
    given = {"policy": "snapkv", "budget": 64, "kv_dtype": "rank=1/2"}
    with pytest.raises(ValueError, match=message):
        adakv.Cache(LLAMA.model(), **{**given, **settings})


def test_pages_of_int4_want_keys_as_wide_as_values() -> None:
    model = LLAMA.model(hidden_size=256).to(torch.bfloat16)
    cache = adakv.Cache(model, "snapkv", budget=64, kv_dtype="int4/channels=.6")
    with (
        adakv.attach(model),
        torch.no_grad(),
        pytest.raises(ValueError, match="int4 take values that are as wide as keys, got 64 and 40"),
    ):
        model(**prompts(150, (0,)), past_key_values=cache)
