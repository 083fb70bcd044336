"""Every family of the table runs with the cache; a budget for everything changes nothing.

All of tests/hf was run with transformers 4.57.6, 5.23.0 and 5.24.0, if not every time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import adakv
from hf.families import FAMILIES, VOCAB, Family
from tolerance import assert_close

pytestmark = pytest.mark.model

PADDING = torch.tensor([9, 23, 0])


def skip_if_missing(family: Family) -> None:
    if not family.is_available:
        pytest.skip("doesn't use the attention interface in this version of transformers")


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_full_budget_gives_the_eager_models_tokens(family: Family) -> None:
    skip_if_missing(family)
    model, ids = family.model(), torch.randint(3, VOCAB, (3, 40))
    mask = (torch.arange(40) >= PADDING[:, None]).long()
    settings = {
        "attention_mask": mask,
        "max_new_tokens": 20,
        "do_sample": False,
        "eos_token_id": None,
    }
    expected = model.generate(ids, **settings)
    with adakv.attach(model):
        cache = adakv.Cache(model, "ada_snapkv", budget=40)
        actual = model.generate(ids, past_key_values=cache, **settings)
    assert torch.equal(actual, expected)
    if all(layer.is_sliding for layer in cache.layers):
        assert cache.stats()["seen"] == [59, 59, 59]  # nobody counts the padding
        return
    seen = 59 - PADDING.int()
    assert cache.stats()["seen"] == seen.tolist()
    for layer, lengths in zip(cache.layers, cache.stats()["lengths"], strict=True):
        held = seen.clamp(max=layer.sliding_window - 1) if layer.is_sliding else seen
        assert torch.equal(lengths, held[:, None].expand(-1, lengths.shape[1]))


@torch.no_grad()
def forced_logits(model: Any, cache: Any, tokens: Tensor) -> Tensor:
    """Logits of the tokens after the prompt of 40, given one by one and then five at once."""
    logits = []
    for begin, end in [(0, 40), *((i, i + 1) for i in range(40, 48)), (48, 53)]:
        logits.append(model(tokens[:, begin:end], past_key_values=cache).logits)
    return torch.cat(logits[1:], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_full_budget_is_as_exact_as_the_eager_model(family: Family, dtype: torch.dtype) -> None:
    skip_if_missing(family)
    model = family.model()
    tokens = torch.randint(3, VOCAB, (3, 53))
    model.to(dtype).double()
    expected = forced_logits(model, DynamicCache(config=model.config), tokens)
    model.to(dtype)
    baseline = forced_logits(model, DynamicCache(config=model.config), tokens)
    with adakv.attach(model):
        actual = forced_logits(model, adakv.Cache(model, budget=40), tokens)
    assert_close(actual, expected, baseline)


MIMO = next(family for family in FAMILIES if family.prefix == "MiMoV2Flash")


@torch.no_grad()
@pytest.mark.skipif(not MIMO.is_available, reason="4.57 lacks it")
def test_narrow_values_are_weighed_shrunk_forked_and_saved(tmp_path: Path) -> None:
    """Keys of 24 numbers and values of 16: the output projection is ``[E, Hq * 16]``."""
    model, tokens = MIMO.model(), torch.randint(3, VOCAB, (2, 60))
    with adakv.attach(model):
        cache = adakv.Cache(model, "critical_ada_snapkv", budget=50, keep_scores=True)
        model(tokens, past_key_values=cache)
        model(tokens[:, :1], past_key_values=cache)
        assert cache.stats()["full_bytes"] == 2 * 61 * 2 * 2 * (24 + 16) * 4
        cache.shrink(budget=40)
        cache.save(tmp_path / "mimo.adakv")
        loaded = adakv.Cache.load(model, tmp_path / "mimo.adakv")
        fork = loaded.fork(1)[0]
        expected = model(tokens[:, 1:2], past_key_values=cache).logits
        for other in (loaded, fork):
            assert torch.equal(model(tokens[:, 1:2], past_key_values=other).logits, expected)


@torch.no_grad()
@pytest.mark.skipif(not MIMO.is_available, reason="4.57 lacks it")
def test_narrow_values_are_quantised_but_for_int4() -> None:
    model, tokens = MIMO.model().bfloat16(), torch.randint(3, VOCAB, (2, 60))
    sizes = {}
    with adakv.attach(model):
        for kv_dtype in ("auto", "int8", "fp8"):
            cache = adakv.Cache(model, "ada_snapkv", budget=40, kv_dtype=kv_dtype, page_size=32)
            model(tokens, past_key_values=cache)
            model(tokens[:, :1], past_key_values=cache)
            sizes[kv_dtype] = cache.stats()["bytes"]
        assert sizes["fp8"] < sizes["int8"] < sizes["auto"]
        by_bytes = adakv.Cache(model, "ada_snapkv", budget_bytes=sizes["int8"] * 9 // 10)
        model(tokens, past_key_values=by_bytes)
        model(tokens[:, :1], past_key_values=by_bytes)
        assert by_bytes.stats()["kv_dtype"] in ("auto", "int8")
        int4 = adakv.Cache(model, "ada_snapkv", budget=40, kv_dtype="int4")
        with pytest.raises(ValueError, match="values that are as wide as keys, got 16 and 24"):
            model(tokens, past_key_values=int4)
    assert int4.stats()["seen"] == []
