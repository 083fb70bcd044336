"""Model-wide policies that hold a part of each layer's prompt until the last one is there."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import adakv
from adakv.entries import Reserve
from adakv.hf.pool_size import Shape, waiting_bytes
from adakv.policy import Budget, Defensive, ModelWide, Policy, TopScore, TwoStage, WindowAttention
from hf.families import LLAMA
from hf.test_hf import GREEDY, captured, prompts
from hf.test_model_wide import held

pytestmark = pytest.mark.model

PADDING = (0, 33, 100)  # of 150 tokens; the last prompt fits into the budget


def policy(reserve: float | None, selector: Any, floor: float = 0.0) -> Policy:
    return Policy(Defensive(), ModelWide(floor=floor, reserve=reserve), selector)


def read(chosen: Policy) -> adakv.Cache:
    model = LLAMA.model()
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, chosen, budget=50)
        model(**prompts(150, PADDING), past_key_values=cache)
    return cache


@pytest.mark.parametrize("selector", [TopScore(), TwoStage()], ids=repr)
@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_a_reserve_of_everything_is_exact(selector: Any, floor: float) -> None:
    exact, bounded = (read(policy(reserve, selector, floor)) for reserve in (None, 3.0))
    assert held(bounded) == held(exact)
    model, batch = LLAMA.model(), prompts(150, PADDING)
    with adakv.attach(model):
        caches = [adakv.Cache(model, policy(r, selector, floor), budget=50) for r in (None, 3.0)]
        texts = [model.generate(**batch, past_key_values=cache, **GREEDY) for cache in caches]
    assert torch.equal(*texts)


@pytest.mark.parametrize("selector", [TopScore(), TwoStage()], ids=repr)
def test_a_small_reserve_keeps_the_same_number(selector: Any) -> None:
    exact, bounded = read(policy(None, selector)), read(policy(1.2, selector))
    counts = [
        [sum(len(row) for layer in held(cache) for row in layer[b]) for b in range(3)]
        for cache in (exact, bounded)
    ]
    assert counts[0] == counts[1]
    model = LLAMA.model()
    with torch.no_grad(), captured(model) as calls:
        model(**prompts(150, PADDING), past_key_values=DynamicCache(config=model.config))
    kv = bounded.pages
    assert kv is not None
    assert kv.layer(0).seen.tolist() == [150, 117, 50]
    for layer, b, h in itertools.product(range(4), range(3), range(2)):
        view, kept = kv.layer(layer), bounded.kept(layer)[b][h]
        window = range(150 - PADDING[b])[-32:]
        assert kept.tolist() == sorted({*kept.tolist(), *window})
        for i, name in enumerate(("key", "value")):
            table = view.block_table[b, h, : -(-len(kept) // 16)].tolist()
            entries = view.pages[table, i].flatten(0, 1)[: len(kept)]
            assert torch.equal(entries, calls[layer][name][b, h, PADDING[b] + kept.long()])


def test_a_floor_keeps_no_more_than_was_held() -> None:
    exact, bounded = read(policy(None, TopScore(), 0.3)), read(policy(1.1, TopScore(), 0.3))
    total, most = (
        sum(len(row) for layer in held(cache) for rows in layer for row in rows)
        for cache in (bounded, exact)
    )
    assert 0.9 * most < total <= most


def test_what_is_not_held_is_dropped_at_once() -> None:
    model, sizes = LLAMA.model(), []
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, policy(1.5, TopScore()), budget=50)

        def count(*_: object) -> None:
            assert cache.reading is not None
            sizes.append([[len(x.keys) for x in parts] for parts in cache.reading.waiting])

        for layer in model.model.layers[:3]:
            layer.register_forward_hook(count)
        model(**prompts(150, PADDING), past_key_values=cache)
    held = [150, 150, 100]  # 2 kv heads: 1.5 * 50 entries each, or the whole prompt
    assert sizes == [[held] * 1, [held] * 2, [held] * 3]
    with pytest.raises(ValueError, match="reserve must be at least 1, got 0"):
        ModelWide(reserve=0.5)


def test_a_forward_that_was_stopped_is_noticed() -> None:
    model, batch = LLAMA.model(), prompts(150, (0, 0, 0))
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, Policy(WindowAttention(), ModelWide(reserve=2), TopScore()), 50)
        hook = model.model.layers[2].register_forward_pre_hook(_stop)
        with pytest.raises(KeyError):
            model(**batch, past_key_values=cache)
        hook.remove()
        with pytest.raises(adakv.Error, match="stopped midway"):
            model(**batch, past_key_values=cache)
        cache.reset()
        model(**batch, past_key_values=cache)
    assert cache.get_seq_length() == 150


def _stop(*_: object) -> None:
    raise KeyError("stop")


@pytest.mark.parametrize("name", ["ada_snapkv", "layer_defensive", "model_column_max"])
def test_what_waits_for_the_last_layer_is_known_before(name: str) -> None:
    """generate_batch leaves room for it."""
    model, held_bytes = LLAMA.model(), 0
    budget = Budget.given(name, 50, None)
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, name, budget=50)

        def count(*_: object) -> None:
            nonlocal held_bytes
            assert cache.reading is not None
            for part in (parts[0] for parts in cache.reading.waiting):
                dense = part if isinstance(part, Reserve) else part.inputs
                held_bytes += sum(x.nbytes for x in (dense.keys, dense.values, part.scores))

        model.model.layers[3].register_forward_pre_hook(count)
        model(**prompts(150), past_key_values=cache)
    known = waiting_bytes(budget, 150, Shape(4, 2, 16, torch.float32, torch.device("cpu")))
    joined = 4 * 2 * 150 * 4 if held_bytes else 0  # the scores once more, of 4 layers and 2 heads
    assert known == held_bytes * 4 // 3 + joined
    assert (known == 0) == (name == "ada_snapkv")
