"""Every family of the table runs with the cache; a budget for everything changes nothing.

All of tests/hf was run with transformers 4.57.6, 5.23.0 and 5.24.0, if not every time.
"""

from __future__ import annotations

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
