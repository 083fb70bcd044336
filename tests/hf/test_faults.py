"""Faults before and after every verb of a forward: a retry computes the right thing, or says that
the cache has to be reset; never anything else."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import adakv
from adakv import ops
from adakv.cache import KVCache
from hf.families import FAMILIES, LLAMA, VOCAB

pytestmark = pytest.mark.model

VERBS = ("score", "value_norm", "allocate", "select", "compact", "append", "plan", "attend")
MEMORY = ("grow", "reserve", "begin", "begin_layers", "advance_pages")

#: One chooses by layer, one by layer with norms, one model-wide from all queries, one keeps all.
POLICIES = ("ada_snapkv", "critical_ada_snapkv", "model_column_max", "full")
PROMPT = 60


class InjectedError(Exception):
    """What goes wrong: an interrupt, or no memory."""


class Faults:
    """Counts calls of verbs, and raises at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.at: tuple[int, str] | None = None
        for place, names in ((ops, VERBS), (KVCache, MEMORY)):
            for name in names:
                monkeypatch.setattr(place, name, self._watched(name, getattr(place, name)))

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            index = len(self.calls)
            self.calls.append(name)
            if self.at == (index, "before"):
                raise InjectedError(name)
            result = function(*args, **kwargs)
            if self.at == (index, "after"):
                raise InjectedError(name)
            return result

        return call

    def of(self, run: Callable[[], Any]) -> Iterator[tuple[int, str]]:
        """Where a run can go wrong."""
        self.at, self.calls = None, []
        run()
        for index in range(len(self.calls)):
            for when in ("before", "after"):
                yield index, when

    def raised_at(self, place: tuple[int, str], run: Callable[[], Any]) -> None:
        self.at, self.calls = place, []
        with pytest.raises(InjectedError):
            run()
        self.at = None


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


@torch.no_grad()
def logits(model: Any, cache: Any, tokens: Tensor) -> Tensor:
    return model(tokens, past_key_values=cache).logits


def check_retries(faults: Faults, model: Any, policy: str, before: Tensor, tokens: Tensor) -> int:
    """A forward of ``tokens`` after one of ``before``, if there are any, goes wrong everywhere; the
    number of retries that succeeded."""

    def filled(policy: str) -> adakv.Cache:
        cache = adakv.Cache(model, policy, budget=40, max_new_tokens=1)
        if before.numel():
            logits(model, cache, before)
        return cache

    expected_cache = filled(policy)
    expected = logits(model, expected_cache, tokens)
    probe = filled(policy)
    num_right = 0
    for place in list(faults.of(lambda: logits(model, probe, tokens))):
        cache = filled(policy)
        faults.raised_at(place, lambda cache=cache: logits(model, cache, tokens))
        for _ in range(2):  # a refusal stays one
            try:
                actual = logits(model, cache, tokens)
            except adakv.Error as error:
                assert "reset() the cache" in str(error)
            else:
                assert torch.equal(actual, expected), place
                assert str(cache.stats()) == str(expected_cache.stats()), place
                num_right += 1
                break
        else:
            cache.reset()
            if before.numel():
                logits(model, cache, before)
            assert torch.equal(logits(model, cache, tokens), expected), place
    return num_right


MODELS = [LLAMA, FAMILIES[9]]  # the second one has layers with a window


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_tokens", [1, 3, 90])
def test_a_step_that_went_wrong(policy: str, num_tokens: int, faults: Faults) -> None:
    """90 tokens are more than the fresh pages of a row take: they are appended in pieces."""
    model, tokens = LLAMA.model(num_hidden_layers=2), torch.randint(3, VOCAB, (2, PROMPT + 90))
    with adakv.attach(model):
        prompt, new = tokens[:, :PROMPT], tokens[:, PROMPT : PROMPT + num_tokens]
        check_retries(faults, model, policy, prompt, new)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prompt_that_went_wrong(policy: str, faults: Faults) -> None:
    model, prompt = LLAMA.model(num_hidden_layers=2), torch.randint(3, VOCAB, (2, PROMPT))
    with adakv.attach(model):
        check_retries(faults, model, policy, prompt[:, :0], prompt)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_a_step_that_went_wrong_beside_windows(num_tokens: int, faults: Faults) -> None:
    model = FAMILIES[9].model()
    tokens = torch.randint(3, VOCAB, (1, PROMPT + num_tokens))
    with adakv.attach(model):
        check_retries(faults, model, "ada_snapkv", tokens[:, :PROMPT], tokens[:, PROMPT:])


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_a_forward_stopped_between_the_layers(num_tokens: int) -> None:
    """By a hook at every module: Ctrl-C comes anywhere.

    Behind the last layer's attention everything is stored, as in any cache, and ``seen`` says so.
    """
    model = LLAMA.model(num_hidden_layers=2)
    tokens = torch.randint(3, VOCAB, (1, PROMPT + num_tokens))
    prompt, new = tokens[:, :PROMPT], tokens[:, PROMPT:]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40)
        logits(model, cache, prompt)
        expected, num_right = logits(model, cache, new), 0
        for name, module in model.named_modules():
            for register in (module.register_forward_pre_hook, module.register_forward_hook):
                cache.reset()
                logits(model, cache, prompt)
                hook = register(stop)
                try:
                    logits(model, cache, new)
                except KeyboardInterrupt:
                    pass
                else:
                    assert isinstance(module, torch.nn.ModuleList)  # which isn't called
                    continue
                finally:
                    hook.remove()
                if cache.seen == [PROMPT + num_tokens] and not cache.is_midway:
                    assert not name or re.match(r"model$|model.layers.1|model.norm|lm_head", name)
                    continue
                try:
                    actual = logits(model, cache, new)
                except adakv.Error as error:
                    assert "reset() the cache" in str(error)
                else:
                    assert torch.equal(actual, expected), name
                    num_right += 1
    assert num_right > 10
