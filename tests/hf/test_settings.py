"""Settings of caches and batches are checked where they are given, with the argument's name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import adakv
from adakv.cache import KVCache
from hf.families import LLAMA
from hf.test_batch import llama
from small_model import save_model

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_model(tmp_path_factory.mktemp("model"))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def generate(model: Any, **settings: Any) -> list[adakv.BatchResult]:
    given = {"prompts": [[5] * 80], "budget": 40, "max_new_tokens": 2, **settings}
    return adakv.generate_batch(model, given.pop("prompts"), **given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 48.0}, "budget must be an integer, got 48.0"),
        ({"budget": NAN}, "budget must be an integer, got nan"),
        ({"budget": "48"}, "budget must be an integer, got '48'"),
        ({"budget": True}, "budget must be an integer, got True"),
        ({"budget": 2**40}, "budget must be at most 2147483647"),
        ({"budget": torch.tensor([1, 2])}, "budget must be an integer"),
        ({"budget": None, "ratio": "0.5"}, "ratio must be a finite number, got '0.5'"),
        ({"budget": None, "ratio": True}, "ratio must be a finite number, got True"),
        ({"budget": None, "ratio": NAN}, "ratio must be a finite number, got nan"),
        ({"max_new_tokens": 3.0}, "max_new_tokens must be an integer, got 3.0"),
        ({"max_new_tokens": "3"}, "max_new_tokens must be an integer, got '3'"),
        ({"max_new_tokens": [NAN]}, r"max_new_tokens\[0\] must be an integer, got nan"),
        ({"max_new_tokens": True}, "max_new_tokens must be an integer, got True"),
        ({"prompts": "hello"}, r"prompts must be a list of prompts, got str; give \[prompt\]"),
        ({"prompts": None}, "prompts must be a list of prompts, got NoneType"),
        ({"prompts": [["5"]]}, r"prompts\[0\] must be \[T\] integers"),
        ({"prompts": [[10**30]]}, r"prompts\[0\] must be \[T\] integers"),
        ({"policy": 5}, "policy must be one of"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str, model: Any):
    with pytest.raises(ValueError, match=message):
        generate(model, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": "1"}, "temperature must be a finite number, got '1'"),
        ({"temperature": INF}, "temperature must be a finite number, got inf"),
        ({"temperature": 1.0, "top_k": 0.5}, "top_k must be an integer, got 0.5"),
        ({"temperature": 1.0, "top_p": NAN}, "top_p must be a finite number, got nan"),
        ({"seed": 0.5}, "seed must be an integer, got 0.5"),
        ({"seed": 2**70}, "seed must be at most"),
        ({"max_batch": 2.0}, "max_batch must be an integer, got 2.0"),
        ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
        ({"cache_bytes": 1e6}, "cache_bytes must be an integer, got 1000000.0"),
        ({"page_size": 0}, "page_size must be a power of two from 8 to 256, got 0"),
        ({"page_size": 12}, "page_size must be a power of two from 8 to 256, got 12"),
        ({"page_size": 16.0}, "page_size must be an integer, got 16.0"),
    ],
)
def test_wrong_options_are_refused_where_they_are_made(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        adakv.BatchOptions(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_token_id": "5"}, "eos_token_id must be an integer, got '5'"),
        ({"eos_token_id": 0.5}, "eos_token_id must be an integer, got 0.5"),
        ({"eos_token_id": -1}, "eos_token_id must be at least 0, got -1"),
        ({"stop_strings": [5]}, "stop_strings must be strings, got 5"),
    ],
)
def test_wrong_ends_are_named(settings: dict[str, Any], message: str, model: Any):
    with pytest.raises(ValueError, match=message):
        generate(model, options=adakv.BatchOptions(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 48.0}, "budget must be an integer, got 48.0"),
        ({"budget": 48, "max_new_tokens": 3.0}, "max_new_tokens must be an integer, got 3.0"),
        ({"budget": 48, "page_size": 0}, "page_size must be a power of two"),
        ({"budget": 48, "page_size": 16.0}, "page_size must be an integer, got 16.0"),
    ],
)
def test_wrong_settings_of_a_cache_are_named(settings: dict[str, Any], message: str, model: Any):
    with pytest.raises(ValueError, match=message):
        adakv.Cache(model, **settings)


def test_numbers_of_numpy_and_torch_are_numbers(model: Any):
    options = {"temperature": 1, "top_k": 3, "top_p": 1, "seed": 4, "max_batch": 2, "page_size": 16}
    same = {name: np.int64(value) for name, value in options.items()}
    usual = generate(model, options=adakv.BatchOptions(**options))
    numbers = {"budget": torch.tensor(40), "max_new_tokens": np.int32(2)}
    assert generate(model, **numbers, options=adakv.BatchOptions(**same)) == usual
    share = generate(model, budget=None, ratio=0.5)
    assert generate(model, budget=None, ratio=np.float32(0.5)) == share
    ends = adakv.BatchOptions(eos_token_id=np.int64(share[0].tokens[0]))
    assert len(generate(model, budget=None, ratio=0.5, options=ends)[0].tokens) == 1


def test_sizes_of_pages_are_numbers():
    sizes = {"num_layers": 1, "num_sequences": 1, "num_kv_heads": 2, "head_dim": 64}
    sizes |= {"num_pages": 8, "max_row_pages": 4, "page_size": 16}
    assert KVCache(**{name: np.int64(size) for name, size in sizes.items()}).num_pages == 8
    for name, size in sizes.items():
        with pytest.raises(ValueError, match=f"{name} must be an integer, got {float(size)}"):
            KVCache(**{**sizes, name: float(size)})


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
