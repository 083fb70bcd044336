"""What a layer hands to a policy besides queries, keys and values: weights and log-sum-exps."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

import adakv
from adakv.hf.families import output_projection
from adakv.hf.log_sum_exp import with_log_sum_exp
from adakv.policy import LayerInputs, Policy, PromptAttention, TopScore, Uniform, get
from hf.families import LLAMA
from hf.test_hf import prompts
from hf.test_model_wide import held

pytestmark = pytest.mark.model


class Int8Linear(torch.nn.Module):
    """Keeps its weight in a form of its own, as quantized models do."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.bias = torch.randn(linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, (self.weight * self.scale).to(x.dtype), self.bias)


class Float8Linear(torch.nn.Linear):
    """Its weight is floating point, but not all of it."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = torch.nn.Parameter((linear.weight * 100).to(torch.float8_e4m3fn))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) / 100)


def dense(quantized: Any) -> torch.nn.Linear:
    """A Linear that computes the same."""
    if isinstance(quantized, Int8Linear):
        weight, bias = quantized.weight * quantized.scale, quantized.bias
    else:
        weight, bias = quantized.weight.float() / 100, None
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return linear


@pytest.mark.parametrize("quantize", [Int8Linear, Float8Linear])
def test_quantized_output_projections_are_read_by_unit_vectors(quantize: Any) -> None:
    model, batch = LLAMA.model(), prompts(90, (0,))
    for layer in model.model.layers:
        layer.self_attn.o_proj = quantize(layer.self_attn.o_proj)
    same = copy.deepcopy(model)
    for layer in same.model.layers:
        layer.self_attn.o_proj = dense(layer.self_attn.o_proj)
    kept = []
    for each in (model, same):
        with torch.no_grad(), adakv.attach(each):
            cache = adakv.Cache(each, "critical_snapkv", budget=48)
            each(**batch, past_key_values=cache)
        kept.append(held(cache))
    assert kept[0] == kept[1]
    attention, like = model.model.layers[0].self_attn, torch.zeros(1)
    expected = same.model.layers[0].self_attn.o_proj.weight
    assert_close(output_projection(attention, 64, like), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 300])
def test_log_sum_exp_comes_with_the_same_outputs(
    length: int, dtype: torch.dtype, mode: Any, device: torch.device
) -> None:
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("no kernel that knows it")
    queries = torch.randn(2, 6, length, 64, dtype=dtype, device=device)
    keys, values = torch.randn(2, 2, 2, length, 64, dtype=dtype, device=device)

    def attend() -> Tensor:
        return scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)

    with mode():
        expected = attend()
        actual, lse = with_log_sum_exp(attend)
    assert torch.equal(actual, expected)
    z = queries.float() @ keys.float().repeat_interleave(3, 1).mT / 8
    above = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    assert lse is not None and lse.is_contiguous()
    assert_close(lse, z.masked_fill(above, -torch.inf).logsumexp(-1), rtol=1e-4, atol=1e-4)


def test_other_attention_has_no_log_sum_exp() -> None:
    result, lse = with_log_sum_exp(lambda: torch.ones(2).softmax(0))
    assert result.sum() == 1 and lse is None


@dataclass(frozen=True)
class Spy(PromptAttention):
    """Remembers what it was handed, which a scorer otherwise never does."""

    handed: list[LayerInputs] = field(default_factory=list)

    def score(self, inputs: LayerInputs) -> Tensor:
        self.handed.append(inputs)
        return super().score(inputs)

    def take(self, taken: Tensor | None, part: LayerInputs) -> Tensor:
        self.handed.append(part)
        return super().take(taken, part)


@pytest.mark.parametrize(
    ("attention", "padding", "chunk", "is_handed"),
    [
        ("sdpa", 0, None, True),
        ("sdpa", 7, None, False),
        ("sdpa", 0, 50, False),
        ("eager", 0, None, False),
    ],
)
def test_scorers_of_all_queries_are_handed_log_sum_exps(
    attention: str, padding: int, chunk: int | None, is_handed: bool
) -> None:
    model, batch = LLAMA.model(attn_implementation=attention), prompts(120, (padding, 0))
    policy = Policy(Spy(), Uniform(), TopScore())
    with torch.no_grad(), adakv.attach(model):
        caches = [
            adakv.Cache(model, p, budget=48, chunked_prefill=chunk is not None)
            for p in (policy, get("h2o"))
        ]
        for cache in caches:
            settings = {"prefill_chunk_size": chunk} if chunk else {}
            model.generate(**batch, past_key_values=cache, max_new_tokens=2, **settings)
    assert held(caches[0]) == held(caches[1])
    handed = policy.scorer.handed
    assert {inputs.lse is not None for inputs in handed} == {is_handed}
    for inputs in handed:
        if inputs.lse is not None:
            scores = PromptAttention().score(replace(inputs, lse=None))
            assert_close(PromptAttention().score(inputs), scores, rtol=1e-4, atol=1e-4)
