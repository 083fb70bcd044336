"""Caches on other devices: what was moved goes on as if it hadn't been."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import adakv
from adakv.formats import has_tails
from adakv.hf.attachment import CACHE
from adakv.hf.branches import move
from adakv.moving import moved
from hf.families import FAMILIES, HYBRIDS, LLAMA, VOCAB, Family


def ids(length: int, batch: int = 1) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length))


def logits(model: PreTrainedModel, tokens: Tensor, cache: Any, **settings: Any) -> Tensor:
    with torch.no_grad():
        tokens = tokens.to(model.device)
        out: Tensor = model(tokens, **{CACHE: cache}, use_cache=True, **settings).logits
    return out


def assert_go_on_alike(model: PreTrainedModel, batch: int, *caches: Any, count: int = 40) -> None:
    tokens = ids(count, batch)
    for i in range(count):
        both = [logits(model, tokens[:, i : i + 1], cache) for cache in caches]
        assert torch.equal(*both)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8", "int4", "int2"])
def test_what_was_moved_goes_on_alike(kv_dtype: str, device: torch.device) -> None:
    """There and back, and to where it is: in all cases into pages of its own."""
    model, prompt = LLAMA.model().to(device), ids(90, batch=2)
    model = model if kv_dtype == "auto" else model.bfloat16()
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40, kv_dtype=kv_dtype)
        logits(model, prompt, cache)
        logits(model, ids(20, batch=2), cache)
        (other,) = cache.fork()
        assert other.pages.shares_pages(1)
        move(cache, torch.device("cpu"))
        assert cache.pages.device.type == "cpu"
        assert not cache.pages.shares_pages(0) and not other.pages.shares_pages(1)
        move(cache, device)
        assert torch.equal(cache.stats()["lengths"], other.stats()["lengths"])
        assert cache.move_to(device) is cache
        assert_go_on_alike(model, 2, cache, other)
        if not has_tails(kv_dtype):
            for each in (cache, other):
                each.crop(-7)
            assert_go_on_alike(model, 2, cache, other, count=3)


MOVING = [f for f in FAMILIES if f.prefix in ("Gemma3", "Mistral")] + HYBRIDS[:2]


@pytest.mark.parametrize("family", [f for f in MOVING if f.is_available], ids=str)
def test_windows_and_states_move_too(family: Family) -> None:
    model, prompt = family.model(), ids(40)
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40)
        logits(model, prompt, cache)
        (other,) = cache.fork()
        move(cache, torch.device("cpu"))
        assert_go_on_alike(model, 1, cache, other, count=20)


def test_padding_and_texts_that_are_evicted_from_move_too() -> None:
    model, prompt, mask = LLAMA.model(), ids(60, batch=2), torch.ones(2, 60, dtype=torch.int64)
    mask[0, :9] = 0
    settings = {"budget": 40, "decode_budget": 40, "every": 8}
    tokens = ids(60, batch=2)
    with adakv.attach(model):
        caches = [adakv.Cache(model, "snapkv", **settings) for _ in "ab"]
        for cache in caches:
            logits(model, prompt, cache, attention_mask=mask)
        for i in range(60):
            if i % 20 == 10:
                move(caches[0], torch.device("cpu"))
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            step = tokens[:, i : i + 1]
            both = [logits(model, step, cache, attention_mask=mask) for cache in caches]
            assert torch.equal(*both)


def test_where_it_is_nothing_happens() -> None:
    model = LLAMA.model()
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40)
        assert cache.move_to("cpu") is cache
        logits(model, ids(50), cache)
        pages = cache.pages
        assert cache.move_to(torch.device("cpu")) is cache and cache.pages is pages
        with pytest.raises(ValueError, match="device must be cpu or cuda, got 'nowhere'"):
            cache.move_to("nowhere")
        reading = adakv.Cache(model, budget=40, chunked_prefill=True)
        logits(model, ids(50), reading)
        with pytest.raises(adakv.Error, match="to: the prompt is still being read"):
            reading.move_to("cpu")


def test_a_pool_of_few_pages_moves_into_one_with_more_columns() -> None:
    """A table has no more columns than its pool has pages, and new pools have room for a text."""
    model = LLAMA.model()
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40)
        logits(model, ids(90), cache)
        small = moved(cache.pages, torch.device("cpu"), 1)
    large = moved(small, torch.device("cpu"), 4096)
    columns = [kv.layer(0).block_table.shape[2] for kv in (small, large)]
    assert columns[0] < columns[1]
    for layer in range(4):
        for rows in zip(small.positions(layer), large.positions(layer), strict=True):
            assert all(torch.equal(*pair) for pair in zip(*rows, strict=True))


def test_a_cache_moves_while_the_model_writes_with_another(device: torch.device) -> None:
    """In a thread of its own; on a GPU in a stream of its own, too."""
    model = LLAMA.model().to(device)
    tokens = ids(40)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def there_and_back(cache: Any) -> None:
        with torch.cuda.stream(stream):
            for place in 4 * [torch.device("cpu"), device]:
                move(cache, place)
            if stream is not None:
                stream.synchronize()

    with adakv.attach(model), ThreadPoolExecutor(1) as pool:
        moving, writing = (adakv.Cache(model, budget=40) for _ in "ab")
        for cache in (moving, writing):
            logits(model, ids(90), cache)
        waiting, alone = moving.fork()[0], writing.fork()[0]
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))
        moved_on = pool.submit(there_and_back, moving)
        beside = [logits(model, tokens[:, i : i + 1], writing) for i in range(40)]
        moved_on.result()
        for i, found in enumerate(beside):
            assert torch.equal(found, logits(model, tokens[:, i : i + 1], alone))
        assert_go_on_alike(model, 1, moving, waiting)
