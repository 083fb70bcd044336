"""Hidden states for gates: the right ones, however a prompt comes, and only for those who ask."""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adakv
import reference
from adakv.eval.prefill import Prefill
from adakv.policy import Gate, LayerInputs, ModelWide, Policy, TopScore, Uniform, get
from hf.families import FAMILIES, LLAMA, VOCAB, Family
from hf.test_hf import prompts
from hf.test_model_wide import held

pytestmark = pytest.mark.model

LENGTH, BUDGET = 90, 44


@dataclass(frozen=True)
class Listener:
    """Remembers the hidden states that it is handed, layer by layer."""

    heard: list[Tensor] = field(default_factory=list)
    window: int = 8
    pinned: int = 0
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})

    def score(self, inputs: LayerInputs) -> Tensor:
        assert inputs.hidden is not None
        self.heard.append(inputs.hidden.clone())
        return inputs.keys.float().norm(dim=-1)


def gate_of(model: Any, folder: Path) -> Gate:
    config = model.config
    shape = config.num_key_value_heads, config.hidden_size
    layers = range(config.num_hidden_layers)
    found = {f"layers.{i}.weight": torch.randn(shape) for i in layers}
    save_file(found | {f"layers.{i}.bias": torch.zeros(shape[0]) for i in layers}, folder / "gate")
    return Gate(str(folder / "gate"), window=8)


def fed(model: Any, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """What the attention module of each layer is fed, ``[B, T, E]``, by hooks of the test's."""
    found: list[Tensor] = []
    modules = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, options: found.append(options.get("hidden_states", args[:1])),
            with_kwargs=True,
        )
        for module in modules
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    return [x if isinstance(x, Tensor) else x[0] for x in found]


def num_hooks(model: Any) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def positions_of(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def read(model: Any, cache: Any, batch: Mapping[str, Tensor], size: int) -> None:
    """A prompt in parts of so many columns, which is then chosen from."""
    mask = batch["attention_mask"]
    for start in range(0, mask.shape[1], size):
        part = slice(start, start + size)
        model(
            batch["input_ids"][:, part],
            attention_mask=mask[:, : part.stop],
            position_ids=positions_of(mask)[:, part],
            past_key_values=cache,
        )
    if size < mask.shape[1]:
        cache.decoded_pages()


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_hidden_states_are_what_attention_is_fed(family: Family) -> None:
    if not family.is_available:
        pytest.skip("not in this version of transformers")
    model, batch, listener = family.model(), prompts(LENGTH), Listener()
    expected = fed(model, batch)
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, Policy(listener, Uniform(), TopScore()), budget=BUDGET)
        model(**batch, past_key_values=cache)
    full = [i for i, layer in enumerate(cache.layers) if hasattr(layer, "attend")]
    assert len(listener.heard) == len(full)
    for layer, heard in zip(full, listener.heard, strict=True):
        torch.testing.assert_close(heard, expected[layer])
    assert all(getattr(layer, "hidden", None) is None for layer in cache.layers)


@pytest.mark.parametrize("size", [LENGTH, 40, 7])
@pytest.mark.parametrize("padding", [(0, 0), (0, 33)])
def test_a_prompt_in_parts_has_those_of_all(size: int, padding: tuple[int, ...]) -> None:
    model, batch, listener = LLAMA.model(), prompts(LENGTH, padding), Listener()
    positions = positions_of(batch["attention_mask"])
    expected = fed(model, {**batch, "position_ids": positions})
    policy = Policy(listener, ModelWide(), TopScore())
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, policy, budget=BUDGET, chunked_prefill=size < LENGTH)
        read(model, cache, batch, size)
    heard = iter(listener.heard)
    for layer in expected:
        if padding == (0, 0):
            torch.testing.assert_close(next(heard), layer)
        else:
            for row, start in zip(layer, padding, strict=True):
                torch.testing.assert_close(next(heard)[0], row[start:])


def test_padding_on_the_right_is_not_scored() -> None:
    model, listener = LLAMA.model(), Listener()
    ids = torch.randint(3, VOCAB, (2, LENGTH))
    mask = torch.ones_like(ids)
    mask[1, 60:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    expected = fed(model, batch)
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, Policy(listener, Uniform(), TopScore()), budget=BUDGET)
        model(**batch, past_key_values=cache)
    heard = iter(listener.heard)
    for layer in expected:
        torch.testing.assert_close(next(heard)[0], layer[0])
        torch.testing.assert_close(next(heard)[0], layer[1, :60])


@pytest.mark.parametrize("size", [LENGTH, 40])
@pytest.mark.parametrize("allocator", ["Uniform()", "ModelWide()", "ModelWide(reserve=2)"])
def test_what_a_gate_says_is_kept(tmp_path: Path, size: int, allocator: str) -> None:
    """The first layer's hidden states are the same with any cache; its scores are the gate's."""
    model, batch = LLAMA.model(), prompts(LENGTH)
    gate = gate_of(model, tmp_path)
    policy, expected = get(f"{gate} * {allocator} * TopScore()"), fed(model, batch)
    weights = load_file(gate.file)
    scores = [reference.gate(x.double(), weights, i).exp() for i, x in enumerate(expected)]
    for s in scores:
        s[..., :4] = torch.inf
        s[..., -8:] = torch.inf
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, policy, budget=BUDGET, chunked_prefill=size < LENGTH)
        read(model, cache, batch, size)
    if allocator == "Uniform()":
        for layer, s in enumerate(scores):
            best = s[0].topk(BUDGET).indices.sort().values
            assert [x.tolist() for x in cache.kept(layer)[0]] == best.tolist()
    else:
        joined = torch.cat(scores, 1)[0]
        best = joined.flatten().topk(BUDGET * len(joined)).indices
        counts = torch.bincount(best // LENGTH, minlength=len(joined))
        assert cache.stats()["lengths"][:, 0].flatten().tolist() == counts.tolist()


def test_one_reading_serves_a_gate_too(tmp_path: Path) -> None:
    model, ids = LLAMA.model(), torch.randint(3, VOCAB, (1, LENGTH))
    policy = get(f"{gate_of(model, tmp_path)} * ModelWide() * TopScore()")
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, policy, budget=BUDGET)
        model(ids, past_key_values=cache)
        prefill = Prefill(model, ids[:, :50], needs=policy.needs).followed_by(ids[:, 50:])
        assert held(prefill.cache(policy, BUDGET)) == held(cache)
        with pytest.raises(ValueError, match="hidden must be given"):
            Prefill(model, ids).cache(policy, BUDGET)


def test_nobody_pays_who_does_not_ask(tmp_path: Path) -> None:
    """Hooks are there as long as a cache that asks, and speak to no other cache."""
    model, ids = LLAMA.model(), torch.randint(3, VOCAB, (1, LENGTH))
    layers = model.config.num_hidden_layers
    with torch.no_grad(), adakv.attach(model):
        adakv.Cache(model, "ada_snapkv", budget=BUDGET)
        assert num_hooks(model) == 0
        cache = adakv.Cache(model, Policy(Listener(), Uniform(), TopScore()), budget=BUDGET)
        assert num_hooks(model) == layers
        other = adakv.Cache(model, Policy(Listener(), Uniform(), TopScore()), budget=BUDGET)
        copied = copy.copy(cache)
        for asked in (cache, copied):
            model(ids, past_key_values=asked)
            assert all(layer.hidden is None for layer in asked.layers)
            assert asked.stats()["seen"] == [LENGTH]
        assert other.stats()["seen"] == [] and all(x.hidden is None for x in other.layers)
        (forked,) = cache.fork()
        forked.reset()
        model(ids, past_key_values=forked)
        assert held(forked) == held(cache)
        del cache, other, copied, asked, forked
        gc.collect()
        assert num_hooks(model) == 0


def test_texts_and_chunks_have_no_hidden_states(tmp_path: Path) -> None:
    model = LLAMA.model()
    policy = get(f"{gate_of(model, tmp_path)} * Uniform() * TopScore()")
    for options in ({"decode_budget": 50}, {"chunk_budget": 50}):
        with pytest.raises(ValueError, match="needs hidden, which are there for a whole prompt"):
            adakv.Cache(model, policy, budget=BUDGET, **options)  # type: ignore[arg-type]


def test_batches_take_gates(tmp_path: Path) -> None:
    model = LLAMA.model()
    policy = get(f"{gate_of(model, tmp_path)} * ModelWide() * TopScore()")
    ids = [torch.randint(3, VOCAB, (n,)) for n in (LENGTH, 60)]
    texts = adakv.generate_batch(model, ids, policy=policy, budget=BUDGET, max_new_tokens=6)
    assert [len(text.tokens) for text in texts] == [6, 6]
