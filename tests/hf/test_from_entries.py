"""Caches of entries that were made elsewhere."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import adakv
from hf.families import FAMILIES, LLAMA
from hf.forwards import ids, logits

LAYERS, HEADS = 4, 2


def full_cache(model: PreTrainedModel, prompt: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    logits(model, prompt, cache)
    return cache


def chosen(full: DynamicCache, kept: Any) -> tuple[Any, Any, Any]:
    """Keys, values and positions of the entries ``kept`` ``[L][B][Hkv]`` lists."""
    keys, values = (
        [
            [[getattr(layer, name)[b, h, row] for h, row in enumerate(rows)] for b, rows in of]
            for layer, of in zip(full.layers, map(enumerate, kept), strict=True)
        ]
        for name in ("keys", "values")
    )
    return keys, values, [[[torch.tensor(x) for x in rows] for rows in of] for of in kept]


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8", "int4", "int2"])
def test_it_is_the_cache_that_kept_them(kv_dtype: str) -> None:
    model, prompt = LLAMA.model(), ids(120, batch=2)
    model = model if kv_dtype == "auto" else model.bfloat16()
    full = full_cache(model, prompt)
    with adakv.attach(model):
        cache = adakv.Cache(model, "ada_snapkv", budget=50, kv_dtype=kv_dtype)
        logits(model, prompt, cache)
        kept = [
            [[row.tolist() for row in rows] for rows in cache.kept(layer)]
            for layer in range(LAYERS)
        ]
        made = adakv.Cache.from_entries(
            model, *chosen(full, kept), seen=[120, 120], kv_dtype=kv_dtype
        )
        assert torch.equal(made.stats()["lengths"], cache.stats()["lengths"])
        assert made.seen == [120, 120]
        for layer in range(LAYERS):
            for ours, theirs in zip(made.kept(layer), cache.kept(layer), strict=True):
                assert all(map(torch.equal, ours, theirs))
        tokens = ids(40, batch=2)
        for i in range(40):
            step = tokens[:, i : i + 1]
            assert torch.equal(logits(model, step, made), logits(model, step, cache))


def test_tensors_of_all_heads_and_sequences_of_unequal_length() -> None:
    """Against transformers' own cache, with padding on the left."""
    model, prompt, mask = LLAMA.model(), ids(60, batch=2), torch.ones(2, 60, dtype=torch.int64)
    mask[0, :13] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    full = DynamicCache(config=model.config)
    logits(model, prompt, full, attention_mask=mask, position_ids=places)
    keys, values, positions = chosen(full, [[[[*range(60)]] * 2] * 2] * LAYERS)
    for of_layers in (keys, values, positions):
        for layer in of_layers:
            layer[0] = [x[13:] - (13 if x.dim() == 1 else 0) for x in layer[0]]
    with adakv.attach(model):
        cache = adakv.Cache.from_entries(model, keys, values, positions, [47, 60])
        for n in range(3):
            step, mask = ids(1, batch=2), torch.cat([mask, mask.new_ones(2, 1)], 1)
            settings = {"attention_mask": mask, "position_ids": torch.tensor([[47 + n], [60 + n]])}
            expected = logits(model, step, full, **settings)
            got = logits(model, step, cache, **settings)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        whole = (
            [x.keys[1:, :, :60] for x in full.layers],
            [x.values[1:, :, :60] for x in full.layers],
        )
        dense = adakv.Cache.from_entries(
            model, *whole, [torch.arange(60).expand(1, HEADS, 60)] * LAYERS, 60
        )
        cache.batch_select_indices(torch.tensor([1]))
        cache.crop(-3)
        step = ids(1)
        assert torch.equal(logits(model, step, dense), logits(model, step, cache))


def test_an_entry_with_a_bias_stands_for_several() -> None:
    """Entry 7 three times and entry 20 twice, as transformers' own cache may hold them, are one
    with a bias of log 3 and one of log 2."""
    model, prompt = LLAMA.model(), ids(40)
    full = full_cache(model, prompt)
    keys, values, positions = chosen(full, [[[[*range(40)]] * HEADS]] * LAYERS)
    bias = torch.zeros(40)
    bias[7], bias[20] = math.log(3), math.log(2)
    again = torch.tensor([*range(40), 7, 7, 20])
    several = DynamicCache(config=model.config)
    for index, layer in enumerate(full.layers):
        several.update(layer.keys[:, :, again], layer.values[:, :, again], index)
    with adakv.attach(model):
        cache = adakv.Cache.from_entries(
            model, keys, values, positions, 40, bias=[[[bias] * HEADS]] * LAYERS
        )
        for i in range(3):
            step, place = ids(1), {"position_ids": torch.tensor([[40 + i]])}
            expected, got = (logits(model, step, each, **place) for each in (several, cache))
            torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)
    kv = cache.pages
    assert kv is not None and kv.has_biases


def test_rows_may_be_empty() -> None:
    model = LLAMA.model()
    nothing = [torch.zeros(1, HEADS, 0, 16)] * LAYERS
    with adakv.attach(model):
        places = [torch.zeros(1, HEADS, 0, dtype=torch.int64)] * LAYERS
        cache = adakv.Cache.from_entries(model, nothing, nothing, places, 30)
        logits(model, ids(1), cache)
        assert cache.seen == [31] and cache.kept(0)[0][0].tolist() == [30]


def test_what_does_not_fit_is_refused_by_name() -> None:
    model = LLAMA.model()
    x = [torch.zeros(1, HEADS, 5, 16)] * LAYERS
    at = [torch.arange(5).expand(1, HEADS, 5)] * LAYERS
    infinite = x[0].clone()
    infinite[0, 1, 3] = torch.inf
    sliding = next(f for f in FAMILIES if f.prefix == "Gemma3").model()
    with adakv.attach(model):
        for given, message in (
            ((x[:3], x, at, 9), "keys must be given for 4 layers, got 3"),
            ((x, 7, at, 9), "values must be given for 4 layers, got int"),
            ((x, x, at, [9, 9]), r"keys\[0\] must be given for 2 sequences, got 1"),
            (([y[:, :1] for y in x], x, at, 9), r"keys\[0\]\[0\] must be given for 2 kv heads"),
            ((x, [y[..., :8] for y in x], at, 9), r"values\[0\]\[0\]\[0\] must be .* \[5, 16\]"),
            ((x, [y[:, :, :4] for y in x], at, 9), r"values\[0\]\[0\]\[0\] must be .* \[5, 16\]"),
            (([y.half() for y in x], x, at, 9), r"keys\[0\]\[0\]\[0\] must be torch.float32"),
            ((x, [*x[:3], infinite], at, 9), r"values\[3\]\[0\]\[1\] must be finite"),
            ((x, x, at, 4), r"positions\[0\]\[0\]\[0\] must ascend within 0 .. 3"),
            ((x, x, [y.flip(2) for y in at], 9), r"positions\[0\]\[0\]\[0\] must ascend"),
            ((x, x, [y.float() for y in at], 9), r"positions\[0\]\[0\]\[0\] must be integers"),
            ((x, x, at, 0), r"seen\[0\] must be at least 1"),
            ((x, x, at, "9"), r"seen\[0\] must be an integer"),
        ):
            with pytest.raises(ValueError, match=message):
                adakv.Cache.from_entries(model, *given)
        bias = [torch.zeros(1, HEADS, 5)] * LAYERS
        for wrong, message in (
            (at, r"bias\[0\]\[0\]\[0\] must be floats \[5\], got torch.int64"),
            ([y[..., :4] for y in bias], r"bias\[0\]\[0\]\[0\] must be floats \[5\]"),
            (
                [*bias[:2], bias[2] + 70000, bias[3]],
                r"bias\[2\]\[0\]\[0\] must be finite in float16",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                adakv.Cache.from_entries(model, x, x, at, 9, bias=wrong)
    with adakv.attach(sliding), pytest.raises(ValueError, match="without full attention"):
        adakv.Cache.from_entries(sliding, x, x, at, 9)
    model, x = model.bfloat16(), [y.bfloat16() for y in x]
    with adakv.attach(model), pytest.raises(ValueError, match="pages of int8 have no biases"):
        adakv.Cache.from_entries(model, x, x, at, 9, bias=bias, kv_dtype="int8")
