"""Layers whose pages lie apart, as those of a model over several devices do: here two pools on the
CPU, whose cache must be the same as with one. tests/gpu/test_devices.py has devices."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import adakv
from adakv.cache import KVCache
from adakv.devices import Group, SplitCache, groups_of
from adakv.hf import Cache, families, generate, slots
from adakv.hf.sampling import Sampling
from adakv.policy import ModelWide, Policy, TopScore, WindowAttention
from adakv.shape import Shape
from hf.families import FAMILIES, LLAMA, VOCAB
from hf.test_hf import GREEDY, prompts

pytestmark = pytest.mark.model

CPU, OTHER = torch.device("cpu"), torch.device("cpu", 1)  # to torch the same memory
#: Layers over two pools, the second of which begins in the middle of the first.
APART = (Group(CPU, (0, 3)), Group(OTHER, (1, 2)))


class SplitPages(Cache):
    """A cache that takes layers 1 and 2 for those of another device."""

    @staticmethod
    def layer_devices(model: torch.nn.Module, layers: Sequence[int]) -> list[torch.device]:
        return [CPU, OTHER, OTHER, CPU]


POLICIES: list[str | Policy] = [
    "ada_snapkv",
    "critical_ada_snapkv",
    "ada_pyramidkv",
    "h2o",
    "model_column_max",
    "expected",
    Policy(WindowAttention(), ModelWide(reserve=2.0), TopScore()),
]


@torch.no_grad()
def read_and_write(kind: type[Cache], model: PreTrainedModel, policy: Any, **how: Any) -> Any:
    """Prompts of unequal length, three tokens each, then 70 in one step, in a cache of that kind;
    the cache, and logits."""
    torch.manual_seed(0)
    batch, logits = prompts(120, (0, 50, 21)), []
    mask = batch["attention_mask"]
    with adakv.attach(model):
        cache = kind(model, policy, budget=48, max_new_tokens=4, **how)
        logits.append(model(**batch, past_key_values=cache).logits)
        for columns in (1, 1, 1, 70):
            torch.manual_seed(columns)
            tokens = torch.randint(3, VOCAB, (3, columns))
            mask = torch.cat([mask, mask.new_ones(3, columns)], 1)
            out = model(tokens, attention_mask=mask, past_key_values=cache)
            logits.append(out.logits)
    return cache, torch.cat(logits, 1)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_pages_apart_hold_and_attend_to_the_same(policy: str | Policy):
    model = LLAMA.model()
    together, expected = read_and_write(Cache, model, policy)
    apart, found = read_and_write(SplitPages, model, policy)
    assert isinstance(apart.pages, SplitCache) and isinstance(together.pages, KVCache)
    assert [part.num_layers for part in apart.pages.parts] == [2, 2]
    for layer in range(4):
        rows, others = apart.kept(layer), together.kept(layer)
        assert [x.tolist() for row in rows for x in row] == [
            x.tolist() for row in others for x in row
        ]
    assert torch.equal(found, expected)
    stats, other = apart.stats(), together.stats()
    assert torch.equal(stats.pop("lengths"), other.pop("lengths"))
    for key in ("seen", "full_bytes", "kv_dtype"):
        assert stats[key] == other[key]
    apart.reset()
    assert apart.stats()["bytes"] == 0


def test_pages_of_codes_apart_are_the_same():
    model = FAMILIES[5].model(head_dim=64).bfloat16()  # Qwen3
    _, expected = read_and_write(Cache, model, "ada_snapkv", kv_dtype="int8")
    _, found = read_and_write(SplitPages, model, "ada_snapkv", kv_dtype="int8")
    assert torch.equal(found, expected)


def test_generate_writes_the_same_text():
    model, texts, batch = LLAMA.model(), [], prompts(90, (0, 9))
    for kind in (Cache, SplitPages):
        with adakv.attach(model):
            cache = kind(model, "model_column_max", budget=40, max_new_tokens=4)
            texts.append(model.generate(**batch, past_key_values=cache, **GREEDY))
    assert torch.equal(*texts)


@torch.no_grad()
def decoded(model: PreTrainedModel, groups: tuple[Group, ...], policy: str) -> list[list[int]]:
    """What two prompts in the slots of one cache go on with, as generate_batch has it."""
    shape = Shape(4, 2, 16, torch.float32, CPU, groups=groups)
    kv = shape.cache(3, 4 * 60, 20, 16)
    decoder = slots.Decoder(model, kv, Sampling())
    texts: list[list[int]] = [[], []]
    with adakv.attach(model):
        reader = (SplitPages if groups else Cache)(model, policy, budget=40)
        for slot, length in ((0, 70), (1, 95)):
            torch.manual_seed(slot)
            reader.fill(kv, slot)
            ids = torch.randint(3, VOCAB, (1, length))
            out = model(ids, past_key_values=reader, logits_to_keep=1)
            decoder.begin(slot, out.logits[0, -1], length)
        for _ in range(20):
            decoder.grow()
            decoder.step(2)()
            for text, token in zip(texts, decoder.slots.tokens[:2, 0].tolist(), strict=True):
                text.append(token)
        for slot in (0, 1):
            decoder.end(slot)
    assert kv.pages_used == 0
    return texts


@pytest.mark.parametrize("policy", ["ada_snapkv", "model_column_max"])
def test_slots_of_pages_apart_write_the_same_text(policy: str):
    model = LLAMA.model()
    assert decoded(model, APART, policy) == decoded(model, (), policy)


def test_a_part_grows_for_what_its_layers_get_of_the_models_budget():
    """And for the text behind it, whose room the layers may have taken."""
    halves = (Group(CPU, (0,)), Group(CPU, (1,)))
    kv = Shape(2, 2, 8, torch.float32, CPU, groups=halves).cache(1, 8, 30, 8)
    assert [part.num_pages for part in kv.parts] == [4, 4]
    kv.begin_layers([0], [[2]], [2])
    kv.begin_layers([1], [[60]], [60])
    taken = [part.num_pages - part.num_free for part in kv.parts]
    assert kv.parts[0].num_pages == 4 and kv.parts[1].num_pages == taken[1] > 4
    for _ in range(10):
        kv.grow([8], 8)
    assert all(part.num_pages - part.num_free > n for part, n in zip(kv.parts, taken, strict=True))


def test_texts_that_are_evicted_from_are_refused():
    model = LLAMA.model()
    with pytest.raises(
        ValueError, match=r"decode_budget, chunk_budget and read need .* got cpu, cpu:1"
    ):
        SplitPages(model, "ada_snapkv", 40, decode_budget=40)
    with pytest.raises(ValueError, match="decode_budget, chunk_budget and read need"):
        SplitPages(model, "ada_snapkv", 40, chunk_budget=40)


def test_layers_are_grouped_by_device():
    one, other = torch.device("cuda", 0), torch.device("cpu")
    groups = groups_of([one, other, other, one])
    assert groups == (Group(one, (0, 3)), Group(other, (1, 2)))
    assert groups_of([]) == ()
    with pytest.raises(ValueError, match=re.escape("every layer once, got [(0,), (0,)]")):
        kv = Shape(1, 2, 8, torch.float32, CPU).cache(1, 8, 9, 8)
        SplitCache([Group(CPU, (0,)), Group(CPU, (0,))], [kv, kv])


def test_devices_are_those_of_the_attention_modules():
    """Also of weights that come when they are needed; unknown where modules don't say it."""
    accelerate = pytest.importorskip("accelerate")
    model = LLAMA.model()
    assert families.layer_devices(model.model, [0, 2]) == [CPU, CPU]
    accelerate.cpu_offload(model, execution_device=CPU)
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    assert families.layer_devices(model.model, [0, 2]) == [CPU, CPU]
    assert families.layer_devices(model.model, [0, 9]) == []


def test_weights_that_come_when_needed_are_noticed():
    """By Accelerate's hooks, also where a module has several."""
    model = LLAMA.model()
    assert not families.loads_weights(model)
    projection = model.model.layers[1].mlp.up_proj
    projection._hf_hook = SimpleNamespace(offload=False)
    assert not families.loads_weights(model)
    projection._hf_hook = SimpleNamespace(hooks=[object(), SimpleNamespace(offload=True)])
    assert families.loads_weights(model)


def test_a_batch_is_written_by_a_model_whose_weights_are_nowhere():
    """Accelerate loads all of them when they are needed."""
    accelerate = pytest.importorskip("accelerate")
    model = LLAMA.model()
    (expected,) = adakv.generate_batch(model, [[5, 6] * 40], budget=40, max_new_tokens=8)
    accelerate.cpu_offload(model, execution_device=CPU)
    assert model.device.type == "meta"
    (result,) = adakv.generate_batch(model, [[5, 6] * 40], budget=40, max_new_tokens=8)
    assert result.tokens == expected.tokens


def test_a_batch_of_a_dispatched_model_is_written():
    """With Accelerate's hooks, all of which point to the CPU."""
    accelerate = pytest.importorskip("accelerate")
    texts = []
    for is_dispatched in (False, True):
        model = LLAMA.model()
        if is_dispatched:
            places = {f"model.layers.{i}": "cpu" for i in range(4)}
            places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
            places |= {"model.rotary_emb": "cpu"}
            model = accelerate.dispatch_model(model, places, force_hooks=True)
        results = generate.generate_batch(
            model, [[5] * 60, [7, 8] * 40], budget=40, max_new_tokens=12
        )
        texts.append([result.tokens for result in results])
    assert texts[0] == texts[1]
