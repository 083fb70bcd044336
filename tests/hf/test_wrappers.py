"""Models in wrappers: taken out of them, or refused with what to give instead."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import adakv
from adakv.hf.attachment import is_attached
from adakv.hf.wrappers import unwrapped
from hf.families import LLAMA, VOCAB

pytestmark = pytest.mark.model


class Wrapper(torch.nn.Module):
    """As DistributedDataParallel holds its model."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Peft(torch.nn.Module):
    """As PEFT's models hold theirs."""

    def __init__(self, model: torch.nn.Module, **config: Any) -> None:
        super().__init__()
        self.inner = model
        self.peft_config = {"default": SimpleNamespace(**config)}

    def get_base_model(self) -> torch.nn.Module:
        return self.inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def lora(model: torch.nn.Module) -> torch.nn.Module:
    return Peft(model, is_prompt_learning=False)


def test_wrappers_may_be_nested() -> None:
    model = LLAMA.model(num_hidden_layers=1)
    assert unwrapped(Wrapper(torch.compile(lora(model), backend="eager"))) is model


@pytest.mark.parametrize("wrap", [Wrapper, lora], ids=lambda wrap: wrap.__name__)
def test_wrapped_models_are_unwrapped(wrap: Any) -> None:
    model, prompt = LLAMA.model(num_hidden_layers=1), torch.randint(3, VOCAB, (1, 60))
    wrapped = wrap(model)
    with torch.no_grad(), adakv.attach(wrapped):
        assert is_attached(model)
        caches = [adakv.Cache(m, budget=40) for m in (model, wrapped)]
        results = [
            m(prompt, past_key_values=cache).logits
            for m, cache in zip((model, wrapped), caches, strict=True)
        ]
    assert not is_attached(model)
    assert torch.equal(*results)
    settings = {"budget": 40, "max_new_tokens": 3}
    expected = adakv.generate_batch(model, [prompt[0]], **settings)
    assert adakv.generate_batch(wrapped, [prompt[0]], **settings) == expected


REFUSED = [
    (torch.nn.DataParallel, r"DataParallel copies it in every forward; give its \.module"),
    (lambda model: Peft(model, is_prompt_learning=True), "adapter 'default' is .* such as LoRA"),
    (lambda model: torch.nn.Linear(2, 2), "must be a transformers model, got Linear"),
    (lambda model: "meta-llama/Llama-3.1-8B", "must be a transformers model, got str"),
]


@pytest.mark.parametrize(("wrap", "message"), REFUSED)
def test_what_cannot_run_is_refused(wrap: Any, message: str) -> None:
    model = wrap(LLAMA.model(num_hidden_layers=1))
    with pytest.raises(ValueError, match=message):
        adakv.attach(model)
    with pytest.raises(ValueError, match=message):
        adakv.Cache(model, budget=40)
    with pytest.raises(ValueError, match=message):
        adakv.generate_batch(model, [[5, 6, 7]], budget=40)
