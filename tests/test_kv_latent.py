"""examples/kv_latent.py: the surgery is exact, and its result runs in adakv's cache."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import adakv
from hf.families import FAMILIES, LLAMA, V4, VOCAB
from tolerance import assert_close

pytestmark = [pytest.mark.model, pytest.mark.skipif(V4, reason="4.57 has no heads of two widths")]

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SOURCES = [family for family in FAMILIES if family.prefix in ("Llama", "Qwen2")]


@pytest.fixture
def surgery(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("kv_latent")


def source(family: Any = LLAMA, **settings: Any) -> Any:
    return family.model(hidden_size=128, **settings)  # 4 heads of 32


def test_frequencies_by_hand(surgery: Any) -> None:
    """RoPE's own exponents for 8 dimensions are 0, 1/4, 1/2 and 3/4."""
    assert surgery.exponents(8).tolist() == [2 / 8, 4 / 8, 6 / 8, 7 / 8]
    made = surgery.convert(source(), 4, 1)
    frequencies = made.model.rotary_emb.full_attention_inv_freq
    theta = made.config.rope_parameters["full_attention"]["rope_theta"]
    torch.testing.assert_close(frequencies, theta ** -torch.tensor([2 / 8, 4 / 8, 6 / 8, 7 / 8]))


@torch.no_grad()
@pytest.mark.parametrize("factors", [(1, 1), (2, 1), (1, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("family", SOURCES, ids=str)
def test_what_leaves_is_as_if_it_were_zero(
    surgery: Any, family: Any, factors: tuple[int, int]
) -> None:
    """With the frequencies of the dimensions that stay. Logits are divided by the root of fewer."""
    model, tokens = source(family), torch.randint(3, VOCAB, (2, 30))
    actual = surgery.convert(model, *factors, resample=False)(tokens).logits
    keys, values = factors
    for layer in model.model.layers:
        attention = layer.self_attn
        for projection, factor in ((attention.q_proj, keys), (attention.v_proj, values)):
            stays = torch.arange(projection.out_features) % 32 % factor == 0
            size = factor**0.5 if projection is attention.q_proj else 1
            projection.weight.mul_(stays[:, None] * size)
            if projection.bias is not None:
                projection.bias.mul_(stays * size)
    baseline = model(tokens).logits
    assert_close(actual, model.double()(tokens).logits, baseline)


@pytest.mark.parametrize("factors", [(2, 4), (4, 1)], ids=str)
def test_the_cache_gives_the_tokens_of_the_full_one(surgery: Any, factors: tuple[int, int]) -> None:
    made, ids = surgery.convert(source(), *factors), torch.randint(3, VOCAB, (2, 40))
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    expected = made.generate(ids, **settings)
    with adakv.attach(made):
        cache = adakv.Cache(made, "ada_snapkv", budget=40)
        assert torch.equal(made.generate(ids, past_key_values=cache, **settings), expected)
        small = adakv.Cache(made, "critical_ada_snapkv", budget=34)
        made.generate(ids, past_key_values=small, **settings)
    entry = sum(32 // factor for factor in factors) * 4
    assert cache.stats()["full_bytes"] == 2 * 59 * 4 * 2 * entry
    assert int(small.stats()["lengths"].sum()) < int(cache.stats()["lengths"].sum())


def test_the_command_writes_a_model_that_loads(
    surgery: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model, folder = source(), tmp_path / "narrow"
    model.save_pretrained(tmp_path / "wide")
    arguments = [tmp_path / "wide", folder, "--keys", 2, "--values", 4]
    monkeypatch.setattr(sys, "argv", ["kv_latent.py", *map(str, arguments)])
    surgery.main()
    assert "38% of the bytes" in capsys.readouterr().out
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(3, VOCAB, (1, 30))
    with torch.no_grad():
        expected = surgery.convert(model, 2, 4)(tokens).logits
        torch.testing.assert_close(loaded(tokens).logits, expected)


def test_what_it_can_not_convert_is_named(surgery: Any) -> None:
    qwen3 = next(family for family in FAMILIES if family.prefix == "Qwen3")
    with pytest.raises(ValueError, match="llama, mistral, qwen2, got qwen3"):
        surgery.convert(qwen3.model())
    with pytest.raises(ValueError, match=r"keys must divide the head dim .* got 8 for 32"):
        surgery.convert(source(), 8, 1)
    with pytest.raises(ValueError, match="full attention in all layers"):
        surgery.convert(source(FAMILIES[2]))  # Mistral with a sliding window
    with pytest.raises(ValueError, match="no biases but those of queries"):
        surgery.convert(source(mlp_bias=True))
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="RoPE without scaling, got 'linear'"):
        surgery.convert(source(rope_parameters=scaled))
