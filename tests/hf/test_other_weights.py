"""Weights that other libraries adapt or quantize. Each test needs its library, and is left out
without it: `pip install peft torchao optimum-quanto bitsandbytes`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import adakv
from adakv.hf.attachment import CACHE
from adakv.hf.families import output_projection
from hf.families import LLAMA, VOCAB

pytestmark = [
    pytest.mark.model,
    pytest.mark.filterwarnings("ignore"),  # the libraries' own
]

PLAIN = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
Make = Callable[[Any], Any]


def library(name: str) -> Any:
    pytest.importorskip(name.partition(".")[0])
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name}: {error}")


def lora(model: Any) -> Any:
    peft = library("peft")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = peft.LoraConfig(target_modules=modules, init_lora_weights=False, r=4)
    return peft.get_peft_model(model, config).eval()


def torchao_int8(model: Any) -> Any:
    quantization = library("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def quanto_int8(model: Any) -> Any:
    quanto = library("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def bitsandbytes(model: Any, make: Callable[[Any, torch.nn.Linear], Any]) -> Any:
    """As transformers' BitsAndBytesConfig puts its modules in, for the CPU."""
    library_modules = library("bitsandbytes").nn
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and name.endswith("_proj"):
            quantized = make(library_modules, linear)
            quantized.load_state_dict(linear.state_dict())
            model.set_submodule(name, quantized.to("cpu"))
    return model


def bitsandbytes_8bit(model: Any) -> Any:
    return bitsandbytes(
        model,
        lambda nn, linear: nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
        ),
    )


def bitsandbytes_4bit(model: Any) -> Any:
    return bitsandbytes(
        model,
        lambda nn, linear: nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32
        ),
    )


@pytest.mark.parametrize(
    "make", [lora, torchao_int8, quanto_int8, bitsandbytes_8bit, bitsandbytes_4bit]
)
@torch.no_grad()
def test_adapted_and_quantized_models_write_what_they_wrote(make: Make) -> None:
    plain = LLAMA.model()
    before = plain.model.layers[0].self_attn.o_proj.weight.detach().clone()
    model, ids = make(plain), torch.randint(3, VOCAB, (1, 60))
    attention = plain.model.layers[0].self_attn
    weight = output_projection(attention, 64, torch.empty(0))
    x = torch.randn(5, 64)
    made = attention.o_proj(x)
    error = (x @ weight.mT - made).abs().max() / made.abs().max()
    assert error < 0.02  # of activations that bitsandbytes quantizes; else it is the rounding
    assert not torch.equal(weight, before)
    expected = model.generate(input_ids=ids, **PLAIN)
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=60)
        assert torch.equal(model.generate(input_ids=ids, **{CACHE: cache}, **PLAIN), expected)
        for policy in (adakv.policy.DEFAULT, "critical_ada_snapkv"):
            small = adakv.Cache(model, policy, budget=40, page_size=8)
            model.generate(input_ids=ids, **{CACHE: small}, **PLAIN)
            assert small.stats()["bytes"] < cache.stats()["bytes"]


@torch.no_grad()
def test_an_adapter_is_weighed_as_if_it_were_merged() -> None:
    model, ids = lora(LLAMA.model()), torch.randint(3, VOCAB, (1, 60))
    kept = []
    for network in (model, model.merge_and_unload()):
        with adakv.attach(network):
            cache = adakv.Cache(network, "critical_ada_snapkv", budget=40)
            network(input_ids=ids, **{CACHE: cache})
        kept.append([row for layer in range(4) for row in cache.kept(layer)[0]])
    assert all(map(torch.equal, *kept))


def test_adapters_that_give_entries_of_their_own_are_refused() -> None:
    peft = library("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(LLAMA.model(), config)
    with pytest.raises(ValueError, match=r"adapter 'default' is PrefixTuningConfig"):
        adakv.attach(model)
