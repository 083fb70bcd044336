"""What transformers asks of caches beside keys and values: its own tokens come out, where nothing
is evicted, and branches of one cache know nothing of each other."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import adakv
from adakv.formats import has_tails
from adakv.hf.attachment import CACHE
from hf.families import FAMILIES, HYBRIDS, LLAMA, Family
from hf.forwards import ids, logits


def generated(model: PreTrainedModel, prompt: Tensor, cache: Any = None, **settings: Any) -> Tensor:
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, **settings}
    out: Tensor = model.generate(prompt, **{CACHE: cache}, **settings)
    return out


@contextlib.contextmanager
def called(model: PreTrainedModel) -> Iterator[list[tuple[list[int], Any]]]:
    """Tokens and cache of each forward."""
    calls: list[tuple[list[int], Any]] = []

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append((kwargs["input_ids"].flatten().tolist(), kwargs[CACHE]))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    yield calls
    hook.remove()


BEAMS = [f for f in FAMILIES if f.prefix in ("Mistral", "Gemma3", "GptOss")] + HYBRIDS[:2]


@pytest.mark.parametrize("family", [f for f in BEAMS if f.is_available], ids=str)
def test_beams_and_forks_of_layers_that_are_transformers_own(family: Family) -> None:
    model, prompt = family.model(), ids(30, batch=2)
    settings = {"num_beams": 3, "max_new_tokens": 12}
    expected = generated(model, prompt, DynamicCache(config=model.config), **settings)
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=64)
        assert torch.equal(generated(model, prompt, cache, **settings), expected)
        first = prefilled(model, prompt, adakv.Cache(model, budget=64))
        other, tokens = copy.deepcopy(first), ids(20, batch=2)
        for i in range(20):
            both = [logits(model, tokens[:, i : i + 1], each) for each in (first, other)]
            assert torch.equal(*both)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("page_size", [8, 16])
def test_beam_search_gives_transformers_tokens(batch: int, page_size: int) -> None:
    model, prompt = LLAMA.model(), ids(40, batch=batch)
    settings = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 40}
    expected = generated(model, prompt, DynamicCache(config=model.config), **settings)
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=64, page_size=page_size)
        assert torch.equal(generated(model, prompt, cache, **settings), expected)


def test_beam_search_of_an_evicted_prompt_takes_the_pages_of_its_text() -> None:
    model, prompt = LLAMA.model(), ids(90)
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40)
        generated(model, prompt, cache, num_beams=3, max_new_tokens=60)
        one = adakv.Cache(model, budget=40)
        generated(model, prompt, one, max_new_tokens=60)
    assert cache.stats()["pages_used"] < 4 * one.stats()["pages_used"]


def prefilled(model: PreTrainedModel, prompt: Tensor, cache: Any) -> Any:
    with torch.no_grad():
        model(prompt, **{CACHE: cache}, use_cache=True)
    return cache


def test_several_texts_behind_one_prompt_that_was_read() -> None:
    model, prompt = LLAMA.model(), ids(50)
    both = []
    for ours in (False, True):
        with adakv.attach(model):
            made = adakv.Cache(model, budget=64) if ours else DynamicCache(config=model.config)
            cache = prefilled(model, prompt[:, :-1], made)
            cache.batch_repeat_interleave(3)
            torch.manual_seed(1)
            settings = {"do_sample": True, "num_return_sequences": 3, "top_k": 20}
            both.append(generated(model, prompt, cache, **settings))
    assert torch.equal(*both)
    assert len({tuple(row) for row in both[0].tolist()}) > 1


def contrastive(model: PreTrainedModel, prompt: Tensor, cache: Any, penalty: float) -> list[Any]:
    """Contrastive search (arXiv 2202.06417, equation 5) as transformers' hub has it: candidates are
    rows of the cache, and those that are not chosen are dropped from it."""
    batch, width, texts = len(prompt), 4, []
    settings: dict[str, Any] = {CACHE: cache, "use_cache": True, "output_hidden_states": True}
    with torch.no_grad():
        out = model(prompt, **settings)
        context = out.hidden_states[-1]  # [B, T, E]
        for _ in range(30):
            probabilities, tokens = out.logits[:, -1].softmax(-1).topk(width)
            cache.batch_repeat_interleave(width)
            out = model(tokens.reshape(-1, 1), **settings)
            hidden = out.hidden_states[-1].view(batch, width, -1)
            alike = torch.cosine_similarity(hidden[:, :, None], context[:, None], dim=-1)
            value = (1 - penalty) * probabilities - penalty * alike.amax(-1)
            best = value.argmax(1, keepdim=True)  # [B, 1]
            rows = best[:, 0] + width * torch.arange(batch)
            cache.batch_select_indices(rows)
            out.logits = out.logits[rows]
            context = torch.cat([context, hidden.flatten(0, 1)[rows][:, None]], 1)
            texts.append(tokens.gather(1, best)[:, 0].tolist())
    return texts


@pytest.mark.parametrize("batch", [1, 3])
def test_contrastive_search_gives_the_full_caches_tokens(batch: int) -> None:
    model, prompt = LLAMA.model(), ids(40, batch=batch)
    expected = contrastive(model, prompt, DynamicCache(config=model.config), 0.6)
    assert expected != contrastive(model, prompt, DynamicCache(config=model.config), 0.0)
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=96, page_size=8)
        assert contrastive(model, prompt, cache, 0.6) == expected
    assert cache.seen == [70] * batch


@pytest.mark.parametrize("draft", [False, True])
def test_assisted_decoding_gives_transformers_tokens(draft: bool) -> None:
    model, part = LLAMA.model(), ids(12)
    prompt = torch.cat([part, ids(20), part, part[:, :5]], 1)  # with something to look up
    settings: dict[str, Any] = {"max_new_tokens": 40, "prompt_lookup_num_tokens": 4}
    if draft:
        settings = {"max_new_tokens": 40, "assistant_model": LLAMA.model(num_hidden_layers=2)}
    expected = generated(model, prompt, DynamicCache(config=model.config), **settings)
    assert torch.equal(expected, generated(model, prompt, max_new_tokens=40))
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=128)
        assert torch.equal(generated(model, prompt, cache, **settings), expected)
        assert cache.seen == [prompt.shape[1] + 39]


@pytest.mark.parametrize("budget", [40, 200])
def test_a_draft_with_a_compressed_cache(budget: int, caplog: pytest.LogCaptureFixture) -> None:
    """The tokens are the large model's whatever the draft keeps; where that is all, the draft
    guesses, and is called, as with transformers' cache."""
    model, draft, prompt = LLAMA.model(), LLAMA.model(num_hidden_layers=2), ids(90)
    settings: dict[str, Any] = {"max_new_tokens": 40}
    full = DynamicCache(config=model.config)
    with called(draft) as forwards:
        expected = generated(model, prompt, full, assistant_model=draft, **settings)
    with adakv.attach(model), adakv.attach(draft):
        compressed = adakv.DraftModel(draft, budget=budget)
        for _ in range(2):  # each prompt has a cache of its own
            with called(draft) as ours:
                cache = adakv.Cache(model, budget=200)
                out = generated(model, prompt, cache, assistant_model=compressed, **settings)
            assert torch.equal(out, expected)
            caches = {id(cache): cache for _, cache in ours}
            assert len(caches) == 1
            (of_draft,) = caches.values()
            assert isinstance(of_draft, adakv.Cache)
            held = int(of_draft.stats()["lengths"].max())
            assert (held < 90 + 40) if budget == 40 else (held >= 90)
            if budget == 200:
                assert [x for x, _ in ours] == [x for x, _ in forwards]
    assert not [x for x in caplog.records if x.name.startswith("adakv")]


def test_a_draft_checks_what_it_is_given() -> None:
    with pytest.raises(ValueError, match="budget"):
        adakv.DraftModel(LLAMA.model(), budget=0)


def test_guesses_are_no_second_turn(caplog: pytest.LogCaptureFixture) -> None:
    model, prompt = LLAMA.model(), ids(60)
    with adakv.attach(model), torch.no_grad():
        cache = prefilled(model, prompt, adakv.Cache(model, budget=40))
        cache.crop(-1)
        logits(model, ids(4), cache)
        assert not caplog.messages
        logits(model, ids(4), prefilled(model, prompt, adakv.Cache(model, budget=40)))
    assert "second turn" in caplog.text


def test_assisted_decoding_of_an_evicted_prompt_takes_guesses_back() -> None:
    """The first guesses come with the prompt, and are of its window, which every head keeps."""
    model, part = LLAMA.model(), ids(12)
    prompt = torch.cat([part, ids(60), part, part[:, :5]], 1)
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40)
        generated(model, prompt, cache, max_new_tokens=40, prompt_lookup_num_tokens=4)
    assert cache.seen == [prompt.shape[1] + 39]
    assert cache.stats()["lengths"].float().mean() < 40 + 40


@pytest.mark.parametrize("budget", [40, 128])
@pytest.mark.parametrize("batch", [1, 3])
def test_random_histories_of_branches(budget: int, batch: int) -> None:
    """Forks, steps, dropped and repeated rows and tokens taken back, beside caches that did nothing
    but read what is left."""
    model = LLAMA.model()
    generator = torch.Generator().manual_seed(budget + batch)

    def random(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    with adakv.attach(model):
        prompts = ids(90, batch=batch)
        first = adakv.Cache(model, budget=budget, page_size=8, max_new_tokens=8)
        prefilled(model, prompts, first)
        branches = [(first, [(b, []) for b in range(batch)])]  # prompt, and tokens behind it
        for _ in range(40):
            place = random(len(branches))
            cache, texts = branches[place]
            choice = random(6)
            if choice < 2:
                new = torch.randint(
                    3, 97, (len(texts), 1 + random(12) * choice), generator=generator
                )
                logits(model, new, cache)
                texts = [
                    (b, text + row) for (b, text), row in zip(texts, new.tolist(), strict=True)
                ]
            elif choice == 2 and len(branches) < 4:
                branches.append((copy.deepcopy(cache), list(texts)))
            elif choice == 3:
                order = torch.tensor([random(len(texts)) for _ in range(1 + random(3))])
                cache.batch_select_indices(order)
                texts = [texts[b] for b in order.tolist()]
            elif choice == 4:
                count = random(1 + len(texts[0][1]))
                cache.crop(-count)
                texts = [(b, text[: len(text) - count]) for b, text in texts]
            elif choice == 5 and len(branches) > 1:
                del branches[place]
                continue
            branches[place] = cache, texts
        for cache, texts in branches:
            new = torch.randint(3, 97, (len(texts), 3), generator=generator)
            got = logits(model, new, cache)
            for i, (b, text) in enumerate(texts):
                other = prefilled(model, prompts[b : b + 1], adakv.Cache(model, budget=budget))
                for token in text:
                    logits(model, torch.tensor([[token]]), other)
                torch.testing.assert_close(
                    got[i : i + 1], logits(model, new[i : i + 1], other), rtol=1e-3, atol=1e-3
                )
                assert cache.seen[i] == other.seen[0] == 90 + len(text) + 3
        pages = branches[0][0].pages
        del branches, cache, other, first
        gc.collect()  # a cache and its layers know each other
        for b in range(pages.num_sequences):
            pages.remove(b)
        assert pages.num_free == pages.num_pages


@pytest.mark.parametrize("kv_dtype", ["int8", "int4", "int2"])
def test_forks_of_quantised_pages(kv_dtype: str) -> None:
    model, prompt = LLAMA.model().bfloat16(), ids(70)
    with adakv.attach(model):
        cache = prefilled(model, prompt, adakv.Cache(model, budget=50, kv_dtype=kv_dtype))
        branch = copy.copy(cache)
        steps = ids(40)
        expected = torch.cat([logits(model, steps[:, i : i + 1], cache) for i in range(40)])
        (second,) = branch.fork()
        for each in (branch, second):
            got = torch.cat([logits(model, steps[:, i : i + 1], each) for i in range(40)])
            assert torch.equal(got, expected)
        if has_tails(kv_dtype):
            with pytest.raises(ValueError, match=kv_dtype):
                second.crop(-1)
        else:
            second.crop(-3)


def test_forks_of_texts_that_are_evicted_from() -> None:
    model, prompt = LLAMA.model(), ids(90)
    settings = {"budget": 40, "decode_budget": 40, "every": 8, "pin_prompt": False}
    with adakv.attach(model):
        caches = [prefilled(model, prompt, adakv.Cache(model, "snapkv", **settings)) for _ in "ab"]
        steps = ids(60)
        for i in range(20):
            for cache in caches:
                logits(model, steps[:, i : i + 1], cache)
        alone, forked = caches
        branches = [forked, *forked.fork(2)]
        branches[1].batch_repeat_interleave(2)
        for i in range(20, 60):
            expected = logits(model, steps[:, i : i + 1], alone)
            for branch in branches:
                got = logits(model, steps[:, i : i + 1].expand(len(branch.seen), -1), branch)
                torch.testing.assert_close(got, expected.expand_as(got), rtol=1e-4, atol=1e-4)
        for branch in branches:
            got, wanted = branch.stats()["lengths"], alone.stats()["lengths"]
            assert torch.equal(got, wanted.expand_as(got))
        with pytest.raises(ValueError, match="decode_budget"):
            forked.crop(-1)


def test_what_can_not_be_taken_back_changes_nothing() -> None:
    model, prompt = LLAMA.model(), ids(90)
    with adakv.attach(model):
        caches, steps = (
            [prefilled(model, prompt, adakv.Cache(model, budget=40)) for _ in "ab"],
            ids(8),
        )
        for cache in caches:
            logits(model, steps[:, :5], cache)
        with pytest.raises(ValueError, match="came after its prompt, and of the prompt some were"):
            caches[0].crop(-75)
        with pytest.raises(ValueError, match="reset"):
            caches[0].crop(-95)
        for indices in ([3], [-1], []):
            with pytest.raises(ValueError, match="indices must name"):
                caches[0].batch_select_indices(torch.tensor(indices, dtype=torch.int64))
        with pytest.raises(ValueError, match="save"):
            pickle.dumps(caches[0])
        with pytest.raises(ValueError, match="count"):
            caches[0].fork(0)
        caches[0].crop(0)
        assert torch.equal(*(logits(model, steps[:, 5:], cache) for cache in caches))


def test_a_prompt_that_is_kept_whole_can_be_taken_back() -> None:
    model, prompt = LLAMA.model(), ids(60)
    with adakv.attach(model):
        cache = prefilled(model, prompt, adakv.Cache(model, budget=64, page_size=8))
        logits(model, ids(5), cache)
        cache.crop(-30)
        other = prefilled(model, prompt[:, :35], adakv.Cache(model, budget=64))
        tokens = ids(20)
        for i in range(20):
            both = [logits(model, tokens[:, i : i + 1], each) for each in (cache, other)]
            torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)
        cache.crop(40)
        assert cache.seen == [40]


def test_padding_is_taken_back_with_its_columns() -> None:
    model, prompt = LLAMA.model(), ids(40, batch=2)
    mask = torch.ones_like(prompt)
    mask[0, :10] = 0
    with adakv.attach(model):
        caches = [adakv.Cache(model, budget=64) for _ in "ab"]
        for cache in caches:
            logits(model, prompt, cache, attention_mask=mask)
        more = torch.ones(2, 46, dtype=torch.int64)
        more[:, :40] = mask
        more[1, 44:] = 0
        tokens = ids(7, batch=2)
        logits(model, tokens[:, :6], caches[0], attention_mask=more)
        assert caches[0].seen == [36, 44]
        caches[0].crop(-4)
        assert caches[0].seen == [32, 42]
        logits(model, tokens[:, :2], caches[1], attention_mask=more[:, :42])
        last = torch.cat([more[:, :42], torch.ones(2, 1, dtype=torch.int64)], 1)
        both = [logits(model, tokens[:, 6:], cache, attention_mask=last) for cache in caches]
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)


def test_a_prompt_in_chunks_is_not_forked_before_it_is_read() -> None:
    model = LLAMA.model()
    with adakv.attach(model):
        cache = prefilled(model, ids(30), adakv.Cache(model, budget=40, chunked_prefill=True))
        with pytest.raises(adakv.Error, match="still being read"):
            cache.fork()
        logits(model, ids(1), cache)
        assert cache.fork()[0].seen == [31]
        empty = copy.deepcopy(adakv.Cache(model, budget=40))
        assert logits(model, ids(30), empty).shape[1] == 30
