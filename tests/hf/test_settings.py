"""Settings are checked where they are given, with the argument's name; integers may be numpy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import adakv
from hf.families import LLAMA
from hf.test_batch import caches_of_batches, llama

pytestmark = pytest.mark.model

NAN = float("nan")
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"budget": 48.0}, "budget must be an integer of 32 bits, got 48.0"),
    ({"budget": NAN}, "budget must be an integer of 32 bits, got nan"),
    ({"budget": "48"}, "budget must be an integer of 32 bits, got '48'"),
    ({"budget": True}, "budget must be an integer of 32 bits, got True"),
    ({"budget": 2**40}, "budget must be an integer of 32 bits, got 1099511627776"),
    ({"budget": None, "ratio": "0.5"}, "ratio must be a number, got '0.5'"),
    ({"budget": None, "ratio": NAN}, "ratio must be above 0 and at most 1, got nan"),
    ({"page_size": 0}, "page_size must be a power of two from 8 to 256, got 0"),
    ({"page_size": 24}, "page_size must be a power of two from 8 to 256, got 24"),
    ({"page_size": 16.0}, "page_size must be an integer of 32 bits, got 16.0"),
]
OF_A_CACHE: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 1.5}, "max_new_tokens must be an integer of 64 bits, got 1.5"),
    ({"max_new_tokens": "64"}, "max_new_tokens must be an integer of 64 bits, got '64'"),
    ({"chunked_prefill": 512}, "chunked_prefill must be True or False, got 512"),
]
OF_A_BATCH: list[tuple[dict[str, Any], str]] = [
    ({"prompts": "hello"}, r"prompts must be a list of prompts, got str; give \[prompt\]"),
    ({"prompts": {"input_ids": [[5, 6]]}}, "prompts must be a list of prompts, got dict"),
    ({"prompts": [["5", "6"]]}, r"prompts\[0\] must be \[T\] integers of 64 bits: "),
    ({"prompts": [[5, 6], None]}, r"prompts\[1\] must be \[T\] integers of 64 bits: "),
    ({"prompts": [[[5], [6, 7]]]}, r"prompts\[0\] must be \[T\] integers of 64 bits: "),
    ({"prompts": [5, 6, 7]}, r"prompts\[0\] must be \[T\] integers, got torch.int64 \[\]"),
    ({"max_new_tokens": "64"}, "max_new_tokens must be an integer of 64 bits, got '64'"),
    ({"max_new_tokens": [6.0]}, r"max_new_tokens\[0\] must be an integer of 64 bits, got 6.0"),
    ({"options": {"max_batch": 4}}, "options must be adakv.BatchOptions, got dict"),
]
OF_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
    ({"temperature": NAN}, "temperature must be at least 0, got nan"),
    ({"temperature": float("inf")}, "temperature must be at least 0, got inf"),
    ({"top_k": 1.5, "temperature": 1.0}, "top_k must be an integer of 32 bits, got 1.5"),
    ({"seed": 0.5}, "seed must be an integer of 64 bits, got 0.5"),
    ({"cache_bytes": 1e9}, "cache_bytes must be an integer of 64 bits, got 1000000000.0"),
    ({"max_batch": 2.0}, "max_batch must be an integer of 32 bits, got 2.0"),
    ({"cuda_graph": "no"}, "cuda_graph must be True or False, got 'no'"),
    ({"eos_token_id": "</s>"}, "eos_token_id must be an integer of 32 bits, got '</s>'"),
    ({"eos_token_id": [2, "x"]}, "eos_token_id must be an integer of 32 bits, got 'x'"),
    ({"stop_strings": [5]}, "stop_strings must be strings, got 5"),
]


@pytest.mark.parametrize(("wrong", "message"), [*WRONG, *OF_A_CACHE], ids=str)
def test_settings_of_a_cache(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adakv.Cache(LLAMA.model(), **{"budget": 40, **wrong})


@pytest.mark.parametrize(("wrong", "message"), [*WRONG, *OF_A_BATCH], ids=str)
def test_settings_of_a_batch(wrong: dict[str, Any], message: str) -> None:
    model, given = llama(), {"prompts": [[5, 6]], "budget": 40, **wrong}
    made = caches_of_batches(model)
    with pytest.raises(ValueError, match=message):
        if "page_size" in given:
            given["options"] = adakv.BatchOptions(page_size=given.pop("page_size"))
        adakv.generate_stream(model, **given)
    assert not made


@pytest.mark.parametrize(("wrong", "message"), OF_OPTIONS, ids=str)
def test_settings_of_options(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adakv.generate_stream(llama(), [[5, 6]], budget=40, options=adakv.BatchOptions(**wrong))


def test_numbers_of_any_kind_are_taken() -> None:
    model, prompt = llama(), torch.randint(3, 90, (50,))
    plain = adakv.BatchOptions(temperature=1.0, top_k=20, seed=3, eos_token_id=[95, 96])
    others = adakv.BatchOptions(
        temperature=1,
        top_k=np.int64(20),
        top_p=1,
        seed=np.int32(3),
        eos_token_id=torch.tensor([95, 96]),
        max_batch=np.int64(4),
        page_size=np.int64(16),
    )
    expected = adakv.generate_batch(
        model, [prompt.tolist()], budget=40, max_new_tokens=6, options=plain
    )
    for count in (np.int64(6), torch.tensor(6), np.array([6]), torch.tensor([6]), [np.int32(6)]):
        for ids in (prompt.numpy(), prompt.int(), prompt[None]):
            prompts = ids if ids.ndim == 2 else [ids]
            actual = adakv.generate_batch(
                model, prompts, budget=np.int64(40), max_new_tokens=count, options=others
            )
            assert actual == expected
    cache = adakv.Cache(
        model, ratio=np.float32(1), max_new_tokens=np.int64(8), page_size=np.int32(8)
    )
    with torch.no_grad(), adakv.attach(model):
        model(prompt[None], past_key_values=cache)
    assert cache.pages is not None and cache.pages.page_size == 8


def test_one_eos_token_may_be_numpys() -> None:
    model, prompt = llama(), torch.randint(3, 90, (50,))
    first = adakv.generate_batch(model, [prompt], budget=40, max_new_tokens=6)[0].tokens[0]
    for eos in (first, np.int64(first), torch.tensor(first)):
        options = adakv.BatchOptions(eos_token_id=eos)
        (result,) = adakv.generate_batch(
            model, [prompt], budget=40, max_new_tokens=6, options=options
        )
        assert (result.tokens, result.end) == ([first], "eos")


def test_a_repetition_is_a_tensor() -> None:
    model, ids = LLAMA.model(), torch.randint(3, 90, (1, 40))
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, "kvzip", ratio=0.5)
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match=r"input_ids must be a tensor \[B, R\], got list"):
            cache.repeat(ids.tolist())
        cache.repeat(ids)
