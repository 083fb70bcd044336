"""What the transformers adapter refuses: a named error each, and nothing has changed."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

import adakv
from hf.families import FAMILIES, LLAMA, V4, VOCAB
from hf.forwards import ids

pytestmark = pytest.mark.model


@torch.no_grad()
def logits(model: Any, tokens: Tensor, cache: Any, **options: Any) -> Tensor:
    return model(tokens, past_key_values=cache, **options).logits


SLIDING = FAMILIES[8]


@pytest.mark.parametrize("family", [LLAMA, SLIDING], ids=str)
def test_a_text_longer_than_the_pages_has_the_cache_grow(family: Any) -> None:
    model, prompt, tokens = family.model(), ids(60, 2), ids(17, 2)
    with adakv.attach(model):
        small = adakv.Cache(model, budget=40, max_new_tokens=32)
        large = adakv.Cache(model, budget=40, max_new_tokens=100)
        for cache in (small, large):
            logits(model, prompt, cache)
            logits(model, tokens[:, :16], cache)
        for part in (tokens, *tokens[:, :16].split(1, 1), tokens[:, :1].expand(-1, 90)):
            assert torch.equal(logits(model, part, small), logits(model, part, large))
    seen = 60 + 16 + 17 + 16 + 90
    assert small.stats()["seen"] == large.stats()["seen"] == [seen, seen]


def test_room_for_tokens_that_never_come_costs_nothing() -> None:
    model = LLAMA.model()
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40, max_new_tokens=10**7)
        logits(model, ids(60), cache)
    assert cache.pages is not None and cache.pages.num_pages < 10**5


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"budget": 35}, "budget must be at least 36.* got 35"),
        ({"policy": "streaming", "budget": 4}, "budget must be at least"),
        ({"budget": 64, "ratio": 0.5}, "either budget or ratio"),
        ({}, "either budget or ratio"),
        ({"ratio": 0.0}, "ratio must be above 0 and at most 1, got 0.0"),
        ({"ratio": 1.5}, "ratio must be above 0 and at most 1, got 1.5"),
        ({"policy": "snapkvv", "budget": 64}, "policy must be .*ada_snapkv.* got 'snapkvv'"),
        ({"budget": 64, "max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adakv.Cache(LLAMA.model(), **settings)


def test_cache_needs_an_attached_model_in_eval_mode_without_gradients() -> None:
    model, prompt = LLAMA.model(), ids(50)
    cache = adakv.Cache(model, budget=40)
    with pytest.raises(adakv.Error, match="not attached"):
        logits(model, prompt, cache)
    with adakv.attach(model):
        with pytest.raises(ValueError, match=r"no_grad"):
            model(prompt, past_key_values=cache)
        with pytest.raises(ValueError, match=r"eval"):
            logits(model.train(), prompt, cache)
        model.eval()
        assert cache.get_seq_length() == 0
        logits(model, prompt, cache)
    with pytest.raises(adakv.Error, match="not attached"):
        logits(model, prompt[:, :1], cache)
    assert cache.stats()["seen"] == [50]


def test_attachments_are_counted() -> None:
    model = LLAMA.model()
    own = model.config._attn_implementation
    outer = adakv.attach(model)
    with adakv.attach(model):
        pass
    assert model.config._attn_implementation != own
    adakv.attach(model)
    outer.detach()
    outer.detach()  # a second call does nothing
    assert model.config._attn_implementation != own
    adakv.detach(model)
    assert model.config._attn_implementation == own
    with pytest.raises(ValueError, match="model: it is not attached"):
        adakv.detach(model)


def test_a_copy_of_an_attached_model_is_attached() -> None:
    model, prompt = LLAMA.model(), ids(50)
    own = model.config._attn_implementation
    with adakv.attach(model):
        other = copy.deepcopy(model)
        expected = logits(model, prompt, adakv.Cache(model, budget=40))
    with adakv.attach(other):
        assert torch.equal(logits(other, prompt, adakv.Cache(other, budget=40)), expected)
    assert model.config._attn_implementation == other.config._attn_implementation == own


@pytest.mark.parametrize("where", ["config", "argument"])
def test_a_model_that_uses_no_cache_is_refused(where: str) -> None:
    model, prompt = LLAMA.model(), ids(50)
    with adakv.attach(model), pytest.raises(ValueError, match=r"use_cache"):
        if where == "config":
            model.config.use_cache = False
        cache = adakv.Cache(model, budget=40)
        model.generate(prompt, past_key_values=cache, use_cache=False, max_new_tokens=4)


def test_training_mode_is_refused_before_any_work() -> None:
    model = LLAMA.model().train()
    with pytest.raises(ValueError, match="eval mode"):
        adakv.attach(model)
    with pytest.raises(ValueError, match="eval mode"):
        adakv.Cache(model, budget=40)


def test_caches_are_not_pickled() -> None:
    cache = adakv.Cache(LLAMA.model(), budget=40)
    with pytest.raises(ValueError, match="can't be pickled"):
        pickle.dumps(cache)


@pytest.mark.parametrize("is_attached", [True, False])
def test_cache_of_another_model_is_refused(is_attached: bool) -> None:
    model, other, prompt = LLAMA.model(), LLAMA.model(attn_implementation="sdpa"), ids(50)
    with adakv.attach(model):
        cache, expected = adakv.Cache(model, budget=40), adakv.Cache(model, budget=40)
        for tokens in (prompt, prompt[:, :1]):
            with pytest.raises((ValueError, adakv.Error), match="another model"):
                if is_attached:
                    with adakv.attach(other):
                        logits(other, tokens, cache)
                else:
                    logits(other, tokens, cache)
            assert torch.equal(logits(model, tokens, cache), logits(model, tokens, expected))


def test_shapes_may_not_change_after_the_prompt() -> None:
    model = LLAMA.model()
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40)
        logits(model, ids(50, 2), cache)
        with pytest.raises(ValueError, match="must stay what they were"):
            logits(model, ids(1, 3), cache)
        with pytest.raises(ValueError, match="must stay what they were"):
            logits(model.double(), ids(1, 2), cache)
        logits(model.float(), ids(1, 2), cache)
    assert cache.stats()["seen"] == [51, 51]


def test_tokens_seen_may_not_be_hidden_later() -> None:
    model, mask = LLAMA.model(), torch.ones(2, 81, dtype=torch.long)
    mask[1, :3] = 0
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40)
        with pytest.raises(ValueError, match="prompt 1 is nothing but padding"):
            nothing = torch.tensor([[1], [0]]).expand(2, 80)
            logits(model, ids(80, 2), cache, attention_mask=nothing)
        logits(model, ids(80, 2), cache)
        with pytest.raises(ValueError, match="sequence 1 has 80, and 77 are shown"):
            logits(model, ids(1, 2), cache, attention_mask=mask)
        logits(model, ids(1, 2), cache)
    assert cache.stats()["seen"] == [81, 81]


def test_second_turn_right_after_the_prompt_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = LLAMA.model()
    with adakv.attach(model), caplog.at_level(logging.WARNING, "adakv"):
        cache = adakv.Cache(model, budget=40)
        logits(model, ids(50), cache)
        logits(model, ids(1), cache)
        logits(model, ids(20), cache)
        assert not caplog.records
        cache.reset()
        logits(model, ids(50), cache)
        logits(model, ids(20), cache)
        assert "chunked_prefill=True" in caplog.text


def test_forward_that_stopped_midway_needs_a_reset() -> None:
    model, prompt = LLAMA.model(), ids(60)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40)
        expected = logits(model, prompt, cache)
        hook = model.model.layers[2].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            logits(model, prompt[:, :1], cache)
        hook.remove()
        with pytest.raises(adakv.Error, match="stopped midway"):
            logits(model, prompt[:, :1], cache)
        cache.reset()
        assert torch.equal(logits(model, prompt, cache), expected)


TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
}
_LATENT = {"num_attention_heads": 2, "n_routed_experts": 8, "q_lora_rank": 8}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
_GLOBAL = {"num_layers": 1, "attention_types": [[["global"], 1]]}
_TYPES = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_WIDE = {"head_dim": 16, "global_head_dim": 512, "layer_types": _TYPES, "num_kv_shared_layers": 0}
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
REFUSED = [
    ("T5", {"vocab_size": VOCAB, "d_model": 32, "num_layers": 1}, "encoder-decoder"),
    ("DeepseekV3", {**TINY, **_LATENT}, "MLA"),
    ("GPTNeo", {"vocab_size": VOCAB, "hidden_size": 32, **_GLOBAL}, "AttentionInterface"),
    ("JetMoe", {**TINY, "num_local_experts": 4, "kv_channels": 8}, "repeats its keys"),
    ("Doge", TINY, "hides keys by a mask that it makes"),
    ("DiffLlama", TINY, "halves the heads of its values"),
    ("Llama", {**TINY, "head_dim": 264}, "heads of 264 numbers; .* multiples of 8 up to 256"),
    ("Llama", {**TINY, "head_dim": 12}, "heads of 12 numbers; .* multiples of 8 up to 256"),
]
if V4:
    REFUSED += [
        ("Qwen3Next", {**TINY, "num_experts": 4}, "linear_attention"),
        ("Bamba", {**TINY, **_MAMBA}, "recurrent"),
    ]
else:
    REFUSED += [
        ("Mamba", TINY, "has no attention, and so no cache"),
        ("Gemma4Text", {**TINY, **_WIDE, **_PER_LAYER}, "full attention with heads of 512 numbers"),
        (
            "Gemma4Text",
            {**TINY, **_WIDE, **_PER_LAYER, "global_head_dim": 16, "num_kv_shared_layers": 2},
            "shares keys and values between layers",
        ),
        ("MiMoV2Flash", {**TINY, "head_dim": 16, "v_head_dim": 12}, "heads of 12 numbers"),
    ]


@pytest.mark.parametrize(
    "name, settings, message", REFUSED, ids=lambda x: x if isinstance(x, str) else ""
)
def test_models_without_rows_are_refused(name: str, settings: Any, message: str) -> None:
    config = getattr(transformers, f"{name}Config")(**settings)
    auto = transformers.AutoModelForSeq2SeqLM if name == "T5" else transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        adakv.attach(model)
    assert model.config._attn_implementation == before


def test_policy_that_needs_the_output_projection_says_so() -> None:
    model = LLAMA.model()
    for layer in model.model.layers:
        project = layer.self_attn.o_proj
        del layer.self_attn.o_proj
        layer.self_attn.__dict__["o_proj"] = project.forward  # no module
    with adakv.attach(model):
        logits(model, ids(60), adakv.Cache(model, "ada_snapkv", budget=40))
        with pytest.raises(ValueError, match=r"weight \[E, Hq \* D\] of the output projection"):
            adakv.Cache(model, "critical_snapkv", budget=40)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),  # c_proj, transposed
        ("GPTNeoX", {"num_attention_heads": 4}),  # dense
        ("OPT", {"ffn_dim": 32, "num_attention_heads": 4}),  # out_proj
        pytest.param(
            *("ModernBertDecoder", {"num_attention_heads": 4}),  # Wo
            marks=pytest.mark.skipif(V4, reason="has sliding layers only in 4.57's tiny shape"),
        ),
    ],
)
def test_output_projections_are_found_under_other_names(name: str, settings: Any) -> None:
    settings = {**TINY, "num_hidden_layers": 2, "pad_token_id": 0, **settings}
    config = getattr(transformers, f"{name}Config")(**settings)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with adakv.attach(model):
        cache = adakv.Cache(model, "critical_snapkv", budget=40)
        logits(model, ids(60), cache)
    assert cache.stats()["bytes"] > 0


@pytest.mark.parametrize("name", ["position_bias", "indices", "block_indices", "sinks"])
def test_arguments_of_attention_that_a_step_would_ignore_are_refused(name: str) -> None:
    model = LLAMA.model()

    def give(module: Any, args: Any, options: Any) -> Any:
        return args, {**options, name: torch.zeros(1)}

    model.model.layers[1].self_attn.register_forward_pre_hook(give, with_kwargs=True)
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40)
        with pytest.raises(ValueError, match=f"attention takes {name}"):
            logits(model, ids(60), cache)


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(ValueError, match="transformers model, got Linear"):
        adakv.Cache(torch.nn.Linear(2, 2), budget=40)


def test_other_caches_know_nothing_of_it() -> None:
    model, prompt = LLAMA.model(), ids(30)
    with adakv.attach(model):
        cache = DynamicCache(config=model.config)
        logits(model, prompt, cache)
        assert not any("adakv_layer" in layer.keys.__dict__ for layer in cache.layers)


@pytest.mark.parametrize("where", ["argument", "config"])
def test_steps_have_no_attention_weights_and_say_so(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, prompt = LLAMA.model(), ids(50)
    asks = {"output_attentions": True} if where == "argument" else {}
    model.config.output_attentions = where == "config"
    with torch.no_grad(), adakv.attach(model), caplog.at_level(logging.WARNING, "adakv"):
        cache = adakv.Cache(model, budget=40)
        assert len(model(prompt, past_key_values=cache, **asks).attentions) == 4
        assert not caplog.records
        for _ in range(2):
            assert not any(model(prompt[:, :1], past_key_values=cache, **asks).attentions)
    assert [r.getMessage() for r in caplog.records if "output_attentions" in r.getMessage()] == [
        "output_attentions: only prompts have attention weights; tokens after them attend to what "
        "each head kept, and give none"
    ]
