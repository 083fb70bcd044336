"""The transformers adapter: what is kept, what is generated and what is left alone."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, set_seed

import adakv
import reference
from hf.families import FAMILIES, LLAMA, V4, VOCAB, Family

pytestmark = pytest.mark.model

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 12}


def prompts(length: int = 80, padding: tuple[int, ...] = (0,)) -> dict[str, Tensor]:
    """Random prompts of which the first ``padding[b]`` tokens are padding."""
    ids = torch.randint(3, VOCAB, (len(padding), length))
    mask = (torch.arange(length) >= torch.tensor(padding)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@contextmanager
def captured(model: Any) -> Iterator[list[dict[str, Any]]]:
    """Queries, keys, values and options of every attention call, by a registered function."""
    calls: list[dict[str, Any]] = []

    def capture(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any):
        calls.append({"query": query, "key": key, "value": value, "module": module, **options})
        return eager(module, query, key, value, mask, **options)

    modeling = __import__(type(model).__module__, fromlist=["eager_attention_forward"])
    eager = modeling.eager_attention_forward
    AttentionInterface.register("test_capture", capture)
    AttentionMaskInterface.register("test_capture", AttentionMaskInterface()["eager"])
    model.set_attn_implementation("test_capture")
    yield calls
    model.set_attn_implementation("eager")


def expected_kept(call: dict[str, Any], b: int, start: int, budget: int, critical: bool) -> Any:
    """Positions of sequence b by the definitions, its tokens being the columns from ``start``."""
    keys, values = call["key"][b : b + 1, :, start:], call["value"][b : b + 1, :, start:]
    sinks, window = call.get("s_aux"), 32
    scores = reference.score(
        call["query"][b : b + 1, :, -window:],
        keys,
        sink_logits=None if sinks is None else sinks.detach(),
        scale=call["scaling"],
        softcap=call.get("softcap"),
    )
    norms = reference.value_norm(values, call["module"].o_proj.weight.detach())
    budgets = reference.allocate(scores, budget, window=window)
    positions, indptr = reference.select(
        scores, budgets, window=window, norms=norms if critical else None
    )
    return [positions[i:j].tolist() for i, j in itertools.pairwise(indptr)]


#: One chooses when all layers are there, one in each of them.
WAITING_OR_NOT = pytest.mark.parametrize("policy", ["model_column_max", "critical_ada_snapkv"])

SCORED = [f for f in FAMILIES if f.prefix in ("Llama", "Gemma2", "Granite", "GptOss", "Phi3")]


@pytest.mark.parametrize("policy", ["ada_snapkv", "critical_ada_snapkv"])
@pytest.mark.parametrize("family", SCORED, ids=str)
def test_kept_is_what_the_definitions_choose(family: Family, policy: str) -> None:
    model, padding = family.model(), (0, 50, 21)
    batch = prompts(120, padding)
    with torch.no_grad(), captured(model) as calls:
        model(**batch, past_key_values=DynamicCache(config=model.config))
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, policy, budget=48)
        model(**batch, past_key_values=cache)
    for i, layer in enumerate(cache.layers):
        if layer.is_sliding:
            continue
        for b, kept in enumerate(cache.kept(i)):
            expected = expected_kept(calls[i], b, padding[b], 48, policy.startswith("critical"))
            assert [row.tolist() for row in kept] == expected


@pytest.mark.parametrize("policy", adakv.policies())
def test_every_policy_generates(policy: str) -> None:
    model, batch = LLAMA.model(), prompts(150, (0, 30))
    if "repeat" in adakv.policy.get(policy).needs:
        pytest.skip("reads its prompts twice: tests/hf/test_model_wide.py")
    if policy == "mikv":
        pytest.skip("holds codes of 16-bit numbers: tests/hf/test_tiers.py")
    with adakv.attach(model):
        cache = adakv.Cache(model, policy, budget=80, classes={"image": [(10, 100)]})
        model.generate(**batch, past_key_values=cache, **GREEDY)
    entries = cache.stats()["lengths"].sum((0, 2)) - 4 * 2 * 11
    most = torch.tensor([150, 120] if policy == "full" else [80, 80]) * 4 * 2
    if "@" not in policy and policy != "think":  # whose bytes are counted, in two tiers
        assert torch.equal(entries, most)
    assert (entries <= 1.2 * most).all()


@pytest.mark.parametrize("policy", ["ada_snapkv", "critical_ada_pyramidkv", "streaming", "random"])
def test_prompts_shorter_than_the_window_are_kept(policy: str) -> None:
    model, batch = LLAMA.model(), prompts(9, (0, 8, 3))
    expected = model.generate(**batch, **GREEDY)
    with adakv.attach(model):
        for settings in ({"budget": 32}, {"ratio": 0.1}):
            cache = adakv.Cache(model, policy, **settings)
            actual = model.generate(**batch, past_key_values=cache, **GREEDY)
            if policy in ("streaming", "random") and "ratio" in settings:
                continue  # their windows are shorter
            assert torch.equal(actual, expected)
            assert cache.stats()["lengths"][2, :, 1].tolist() == [20, 12, 17]


@WAITING_OR_NOT
def test_ratio_gives_each_sequence_what_it_gets_alone(policy: str) -> None:
    model, padding = LLAMA.model(), (0, 60, 15)
    batch = prompts(160, padding)
    with torch.no_grad(), adakv.attach(model):
        together = adakv.Cache(model, policy, ratio=0.4)
        model(**batch, past_key_values=together)
        for b, start in enumerate(padding):
            alone = adakv.Cache(model, policy, ratio=0.4)
            model(batch["input_ids"][b : b + 1, start:], past_key_values=alone)
            assert alone.stats()["lengths"].sum() == 4 * 2 * int(0.4 * (160 - start) + 0.5)
            for layer in range(4):
                for ours, expected in zip(
                    together.kept(layer)[b], alone.kept(layer)[0], strict=True
                ):
                    assert torch.equal(ours, expected)


@WAITING_OR_NOT
def test_padding_may_be_anywhere_in_what_is_new(policy: str) -> None:
    model, ids = LLAMA.model(), torch.randint(3, VOCAB, (2, 220))
    mask = torch.ones_like(ids)
    mask[0, 100:120] = mask[0, 170:190] = mask[1, :30] = mask[1, 150:165] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    last, logits = {}, []
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, policy, budget=48)
        for begin, end in ((0, 160), (160, 219), (219, 220)):
            out = model(
                ids[:, begin:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, begin:end],
                past_key_values=cache,
            )
            logits.append(out.logits)
        for b in range(2):
            last[b], alone = [], adakv.Cache(model, policy, budget=48)
            for begin, end in ((0, 160), (160, 219), (219, 220)):
                part = ids[b : b + 1, begin:end][:, mask[b, begin:end].bool()]
                last[b].append(model(part, past_key_values=alone).logits)
            for layer in range(4):
                for row, other in zip(cache.kept(layer)[b], alone.kept(layer)[0], strict=True):
                    assert torch.equal(row, other)
    for step, (begin, end) in enumerate(((0, 160), (160, 219), (219, 220))):
        for b in range(2):
            tokens = logits[step][b, mask[b, begin:end].bool()].argmax(-1)
            assert torch.equal(tokens, last[b][step][0].argmax(-1))


def test_attach_changes_nothing_for_other_caches_and_detach_nothing_at_all() -> None:
    model, batch = LLAMA.model(), prompts(40, (0, 8))
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with torch.no_grad():
        expected = model(**batch).logits
        handle = adakv.attach(model)
        assert torch.equal(model(**batch).logits, expected)
        assert torch.equal(model(**batch, past_key_values=DynamicCache()).logits, expected)
        model(**batch, past_key_values=adakv.Cache(model, budget=36))
        handle.detach()
        handle.detach()
        assert torch.equal(model(**batch).logits, expected)
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(weights[name], x) for name, x in model.state_dict().items())
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("inner", ["eager", "sdpa"])
def test_sampling_with_a_full_budget_is_the_models_own(inner: str) -> None:
    model, batch = LLAMA.model(attn_implementation=inner), prompts(60, (0, 20, 33))
    settings = {**GREEDY, "do_sample": True, "temperature": 0.8, "top_k": 20}
    set_seed(7)
    expected = model.generate(**batch, **settings)
    with adakv.attach(model):
        set_seed(7)
        actual = model.generate(**batch, past_key_values=adakv.Cache(model, ratio=1.0), **settings)
    assert torch.equal(actual, expected)


def turn(model: Any, cache: Any, batch: dict[str, Tensor], more: dict[str, Tensor]) -> Tensor:
    """Generates, hears ``more`` and generates again."""
    first = model.generate(**batch, past_key_values=cache, **GREEDY)
    answered = torch.ones(len(first), first.shape[1] - batch["input_ids"].shape[1]).long()
    mask = torch.cat([batch["attention_mask"], answered, more["attention_mask"]], 1)
    ids = torch.cat([first, more["input_ids"]], 1)
    return model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY)


TURNS = [(LLAMA, 16), *((family, 8) for family in [LLAMA, *FAMILIES[8:12]])]


@pytest.mark.parametrize("family, page_size", TURNS, ids=str)
@pytest.mark.parametrize("padding", [(0,), (0, 0), (3, 290, 0)], ids=str)
def test_second_turn_sees_everything(
    family: Family, page_size: int, padding: tuple[int, ...]
) -> None:
    model = family.model()
    batch, more = prompts(50, tuple(range(len(padding)))), prompts(300, padding)
    expected = turn(model, DynamicCache(config=model.config), batch, more)
    with adakv.attach(model):
        cache = adakv.Cache(model, ratio=1.0, page_size=page_size)
        actual = turn(model, cache, batch, more)
    assert torch.equal(actual, expected)
    seen = [50 - b + 12 + 300 - p + 11 for b, p in enumerate(padding)]
    assert cache.stats()["seen"] == seen
    assert [len(rows[0]) for rows in cache.kept(3)] == seen


@WAITING_OR_NOT
@pytest.mark.parametrize("chunk", [16, 40, 47])
@pytest.mark.parametrize("padding", [(0,), (0, 30)], ids=str)
def test_chunked_prefill_keeps_what_one_prefill_keeps(
    policy: str, chunk: int, padding: tuple[int, ...]
) -> None:
    model, batch = LLAMA.model(), prompts(120, padding)
    settings = {**GREEDY, "max_new_tokens": 6}
    with adakv.attach(model):
        whole = adakv.Cache(model, policy, budget=40)
        expected = model.generate(**batch, past_key_values=whole, **settings)
        chunked = adakv.Cache(model, policy, budget=40, chunked_prefill=True)
        actual = model.generate(
            **batch, past_key_values=chunked, prefill_chunk_size=chunk, **settings
        )
    # With 4.57, padded chunks have other positions than padded prompts.
    if not (V4 and len(padding) > 1):
        for layer in range(4):
            for row, other in zip(whole.kept(layer), chunked.kept(layer), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(row, other, strict=True))
        assert torch.equal(actual, expected)


@WAITING_OR_NOT
def test_two_caches_in_turn_are_two_conversations(policy: str) -> None:
    model, tokens = LLAMA.model(), torch.randint(3, VOCAB, (20, 1))
    batches = prompts(90), prompts(70, (0, 5))

    def conversation(batch: dict[str, Tensor], cache: Any) -> Iterator[Tensor]:
        mask = batch["attention_mask"]
        yield model(**batch, past_key_values=cache).logits[:, -1]
        for token in tokens:
            mask = torch.cat([mask, torch.ones(len(mask), 1).long()], 1)
            ids = token.expand(len(mask), 1)
            yield model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1]

    with torch.no_grad(), adakv.attach(model):
        alone = [
            list(conversation(batch, adakv.Cache(model, policy, budget=40))) for batch in batches
        ]
        caches = [adakv.Cache(model, policy, budget=40) for _ in batches]
        mixed = list(zip(*map(conversation, batches, caches), strict=True))
    for ours, expected in zip(zip(*mixed, strict=True), alone, strict=True):
        assert torch.equal(torch.stack(ours), torch.stack(expected))


def test_prefill_holds_the_dense_keys_of_one_layer_only() -> None:
    model, batch = LLAMA.model(), prompts(101)
    held = []

    def count(*_: Any) -> None:
        shapes = [tuple(x.shape) for x in gc.get_objects() if type(x) is Tensor]
        held.append(shapes.count((1, 2, 101, 16)))

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(count)
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, "ada_snapkv", budget=40, max_new_tokens=64)
        gc.disable()  # so that it is seen if something waits for the collector
        model(**batch, past_key_values=cache)
        gc.enable()
    assert held == [0, 0, 0, 0]
    entry = 2 * 16 * 4 + 4
    assert cache.stats()["bytes"] == cache.stats()["pages_used"] * 16 * entry
    assert cache.stats()["pages_used"] == 4 * (2 * 40 // 16 + 2 * 2)
    assert cache.stats()["full_bytes"] == 4 * 2 * 101 * 2 * 16 * 4


@WAITING_OR_NOT
def test_reset_makes_room_for_another_batch(policy: str) -> None:
    model = FAMILIES[9].model()
    with adakv.attach(model):
        cache = adakv.Cache(model, policy, budget=40)
        model.generate(**prompts(90, (0, 3)), past_key_values=cache, **GREEDY)
        cache.reset()
        assert cache.stats()["pages_used"] == cache.get_seq_length() == 0
        batch = prompts(70)
        actual = model.generate(**batch, past_key_values=cache, **GREEDY)
        fresh = adakv.Cache(model, policy, budget=40)
        assert torch.equal(actual, model.generate(**batch, past_key_values=fresh, **GREEDY))
