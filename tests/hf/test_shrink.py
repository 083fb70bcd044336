"""Smaller caches of larger ones: what stays is what the prompt's scores say, and what was written
behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import adakv
from adakv.cache import sequences
from adakv.entries import Held
from adakv.policy import get
from adakv.policy.presets import names
from adakv.tiers import Tiers
from hf.families import FAMILIES, LLAMA
from hf.forwards import ids, logits

LAYERS = 4


def assert_alike(model: PreTrainedModel, batch: int, *caches: Any, count: int) -> None:
    tokens = ids(count, batch=batch)
    for i in range(count):
        both = [logits(model, tokens[:, i : i + 1], cache) for cache in caches]
        torch.testing.assert_close(*both)


def read(model: PreTrainedModel, prompt: Tensor, *args: Any, **settings: Any) -> Any:
    cache = adakv.Cache(model, *args, **{"keep_scores": True, **settings})
    logits(model, prompt, cache)
    if cache.reading is not None:
        cache.repeat(prompt)
    return cache


def kept(cache: Any) -> list[list[list[int]]]:
    """Positions of each row: ``[L][B * Hkv]``."""
    return [
        [row.tolist() for sequence in cache.kept(layer) for row in sequence]
        for layer in range(LAYERS)
    ]


def shared(a: Any, b: Any) -> float:
    """The share of the entries of ``a`` that ``b`` has, too."""
    pairs = [
        pair for both in zip(kept(a), kept(b), strict=True) for pair in zip(*both, strict=True)
    ]
    return sum(len({*x} & {*y}) for x, y in pairs) / sum(len(x) for x, _ in pairs)


#: Policies whose choice for a small budget is nearly a part of that for a larger one: their second
#: stage counts the window, weights of layers or heads are found from all scores, sums are rounded,
#: or many scores are equal.
NEARLY = {
    *("critical_snapkv", "critical_ada_snapkv", "critical_ada_pyramidkv", "critical_lava", "lava"),
    *("corm", "aircache", "ada_snapkv@ffy0", "ada_pyramidkv@ffy0", "ada_snapkv@kvcache_factory"),
}
#: Those that can't choose from what they scored before, and why.
REFUSED = {
    "full": "it keeps everything",
    "vase": "SampledRest needs queries",
    "csp": "ClassQuotas needs classes",
    "ahakv": "what AhaKV scores depends on the budget",
}


def has_tiers(policy: str) -> bool:
    """Whether a preset has several formats in a row, which leave no scores (test_tiers.py)."""
    bits = get(policy).bits
    return bits is not None and len(Tiers.given(bits.kv_dtype or "auto").formats) > 1


@pytest.mark.parametrize("ratio", [0.5, 1.0])
@pytest.mark.parametrize(
    "policy", [name for name in names() if name not in REFUSED and not has_tiers(name)]
)
def test_it_holds_what_a_small_one_would_have_chosen(policy: str, ratio: float) -> None:
    """Every preset does, also where all of the prompt was kept, which nobody scores otherwise."""
    model, prompt = LLAMA.model(), ids(400)
    settings: dict[str, Any] = {}
    if "classes" in get(policy).needs:
        settings["classes"] = {"image": [(4, 380)]}
    with adakv.attach(model):
        cache, small = (read(model, prompt, policy, ratio=x, **settings) for x in (ratio, 0.2))
        cache.shrink(0.2)
        if policy in NEARLY:
            assert shared(small, cache) > 0.95
            sizes = [x.stats()["lengths"].sum().item() for x in (cache, small)]
            assert sizes[0] == pytest.approx(sizes[1], rel=0.02)
        else:
            assert kept(cache) == kept(small)
            assert_alike(model, 1, cache, small, count=3)


@pytest.mark.parametrize("policy", REFUSED)
def test_policies_that_can_not_are_refused(policy: str) -> None:
    model, prompt = LLAMA.model(), ids(90)
    settings: dict[str, Any] = {} if policy == "full" else {"ratio": 0.6}
    if policy == "csp":
        settings["classes"] = {"image": [(5, 30)]}
    with adakv.attach(model):
        cache = read(model, prompt, policy, **settings)
        before = kept(cache)
        with pytest.raises(ValueError, match=REFUSED[policy]):
            cache.shrink(0.5)
        assert kept(cache) == before


def test_rows_of_a_batch_and_long_answers() -> None:
    model, prompt = LLAMA.model(), ids(160, batch=2)
    with adakv.attach(model):
        cache, small = (read(model, prompt, "ada_snapkv", budget=n) for n in (100, 44))
        cache.shrink(budget=44)
        assert_alike(model, 2, cache, small, count=60)


def test_the_highest_scores_stay_and_so_does_the_text() -> None:
    """The definition, head by head, from the scores that the cache remembers."""
    model, prompt = LLAMA.model(), ids(120)
    with adakv.attach(model):
        cache = read(model, prompt, "snapkv", budget=90, page_size=8)
        before, scores = kept(cache), [x.double() for x in cache.kept_scores]
        logits(model, ids(20), cache)
        (whole,) = cache.fork()
        cache.shrink(budget=50)
        for layer in range(LAYERS):
            for h, row in enumerate(before[layer]):
                order = sorted(range(len(row)), key=lambda i: (-float(scores[layer][0, h, i]), i))
                expected = sorted(row[i] for i in order[:50])
                assert kept(cache)[layer][h] == [*expected, *range(120, 140)]
        assert kept(whole)[0][0] == [*before[0][0], *range(120, 140)]  # a fork keeps what it has
        assert cache.seen == [140]
        cache.crop(-15)
        assert kept(cache)[1][1][-5:] == [*range(120, 125)]


def test_again_and_again_is_at_once() -> None:
    model, prompt = LLAMA.model(), ids(160)
    with adakv.attach(model):
        cache = read(model, prompt, "ada_snapkv", budget=120)
        (once,) = cache.fork()
        used = []
        for budget in (110, 80, 60, 40):
            cache.shrink(budget=budget)
            used.append((cache.pages.pages_used, cache.pages.num_pages))
        once.shrink(budget=40)
        assert kept(cache) == kept(once)
        assert used == sorted(used, reverse=True)
        cache.shrink(budget=100)  # there is no more
        assert kept(cache) == kept(once)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_quantised_entries_move_as_they_are(kv_dtype: str) -> None:
    model, prompt = LLAMA.model().bfloat16(), ids(160)
    with adakv.attach(model):
        cache, small = (
            read(model, prompt, "snapkv", budget=n, kv_dtype=kv_dtype) for n in (100, 44)
        )
        cache.shrink(budget=44)
        assert kept(cache) == kept(small)
        for layer in range(LAYERS):
            for ours, theirs in zip(entries(cache, layer), entries(small, layer), strict=True):
                assert torch.equal(ours[:, :, :44], theirs[:, :, :44])


def test_int4_keys_are_quantised_once_more() -> None:
    """A page's keys share scales, which others are when other keys leave. So each time costs up to
    half a step, a 15th of the range of a channel at most."""
    model, prompt = LLAMA.model().bfloat16(), ids(160)
    with adakv.attach(model):
        cache, small, exact, all_of_it = (
            read(model, prompt, "snapkv", budget=n, kv_dtype=kv_dtype)
            for n, kv_dtype in ((100, "int4"), (44, "int4"), (44, "auto"), (160, "auto"))
        )
        cache.shrink(budget=44)
        assert kept(cache) == kept(small) == kept(exact)
        for layer in range(LAYERS):
            keys, values = (x[:, :, :44] for x in entries(cache, layer))
            true_keys, true_values = (x[:, :, :44] for x in entries(exact, layer))
            every_key = entries(all_of_it, layer)[0][:, :, :160]
            step = (every_key.amax(2, keepdim=True) - every_key.amin(2, keepdim=True)) / 15
            assert ((keys - true_keys).abs() <= 1.05 * step + 0.02).all()
            step = (true_values.amax(3, keepdim=True) - true_values.amin(3, keepdim=True)) / 15
            assert ((values - true_values).abs() <= 0.55 * step + 0.05).all()


def entries(cache: Any, layer: int) -> list[Tensor]:
    """Keys and values ``[B, Hkv, T, D]`` float32, as steps read them."""
    view = sequences(cache.pages.layers[layer], slice(None))
    held = Held(view, int(view.lengths.max()), cache.pages.dtype)
    return [held.keys.float(), held.values.float()]


def test_scores_go_with_forks_rows_and_files(tmp_path: Path) -> None:
    model, prompt, path = LLAMA.model(), ids(120, batch=3), tmp_path / "doc.safetensors"
    with adakv.attach(model):
        cache = read(model, prompt, "ada_snapkv", budget=90)
        cache.batch_select_indices(torch.tensor([2, 0]))
        logits(model, ids(7, batch=2), cache)
        cache.save(path)
        loaded = adakv.Cache.load(model, path)
        (fork,) = cache.fork()
        for each in (cache, loaded, fork):
            each.shrink(budget=40)
        assert kept(cache) == kept(loaded) == kept(fork)
        small = read(model, prompt[[2, 0]], "ada_snapkv", budget=40)
        assert [[x for x in row if x < 120] for row in kept(cache)[2]] == kept(small)[2]
        cache.save(path)
        once_more = adakv.Cache.load(model, path)
        for each in (once_more, cache):
            each.shrink(budget=36)
        assert kept(once_more) == kept(cache)
        other = read(model, prompt, "ada_snapkv", budget=90, keep_scores=False)
        other.save(path)
        with pytest.raises(ValueError, match="keep_scores"):
            adakv.Cache.load(model, path).shrink(0.3)


def test_padding_and_protected_tokens() -> None:
    model, prompt = LLAMA.model(), ids(120, batch=2)
    mask = torch.ones_like(prompt)
    mask[0, :30] = 0
    with adakv.attach(model):
        caches = []
        for budget in (80, 50):
            cache = adakv.Cache(
                model, "ada_snapkv", budget=budget, protect=[(3, 9)], keep_scores=True
            )
            logits(model, prompt, cache, attention_mask=mask)
            caches.append(cache)
        caches[0].shrink(budget=50)
        assert kept(caches[0]) == kept(caches[1])
        with pytest.raises(
            ValueError, match="38 entries, and a kv head of layer 0 has room for 36"
        ):
            caches[0].shrink(budget=36)
        assert kept(caches[0]) == kept(caches[1])


def test_windows_stay_as_they_are() -> None:
    family = next(f for f in FAMILIES if f.prefix == "Gemma3")
    model, prompt = family.model(), ids(120)
    with adakv.attach(model):
        cache = adakv.Cache(model, "snapkv", budget=90, keep_scores=True)
        small = adakv.Cache(model, "snapkv", budget=40)
        for each in (cache, small):
            logits(model, prompt, each)
        cache.shrink(budget=40)
        step = ids(1)
        torch.testing.assert_close(logits(model, step, cache), logits(model, step, small))


def test_a_prompt_in_chunks() -> None:
    model, prompt = LLAMA.model(), ids(160)
    with adakv.attach(model):
        caches = [
            adakv.Cache(model, budget=n, chunked_prefill=True, keep_scores=True) for n in (200, 60)
        ]
        step = ids(1)
        for cache in caches:
            for part in prompt.split(50, 1):
                logits(model, part, cache)
            logits(model, step, cache)
        caches[0].shrink(budget=60)
        assert shared(caches[1], caches[0]) > 0.85


def test_what_can_not_be_done_is_refused() -> None:
    model, prompt = LLAMA.model(), ids(90)
    with adakv.attach(model):
        adakv.Cache(model, budget=40, keep_scores=True).shrink(0.5)  # empty: nothing to do
        cache = read(model, prompt, budget=60)
        before = kept(cache)
        for given, message in (
            ({}, "give either budget or ratio"),
            ({"ratio": 0.5, "budget": 40}, "give either budget or ratio"),
            ({"ratio": 0}, "ratio must be above 0"),
            ({"budget": 3}, "budget must be at least"),
        ):
            with pytest.raises(ValueError, match=message):
                cache.shrink(**given)
        assert kept(cache) == before
        with pytest.raises(ValueError, match="make the cache with keep_scores=True"):
            read(model, prompt, budget=60, keep_scores=False).shrink(0.5)
        with pytest.raises(ValueError, match="decode_budget"):
            read(model, prompt, "snapkv", budget=60, decode_budget=40).shrink(0.5)
        with pytest.raises(ValueError, match="keep_scores must not be given with chunk_budget"):
            adakv.Cache(model, "snapkv", budget=60, chunk_budget=60, keep_scores=True)
        with pytest.raises(ValueError, match="keep_scores must be True or False"):
            adakv.Cache(model, budget=60, keep_scores=1)
