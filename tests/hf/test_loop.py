"""generate(custom_generate=adakv.cuda_graph_sample): transformers' own loop, step for step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import set_seed

import adakv
from hf.families import LLAMA, V4, VOCAB, Family

pytestmark = pytest.mark.model

LOOP = {"custom_generate": adakv.cuda_graph_sample}


def inputs() -> dict[str, Tensor]:
    """Three prompts, two of them with padding on the left."""
    ids = torch.randint(3, VOCAB, (3, 80))
    mask = (torch.arange(80) >= torch.tensor([0, 13, 40])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "eos_token_id": None},
        {"do_sample": False, "eos_token_id": list(range(3, 40))},
        {"do_sample": False, "repetition_penalty": 1.5},
        {"do_sample": True, "temperature": 1.3, "top_p": 0.9},
        {"do_sample": True, "return_dict_in_generate": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("chunked", [False] if V4 else [False, True])  # 4.57 needs real chunks
def test_equals_transformers_own_loop(options: dict[str, Any], chunked: bool) -> None:
    model, given, texts, held = LLAMA.model(), inputs(), [], []
    with adakv.attach(model):
        for loop in ({}, LOOP):
            set_seed(5)
            cache = adakv.Cache(model, budget=40, chunked_prefill=chunked)
            out = model.generate(
                **given, past_key_values=cache, max_new_tokens=20, **options, **loop
            )
            texts.append(out if isinstance(out, Tensor) else out.sequences)
            held.append((cache.stats()["seen"], cache.stats()["lengths"].tolist(), cache.kept(1)))
    assert torch.equal(*texts)
    assert str(held[0]) == str(held[1])


def test_a_second_turn_goes_on_where_the_first_ended() -> None:
    model, texts = LLAMA.model(), []
    ids, more = torch.randint(3, VOCAB, (1, 80)), torch.randint(3, VOCAB, (1, 7))
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 9}
    with adakv.attach(model):
        for loops in (({}, {}), (LOOP, LOOP), ({}, LOOP), (LOOP, {})):
            cache = adakv.Cache(model, budget=40)
            turn = ids
            for loop, after in zip(loops, (more, more[:, :0]), strict=True):
                mask = torch.ones_like(turn)  # a token may be the one that pads elsewhere
                given = {"attention_mask": mask, "past_key_values": cache}
                turn = torch.cat([model.generate(turn, **given, **options, **loop), after], 1)
            texts.append(turn)
    assert all(torch.equal(text, texts[0]) for text in texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"past_key_values": None},
            "(past_key_values|cache) must be an adakv.Cache, got DynamicCache",
        ),
        ({"num_beams": 2}, "num_beams must be 1, got 2"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores must be False"),
    ],
)
def test_what_it_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    model, ids = LLAMA.model(), torch.randint(3, VOCAB, (1, 60))
    with adakv.attach(model):
        given = {"past_key_values": adakv.Cache(model, budget=40), **options}
        with pytest.raises(ValueError, match=message):
            model.generate(ids, max_new_tokens=4, **given, **LOOP)


def test_sliding_windows_are_refused() -> None:
    model, ids = Family("Mistral", {"sliding_window": 12}).model(), torch.ones(1, 40).long()
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40)
        with pytest.raises(ValueError, match="without full attention"):
            model.generate(ids, past_key_values=cache, max_new_tokens=4, **LOOP)


def test_room_is_made_as_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = LLAMA.model(), inputs()
    settings = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 60}
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40)
        expected = model.generate(**given, past_key_values=cache, **settings, **LOOP)
        monkeypatch.setattr("adakv.hf.cuda_graph.FIRST_TOKENS", 7)
        small = adakv.Cache(model, budget=40, max_new_tokens=7)
        assert torch.equal(
            model.generate(**given, past_key_values=small, **settings, **LOOP), expected
        )
        endless = adakv.Cache(model, budget=40, max_new_tokens=7)
        settings = {**settings, "max_new_tokens": 2**31 - 81, "stop_strings": None}
        settings["eos_token_id"] = list(range(3, VOCAB))
        model.generate(**given, past_key_values=endless, **settings, **LOOP)
    assert str(small.kept(1)) == str(cache.kept(1))
    assert endless.pages.num_pages < 500


class Tight:
    """A cache in C++ that has memory for a few pages more at a time."""

    def __init__(self, cache: Any, num_pages: int) -> None:
        self.cache, self.num_pages, self.refused = cache, num_pages, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def reserve(self, num_pages: int, max_row_pages: int) -> None:
        if num_pages > self.num_pages + 10:
            self.refused += 1
            raise adakv.Error("no memory")
        self.cache.reserve(num_pages, max_row_pages)
        self.num_pages = max(self.num_pages, num_pages)


def test_a_cache_takes_what_it_needs_if_more_cannot_be_had() -> None:
    model, prompt = LLAMA.model(), torch.randint(3, VOCAB, (1, 60))
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, budget=40, max_new_tokens=1)
        model(prompt, past_key_values=cache)
        assert cache.pages is not None
        tight = Tight(cache.pages._cache, cache.pages.num_pages)
        cache.pages._cache = tight
        for _ in range(40):
            model(prompt[:, :1], past_key_values=cache)
    assert tight.refused
    assert cache.stats()["seen"] == [100]


@pytest.mark.parametrize("pin_prompt", [True, False])
@pytest.mark.parametrize("policy", ["ada_snapkv", "r_kv", "h2o", "layer_defensive"])
def test_texts_are_evicted_from_as_in_transformers_own_loop(policy: str, pin_prompt: bool) -> None:
    """In a second turn, too, before and behind loops of the other kind."""
    model, texts, held = LLAMA.model(), [], []
    ids, more = torch.randint(3, VOCAB, (2, 80)), torch.randint(3, VOCAB, (2, 7))
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 60}
    with adakv.attach(model):
        for loops in (({}, {}, {}), (LOOP, LOOP, LOOP), ({}, LOOP, {}), (LOOP, {}, LOOP)):
            cache = adakv.Cache(
                model, "ada_snapkv", 40, decode_policy=policy, decode_budget=36, every=8,
                pin_prompt=pin_prompt,
            )  # fmt: skip
            turn = ids
            for loop in loops:
                mask = torch.ones_like(turn)
                mask[1, :11] = 0
                given = {"attention_mask": mask, "past_key_values": cache}
                turn = torch.cat([model.generate(turn, **given, **options, **loop), more], 1)
            texts.append(turn)
            held.append([cache.seen, cache.stats()["lengths"].tolist(), str(cache.kept(1))])
            assert cache.stats()["lengths"].float().mean() <= 40 + 36 + 8
    assert all(torch.equal(text, texts[0]) for text in texts)
    assert all(x == held[0] for x in held)


def test_a_loop_over_an_evicted_text_takes_no_more_pages_than_it_holds() -> None:
    model, pages = LLAMA.model(), []
    ids = torch.randint(3, VOCAB, (2, 80))
    for length in (100, 400):
        with adakv.attach(model):
            cache = adakv.Cache(model, "ada_snapkv", 40, decode_budget=36, every=8)
            model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache,
                do_sample=False, eos_token_id=None, max_new_tokens=length, **LOOP,
            )  # fmt: skip
        pages.append(cache.pages.num_pages)
        assert cache.stats()["lengths"].float().mean() <= 40 + 36 + 8
    assert pages[0] == pages[1]
