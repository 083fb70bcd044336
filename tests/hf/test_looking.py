"""Small models beside caches: with the model itself beside it nothing changes."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import adakv
from adakv.hf.looking import looked_at, looking_cache
from adakv.policy import SmallKV, SpecAttn
from hf.families import LLAMA, VOCAB, Family
from hf.test_families import MIMO
from hf.test_hf import GREEDY

pytestmark = pytest.mark.model

ALL = {"share": 1.0}  # of SmallKV: no entry is of the rest
SMALL = LLAMA.model(num_hidden_layers=2)


def tokens(length: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randint(3, VOCAB, (1, length))


def logits(model: Any, read: Any, *, steps: int = 8, width: int = 1) -> Tensor:
    """``[steps, V]`` behind a prompt."""
    cache, found = adakv.Cache(model, "full", read=read), []
    with torch.no_grad(), adakv.attach(model):
        model(tokens(150), past_key_values=cache)
        for seed in range(steps):
            found.append(model(tokens(width, seed), past_key_values=cache).logits[0, -1])
    return torch.stack(found)


@pytest.mark.parametrize("prefix", ["Llama", "Qwen2", "Qwen3", "Olmo2"])
def test_looking_changes_nothing_that_a_model_says(prefix: str) -> None:
    """And what it looks at is what transformers' own attention says."""
    model, ids = Family(prefix, {"head_dim": 32} if prefix == "Qwen3" else {}).model(), tokens(90)
    with torch.no_grad(), adakv.attach(model):
        cache, found = looking_cache(model), []
        for part in (ids[:, :70], ids[:, 70:]):
            found.append(model(part, past_key_values=cache, use_cache=True).logits)
        looks = [layer.look for layer in cache.layers]
        for layer in cache.layers:
            layer.crop(5)
        again = model(ids[:, -5:], past_key_values=cache, use_cache=True).logits
    with torch.no_grad():
        plain = model(ids, output_attentions=True)
    torch.testing.assert_close(torch.cat(found, 1), plain.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again, plain.logits[:, -5:], atol=1e-4, rtol=1e-4)
    for look, layer, p in zip(looks, cache.layers, plain.attentions, strict=True):
        torch.testing.assert_close(look.weights, p[0, :, 70:], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(look.sums, p[0].sum(1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.look.sums, p[0].sum(1), atol=1e-4, rtol=1e-4)


def test_a_draft_that_is_the_model_belongs_to_it_layer_by_layer() -> None:
    model = LLAMA.model()
    assert adakv.match_layers(model, model, tokens(100)) == (0, 1, 2, 3)
    found = adakv.match_layers(model, SMALL, tokens(100))
    assert list(found) == sorted(found) and len(found) == 4 and max(found) < 2


@pytest.mark.parametrize("width", [1, 5, 20])
def test_a_draft_that_is_the_model_finds_what_it_looks_at(width: int) -> None:
    model = LLAMA.model()
    plain = logits(model, None, width=width)
    how: dict[str, Any] = {"small": model, "full_layers": 0}
    whole = logits(model, SpecAttn(mass=1.0, **how), width=width)
    torch.testing.assert_close(whole, plain, atol=1e-4, rtol=1e-4)
    far = [float((logits(model, SpecAttn(mass=m, **how), width=width) - plain).abs().mean())
           for m in (0.99, 0.3)]  # fmt: skip
    assert far[0] <= far[1] and (far[1] > 0) == (width <= 16)


@pytest.mark.parametrize("renormalise", [True, False])
def test_a_small_model_that_is_the_model_changes_nothing(renormalise: bool) -> None:
    """With no entry of the rest: marginal ones get the weight that they had."""
    model = LLAMA.model()
    found = logits(model, SmallKV(small=model, renormalise=renormalise, **ALL))
    plain = logits(model, None)
    if renormalise:
        torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)
    else:  # the others' weights are 1 beside them, not what is left
        assert (found - plain).abs().max() > 0.01
    fewer = logits(model, SmallKV(small=model, share=0.1))
    assert (fewer - plain).abs().max() > 0.01


def test_heads_of_the_model_itself_are_its_own() -> None:
    model, ids = LLAMA.model(), tokens(150)
    cache = adakv.Cache(model, "full", read=SmallKV(small=model))
    with torch.no_grad(), adakv.attach(model):
        model(ids, past_key_values=cache)
        found = torch.cat(list(cache._reader.looking.head_map(4)))
        looks = looked_at(model, ids[:, :128])
    sums = torch.cat([look.sums for look in looks])
    for head, match in enumerate(found.tolist()):  # or one whose best entries are the same
        best = [set(sums[i].topk(32).indices.tolist()) for i in (head, match)]
        assert best[0] == best[1]


@pytest.mark.parametrize("read", [SpecAttn(small=SMALL, layers=(0, 0, 1, 1)), SmallKV(small=SMALL)])
def test_generate_runs_with_a_small_model_beside(read: Any) -> None:
    model, ids = LLAMA.model(), tokens(100)
    with adakv.attach(model):
        cache = adakv.Cache(model, "full", read=read)
        first = model.generate(ids, past_key_values=cache, **GREEDY)
        assert cache.stats()["seen"] == [111]
        cache.reset()
        assert torch.equal(first, model.generate(ids, past_key_values=cache, **GREEDY))


def test_assisted_decoding_says_what_it_does_without_a_read() -> None:
    """Guesses are taken back from the draft, too."""
    model, ids = LLAMA.model(), tokens(100)
    reads = (None, SpecAttn(small=SMALL, layers=(0, 0, 1, 1), mass=1.0, full_layers=0))
    found = []
    for read in reads:
        with adakv.attach(model):
            cache = adakv.Cache(model, "full", read=read)
            settings = {**GREEDY, "max_new_tokens": 40, "assistant_model": SMALL}
            found.append(model.generate(ids, past_key_values=cache, **settings))
            if read is not None:
                assert cache._reader.looking.seen == cache.seen[0]
    assert torch.equal(*found)


def test_branches_read_everything() -> None:
    model, ids = LLAMA.model(), tokens(100)
    cache = adakv.Cache(model, "full", read=SpecAttn(small=model, mass=0.2))
    plain = adakv.Cache(model, "full")
    with torch.no_grad(), adakv.attach(model):
        for x in (cache, plain):
            model(ids, past_key_values=x)
        twin = copy.deepcopy(cache)
        both = [model(ids[:, :1], past_key_values=x).logits for x in (twin, plain)]
    torch.testing.assert_close(*both, atol=1e-4, rtol=1e-4)


def test_nothing_stays_on_the_models() -> None:
    model, small = LLAMA.model(), LLAMA.model(num_hidden_layers=2)
    before = small.config._attn_implementation
    cache = adakv.Cache(model, "full", read=SmallKV(small=small))
    cache.reset()
    assert len(model.base_model._forward_pre_hooks) == 1
    del cache
    gc.collect()
    assert not model.base_model._forward_pre_hooks
    assert small.config._attn_implementation == before


@pytest.mark.parametrize(
    ("policy", "settings", "read", "reason"),
    [
        ("full", {}, SpecAttn(small=SMALL), "layers must be one of the draft's 2 layers for each"),
        ("full", {}, SpecAttn(small=SMALL, layers=(0, 1, 2, 2)), "layers must be one of"),
        ("ada_snapkv", {"budget": 60}, SmallKV(small=SMALL), "takes a cache with policy='full'"),
        ("full", {"decode_budget": 60}, SmallKV(small=SMALL), "and no decode_budget"),
        ("full", {"kv_dtype": "int8"}, SmallKV(small=SMALL), "takes plain pages, got"),
        ("full", {}, SmallKV(small="no/such"), "small can't be loaded"),
        ("full", {}, SmallKV(small=LLAMA.model(vocab_size=200)), "a model of the same tokenizer"),
    ],
)
def test_what_does_not_go_together_is_refused(
    policy: str, settings: dict[str, Any], read: Any, reason: str
) -> None:
    model = LLAMA.model().to(torch.bfloat16)
    with pytest.raises(ValueError, match=reason):
        adakv.Cache(model, policy, read=read, **settings)


@pytest.mark.skipif(not MIMO.is_available, reason="4.57 lacks it")
def test_values_must_be_as_wide_as_keys() -> None:
    model = MIMO.model()
    with pytest.raises(ValueError, match="SmallKV takes values as wide as keys, got heads of"):
        adakv.Cache(model, "full", read=SmallKV(small=LLAMA.model()))


def test_only_one_sequence_of_tokens_goes() -> None:
    model, ids = LLAMA.model(), tokens(60)
    cache = adakv.Cache(model, "full", read=SmallKV(small=model))
    mask = (torch.arange(60) >= 3).long()[None]
    embeddings = torch.zeros(1, 60, 64)
    with torch.no_grad(), adakv.attach(model):
        for given, reason in (
            ({"input_ids": ids.expand(2, -1)}, "takes one sequence, got 2"),
            ({"input_ids": ids, "attention_mask": mask}, "without padding"),
            ({"inputs_embeds": embeddings}, "give input_ids"),
        ):
            with pytest.raises(ValueError, match=reason):
                model(**given, past_key_values=cache)  # type: ignore[arg-type]
        model(ids, past_key_values=cache)  # nothing has changed
        assert cache.seen == [60]
