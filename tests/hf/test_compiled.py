"""Models that were given to torch.compile: our calls run between their graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import adakv
from hf.families import LLAMA, VOCAB

pytestmark = pytest.mark.model

EAGER = {"backend": "eager"}  # Dynamo's graphs, run as they are


@pytest.fixture(autouse=True)
def forgets_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: Any) -> Any:
    return torch.compile(model, **EAGER)


def compiled_in_place(model: Any) -> Any:
    model.compile(**EAGER)
    return model


def compiled_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, **EAGER)
    return model


def slow(way: Any) -> Any:
    return pytest.param(way, marks=pytest.mark.slow)


WAYS = pytest.mark.parametrize(
    "way",
    [compiled_in_place, slow(compiled), slow(compiled_forward)],
    ids=["in_place", "wrapped", "forward"],
)


def llama() -> Any:
    return LLAMA.model(num_hidden_layers=1, attn_implementation="sdpa")


@torch.no_grad()
def logits(model: Any, cache: adakv.Cache, tokens: Tensor) -> list[Tensor]:
    """Those of a prompt and of two steps, the first sequence of which is padded."""
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    return [
        model(tokens[:, i:j], attention_mask=mask[:, :j], past_key_values=cache).logits[:, -1]
        for i, j in ((0, 70), (70, 71), (71, 72))
    ]


@WAYS
def test_a_compiled_model_computes_what_it_computes_uncompiled(way: Callable[[Any], Any]) -> None:
    tokens, results, held = torch.randint(3, VOCAB, (2, 72)), [], []
    for model in (llama(), way(llama())):
        with adakv.attach(model):
            cache = adakv.Cache(model, budget=40)
            results.append(torch.stack(logits(model, cache, tokens)))
            held.append(str(cache.kept(0)))
    assert torch.equal(*results)
    assert held[0] == held[1]


@pytest.mark.slow
def test_a_compiled_model_repeats() -> None:
    prompt, held = torch.randint(3, VOCAB, (2, 70)), []
    with torch.no_grad():
        for model in (llama(), compiled_in_place(llama())):
            with adakv.attach(model):
                cache = adakv.Cache(model, "kvzip", budget=40)
                model(prompt, past_key_values=cache)
                cache.repeat(prompt)
                held.append(str(cache.kept(0)))
    assert held[0] == held[1]


@pytest.mark.slow
def test_many_prompts_run_through_a_compiled_model() -> None:
    prompts = [torch.randint(3, VOCAB, (n,)) for n in (60, 41)]
    settings = {"budget": 40, "max_new_tokens": 3}
    expected = adakv.generate_batch(llama(), prompts, **settings)
    assert adakv.generate_batch(compiled_in_place(llama()), prompts, **settings) == expected


def test_one_graph_of_all_is_refused_by_name() -> None:
    model, prompt = llama(), torch.randint(3, VOCAB, (1, 70))
    model.forward = torch.compile(model.forward, fullgraph=True, **EAGER)
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, budget=40)
        with pytest.raises(Exception, match="fullgraph must be False"):
            model(prompt, past_key_values=cache)
