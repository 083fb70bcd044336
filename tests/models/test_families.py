"""Every family of the table runs with the cache; a budget for everything changes nothing."""

from __future__ import annotations

import pytest
import torch

import adakv
from models.families import FAMILIES, VOCAB, Family

pytestmark = pytest.mark.model


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_full_budget_gives_the_eager_models_tokens(family: Family) -> None:
    if not family.is_available:
        pytest.skip("doesn't use the attention interface in this version of transformers")
    model = family.model()
    ids = torch.randint(3, VOCAB, (3, 40))
    mask = torch.ones_like(ids)
    mask[0, :9] = mask[1, :23] = 0
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
    slides = all(layer.is_sliding for layer in cache.layers)
    seen = torch.tensor([59, 59, 59] if slides else [50, 36, 59], dtype=torch.int32)
    assert cache.stats()["seen"] == seen.tolist()
    for layer, lengths in zip(cache.layers, cache.stats()["lengths"], strict=True):
        held = seen.clamp(max=layer.sliding_window - 1) if layer.is_sliding else seen
        assert torch.equal(lengths, held[:, None].expand(-1, lengths.shape[1]))
