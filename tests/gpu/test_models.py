"""Whole models on a GPU: the same text and the same kept entries as on the CPU, in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import adakv
from adakv.cache import KVCache
from adakv.eval.prefill import Prefill
from adakv.hf.sampling import Sampling
from adakv.hf.slots import Decoder
from hf.families import FAMILIES, LLAMA, VOCAB, Family

pytestmark = [pytest.mark.gpu, pytest.mark.model]

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 40}
LENGTHS = (80, 130, 33, 200, 97, 64, 150)


def prompts(*lengths: int) -> list[list[int]]:
    return [torch.randint(3, VOCAB, (n,)).tolist() for n in lengths]


def padded(batch: list[list[int]], device: str) -> dict[str, Tensor]:
    longest = max(map(len, batch))
    ids = [[0] * (longest - len(x)) + x for x in batch]
    mask = [[0] * (longest - len(x)) + [1] * len(x) for x in batch]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def both(family: Family) -> dict[str, Any]:
    model = family.model()
    return {"cpu": model, "cuda": copy.deepcopy(model).cuda()}


#: Those that read prompts once, take models in float32, and have pages enough in a budget of 70.
ONE_PASS = [
    name
    for name in adakv.policies()
    if "repeat" not in adakv.policy.get(name).needs and name not in ("mikv", "think")
]


@pytest.mark.parametrize("policy", ONE_PASS)
def test_generate_equals_the_cpu(policy: str) -> None:
    batch, second = prompts(180, 130, 101), prompts(9, 9, 9)
    texts, kept = {}, {}
    for device, model in both(LLAMA).items():
        given = padded(batch, device)
        with adakv.attach(model):
            has_classes = "classes" in adakv.policy.get(policy).needs  # evicts images alone
            budget = None if policy == "full" else 150 if has_classes else 70
            cache = adakv.Cache(model, policy, budget, classes={"image": [(2, 100)]})
            first = model.generate(**given, past_key_values=cache, **GREEDY)
            kept[device] = [
                [head.tolist() for row in cache.kept(layer) for head in row]
                for layer in range(model.config.num_hidden_layers)
            ]
            turn = torch.cat([first, torch.tensor(second, device=device)], 1)
            ones = torch.ones_like(turn[:, given["input_ids"].shape[1] :])
            mask = torch.cat([given["attention_mask"], ones], 1)
            texts[device] = model.generate(
                turn, attention_mask=mask, past_key_values=cache, **GREEDY
            ).cpu()
    assert torch.equal(texts["cuda"], texts["cpu"])
    assert kept["cuda"] == kept["cpu"]


@pytest.mark.parametrize(
    "loop", [{}, {"custom_generate": adakv.cuda_graph_sample}], ids=["loop", "recorded"]
)
@pytest.mark.parametrize("kind", ["auto:1/4 + auto:3/4", "channels=1/2", "auto:1/4 + rank=1/2:3/4"])
def test_tiers_equal_the_cpu(loop: dict[str, Any], kind: str) -> None:
    batch, texts, kept = prompts(180, 130, 101), {}, {}
    for device, model in both(LLAMA).items():
        given = padded(batch, device)
        cache = adakv.Cache(model, "ada_snapkv", 70, kv_dtype=kind)
        with adakv.attach(model):
            text = model.generate(**given, past_key_values=cache, **GREEDY, **loop)
        texts[device] = text.tolist()
        rows = [row for i in range(len(cache.layers)) for heads in cache.kept(i) for row in heads]
        kept[device] = [row.tolist() for row in rows]
    assert texts["cuda"] == texts["cpu"]
    assert kept["cuda"] == kept["cpu"]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_family_equals_the_cpu(family: Family) -> None:
    batch = prompts(60, 60)
    texts = {}
    for device, model in both(family).items():
        with adakv.attach(model):
            cache = adakv.Cache(model, budget=40)
            given = padded(batch, device)
            texts[device] = model.generate(**given, past_key_values=cache, **GREEDY).cpu()
    assert torch.equal(texts["cuda"], texts["cpu"])


def test_prefill_in_chunks_equals_the_cpu() -> None:
    texts = {}
    ids = torch.tensor(prompts(200))
    for device, model in both(LLAMA).items():
        with adakv.attach(model):
            cache = adakv.Cache(model, budget=48, chunked_prefill=True)
            texts[device] = model.generate(
                ids.to(device), past_key_values=cache, prefill_chunk_size=64, **GREEDY
            ).cpu()
    assert torch.equal(texts["cuda"], texts["cpu"])


@pytest.mark.parametrize(
    "how", [{"cuda_graph": False}, {"cuda_graph": True}, {"compile": True}], ids=str
)
@pytest.mark.parametrize("sampled", [False, True])
def test_generate_batch_equals_the_cpu(how: dict[str, bool], sampled: bool) -> None:
    given, counts = prompts(*LENGTHS), [30, 1, 20, 25, 7, 30, 12]
    chance = {"temperature": 1.0, "top_p": 0.9, "seed": 3} if sampled else {}
    results = {}
    for device, model in both(LLAMA).items():
        options = adakv.BatchOptions(
            max_batch=3, eos_token_id=(), **chance, **(how if device == "cuda" else {})
        )
        results[device] = adakv.generate_batch(
            model, given, budget=40, max_new_tokens=counts, options=options
        )
    assert results["cuda"] == results["cpu"]


def test_a_recorded_loop_equals_the_cpu() -> None:
    batch, texts = prompts(180, 130, 101), {}
    for device, model in both(LLAMA).items():
        with adakv.attach(model):
            cache = adakv.Cache(model, budget=48)
            texts[device] = model.generate(
                **padded(batch, device),
                past_key_values=cache,
                custom_generate=adakv.cuda_graph_sample,
                **GREEDY,
            ).cpu()
    assert torch.equal(texts["cuda"], texts["cpu"])


@pytest.mark.parametrize(
    "policy", [p for p in ONE_PASS if "classes" not in adakv.policy.get(p).needs]
)
def test_what_is_added_to_a_prefill_waits_for_nothing(policy: str) -> None:
    """A mask has to be read on the host, once in a prompt; this one has none."""
    model = LLAMA.model(attn_implementation="sdpa").cuda()
    ids, budget = torch.tensor(prompts(180)), None if policy == "full" else 70
    with adakv.attach(model):
        prefill = Prefill(model, ids)
        torch.cuda.set_sync_debug_mode("error")
        try:
            cache = prefill.cache(policy, budget)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        with torch.no_grad():
            whole = adakv.Cache(model, policy, budget)
            model(ids.cuda(), past_key_values=whole)
    assert cache.reading is None
    assert torch.equal(cache.stats()["lengths"], whole.stats()["lengths"])


@pytest.mark.parametrize("records", [False, True])
def test_a_step_waits_for_nothing(records: bool) -> None:
    model = both(LLAMA)["cuda"]
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    kv = KVCache(
        num_layers=model.config.num_hidden_layers, num_sequences=2, num_kv_heads=heads,
        head_dim=dim, num_pages=400, max_row_pages=20, dtype=torch.float32, device="cuda",
    )  # fmt: skip
    decoder, cache = Decoder(model, kv, Sampling()), adakv.Cache(model, budget=40)
    with adakv.attach(model), torch.no_grad():
        for slot, prompt in enumerate(prompts(80, 50)):
            cache.fill(kv, slot)
            ids = torch.tensor([prompt], device="cuda")
            logits = model(ids, past_key_values=cache).logits[0, -1]
            decoder.begin(slot, logits, len(prompt))
        steps = adakv.hf.cuda_graph.Steps(decoder, cuda_graph=records)
        decoder.grow()
        steps.run(2)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(30):
                decoder.grow()
                steps.run(2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert kv.all_layers.lengths.cpu().sum((0, 2)).tolist() == [4 * heads * (40 + 31)] * 2
