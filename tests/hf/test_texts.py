"""Texts that are evicted from while they are written."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adakv
from adakv.cache import KVCache
from adakv.policy import Policy, get
from hf.families import FAMILIES, LLAMA, VOCAB

POLICIES = (
    *("random", "streaming", "snapkv", "r_kv", "vase", "h2o", "tova", "knorm", "ahakv"),
    *("ada_snapkv", "critical_ada_snapkv", "defensive", "ada_pyramidkv"),
    *("prefixkv_text", "layer_defensive", "prefixkv", "lava"),
    "LastImportant(window=32) * Capped() * TopScore()",
)
GPT_OSS = next(family for family in FAMILIES if family.prefix == "GptOss")


def write(model: Any, cache: Any, ids: Tensor, count: int, mask: Tensor | None = None) -> Tensor:
    """``ids`` and ``count`` tokens that the model writes behind them."""
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(ids) if mask is None else mask  # else a written pad token hides
    with torch.no_grad(), adakv.attach(model):
        written: Tensor = model.generate(
            ids,
            past_key_values=cache,
            max_new_tokens=count,
            do_sample=False,
            attention_mask=mask,
        )
    return written


def evicting(model: Any, policy: str, **settings: Any) -> adakv.Cache:
    """A cache that keeps 48 entries of a prompt by Ada-SnapKV, and 40 of the text by ``policy``."""
    text = {"decode_policy": policy, "decode_budget": 40, "every": 8}
    return adakv.Cache(model, "ada_snapkv", 48, **text, **settings)


@pytest.mark.model
@pytest.mark.parametrize("policy", POLICIES)
def test_a_budget_for_all_of_a_text_changes_nothing(policy: str):
    model = LLAMA.model()
    torch.manual_seed(1)
    prompt = torch.randint(3, VOCAB, (2, 70))
    mask = torch.ones_like(prompt)
    mask[1, :9] = 0
    options = {"policy": policy, "budget": 48}
    plain = write(model, adakv.Cache(model, **options), prompt, 60, mask)
    cache = adakv.Cache(model, **options, decode_budget=60, every=8)
    assert torch.equal(write(model, cache, prompt, 60, mask), plain)


@pytest.mark.model
@pytest.mark.parametrize("pin_prompt", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_rows_stay_within_their_budget(policy: str, pin_prompt: bool):
    model = LLAMA.model(num_hidden_layers=2)
    ids = torch.randint(3, VOCAB, (1, 70))
    cache = evicting(model, policy, pin_prompt=pin_prompt)
    held = []
    for _ in range(12):
        ids = write(model, cache, ids, 16)
        held.append((cache.stats()["lengths"].float().mean().item(), cache.pages.num_pages))
    assert max(mean for mean, _ in held) <= 48 + 40 + 8
    assert held[-1][1] == held[4][1]  # the pool is as large as it was
    assert cache.seen == [70 + 12 * 16 - 1]


@pytest.mark.model
@pytest.mark.parametrize("family", [LLAMA, GPT_OSS], ids=str)
@pytest.mark.parametrize("policy", ["ada_snapkv", "critical_ada_snapkv", "r_kv", "h2o"])
def test_the_prompt_stays(policy: str, family: Any):
    """What was kept of it, in every head; and with sinks in the softmax."""
    model = family.model()
    prompt = torch.randint(3, VOCAB, (1, 70))
    cache = adakv.Cache(model, policy, 48, decode_budget=40, every=8)
    ids = write(model, cache, prompt, 2)
    full = [i for i, layer in enumerate(cache.layers) if hasattr(layer, "index")]
    before = [cache.kept(i)[0] for i in full]
    write(model, cache, ids, 100)
    for i, rows in zip(full, before, strict=True):
        for row, now in zip(rows, cache.kept(i)[0], strict=True):
            of_prompt = [p for p in row.tolist() if p < 70]
            assert [p for p in now.tolist() if p < 70] == of_prompt
            text = [p for p in now.tolist() if p >= 70]
            assert len(text) < 100
            newest = get(policy).window
            assert text[-newest:] == [*range(text[-1] - newest + 1, text[-1] + 1)]


@pytest.mark.model
def test_prefixkv_drops_the_one_that_is_newest_no_more():
    """A text of 50 tokens with room for 30 keeps its first 6 and its last 24. What a layer holds
    follows from the mass of its prompt."""
    model = LLAMA.model()
    cache = adakv.Cache(
        model, "prefixkv", 40, decode_policy="prefixkv_text", decode_budget=30, every=1,
        pin_prompt=False,
    )  # fmt: skip
    ids = write(model, cache, torch.randint(3, VOCAB, (1, 70)), 1)
    of_prompt = cache.stats()["lengths"][:, 0]
    assert len(of_prompt.unique()) > 1
    assert of_prompt.float().mean() == 40
    write(model, cache, ids, 50)
    for layer in range(4):
        for row, kept in zip(cache.kept(layer)[0], of_prompt[layer], strict=True):
            assert [p for p in row.tolist() if p >= 70] == [*range(70, 76), *range(96, 120)]
            assert len(row) == kept + 30


@pytest.mark.model
def test_the_default_policy_has_its_prompt_and_another_its_text():
    model = LLAMA.model()
    with pytest.raises(ValueError, match=r"decode_budget: RankFusion needs all_queries, which"):
        adakv.Cache(model, budget=48, decode_budget=40)
    cache = adakv.Cache(model, budget=48, decode_policy="r_kv", decode_budget=16, every=4)
    write(model, cache, torch.randint(3, VOCAB, (1, 100)), 50)
    assert cache.stats()["lengths"].float().mean() <= 48 + 16 + 4


@pytest.mark.model
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decode_budget": 20}, "decode_budget must be at least 32, got 20"),
        ({"decode_budget": 40.5}, "decode_budget must be an integer, got 40.5"),
        ({"decode_budget": 40, "every": 0}, "every must be at least 1, got 0"),
        ({"every": 8}, "decode_budget must be given"),
        ({"decode_policy": "r_kv"}, "decode_budget must be given"),
        ({"decode_policy": "r_kvv", "decode_budget": 40}, "did you mean 'r_kv'"),
        (
            {"decode_policy": "kvzip", "decode_budget": 40},
            "decode_budget: RepeatAttention needs repeat",
        ),
        ({"decode_policy": "ada_expected", "decode_budget": 40}, "all_queries, rotate, which"),
        ({"decode_budget": 40, "pin_prompt": 1}, "pin_prompt must be True or False, got 1"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        adakv.Cache(LLAMA.model(), "ada_snapkv", 48, **settings)


def test_a_policy_says_how_often():
    policy = get("RKV(share=0.5) * Adaptive() * TopScore() * EveryTokens(every=4)")
    assert policy == Policy(
        adakv.policy.RKV(share=0.5),
        adakv.policy.Adaptive(),
        adakv.policy.TopScore(),
        adakv.policy.EveryTokens(4),
    )
    model = LLAMA.model()
    cache = adakv.Cache(model, policy, 48, decode_budget=16)
    write(model, cache, torch.randint(3, VOCAB, (1, 100)), 40)
    assert cache.stats()["lengths"].float().mean() <= 48 + 16 + 4


@pytest.mark.model
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8", "int4", "int2"])
def test_quantised_pages_are_evicted_from(kv_dtype: str):
    model = LLAMA.model().bfloat16()
    prompt = torch.randint(3, VOCAB, (2, 70))
    cache = adakv.Cache(model, "ada_snapkv", 48, decode_budget=40, every=8, kv_dtype=kv_dtype)
    write(model, cache, prompt, 80)
    assert cache.stats()["lengths"].float().mean() <= 48 + 40 + 8
    assert cache.seen == [149, 149]


@pytest.mark.model
@pytest.mark.parametrize(
    "policy",
    ["ada_snapkv", "r_kv", "h2o", "critical_ada_snapkv", "ahakv", "layer_defensive", "prefixkv"],
)
def test_a_batch_writes_what_each_prompt_gets_alone(policy: str):
    model = LLAMA.model()
    torch.manual_seed(2)
    prompts = [torch.randint(3, VOCAB, (n,)) for n in (70, 40, 90, 60)]
    settings: dict[str, Any] = {"policy": policy, "budget": 48, "decode_budget": 40, "every": 8}
    options = adakv.BatchOptions(max_batch=2, eos_token_id=[])
    counts = [90, 60, 100, 30]
    results = adakv.generate_batch(
        model, prompts, **settings, max_new_tokens=counts, options=options
    )
    for result, prompt, count in zip(results, prompts, counts, strict=True):
        cache = adakv.Cache(model, **settings)
        alone = write(model, cache, prompt[None], count)[0, len(prompt) :]
        assert result.tokens == alone.tolist()
        assert cache.stats()["lengths"].float().mean() <= 48 + 40 + 8


@pytest.mark.model
def test_texts_of_a_batch_take_no_more_pages_than_were_promised():
    model = LLAMA.model()
    prompts = [torch.randint(3, VOCAB, (60,)) for _ in range(6)]
    settings: dict[str, Any] = {"policy": "ada_snapkv", "budget": 48, "decode_budget": 40}
    stream = adakv.generate_stream(
        model,
        prompts,
        **settings,
        every=8,
        max_new_tokens=300,
        options=adakv.BatchOptions(eos_token_id=[], cache_bytes=1 << 20),
    )
    (kv,) = (x for x in gc.get_objects() if type(x) is KVCache and x.num_sequences == 6)
    pages = kv.num_pages
    assert sum(new.result is not None for new in stream) == 6
    assert kv.num_pages == pages
    assert kv.pages_used == 0


@pytest.mark.model
@pytest.mark.parametrize("pin_prompt", [True, False])
@pytest.mark.parametrize("policy", ["snapkv", "ada_snapkv", "layer_defensive"])
def test_rows_of_a_batch_have_room_for_every_tokens_after_each_choice(
    policy: str, pin_prompt: bool
):
    """More than all heads' budgets together: what a row holds before a choice says too little of
    what it may hold behind it."""
    model = LLAMA.model(num_hidden_layers=2)
    (result,) = adakv.generate_batch(
        model,
        [torch.randint(3, VOCAB, (60,))],
        policy=policy,
        budget=48,
        decode_budget=48,
        every=300,
        pin_prompt=pin_prompt,
        max_new_tokens=1000,
        options=adakv.BatchOptions(eos_token_id=[]),
    )
    assert len(result.tokens) == 1000


def read(model: Any, cache: Any, prompt: Tensor, size: int) -> list[int]:
    """Entries of the first layer after each chunk of so many tokens."""
    held = []
    with torch.no_grad(), adakv.attach(model):
        for chunk in prompt.split(size, 1):
            model(chunk, past_key_values=cache)
            held.append(int(cache.stats()["lengths"][0].sum()))
    return held


@pytest.mark.model
def test_a_chunk_budget_for_all_of_a_prompt_changes_nothing():
    model = LLAMA.model()
    prompt = torch.randint(3, VOCAB, (2, 130))
    cache = adakv.Cache(model, "ada_snapkv", 200, chunk_budget=200)
    read(model, cache, prompt[:, :129], 40)
    plain = write(model, adakv.Cache(model, "full"), prompt, 20)
    assert torch.equal(write(model, cache, prompt, 20), plain)


@pytest.mark.model
@pytest.mark.parametrize("policy", ["ada_snapkv", "critical_ada_snapkv", "r_kv", "streaming"])
def test_a_prompt_in_chunks_is_never_held_whole(policy: str):
    model = LLAMA.model(max_position_embeddings=2048)
    prompt = torch.randint(3, VOCAB, (1, 900))
    cache = adakv.Cache(model, policy, 48, chunk_budget=64, decode_budget=40, every=8)
    heads = 2
    held = read(model, cache, prompt[:, :899], 50)
    assert held == [heads * min(64, 50 * (i + 1)) for i in range(18)]
    assert cache.pages.num_pages < 4 * heads * (2 * (64 + 50) // 16 + 12)
    write(model, cache, prompt, 3)
    assert cache.stats()["lengths"].sum(-1).tolist() == [[heads * (48 + 2 + 1)]] * 4
    newest = get(policy).window
    assert set(range(899 - newest, 902)) <= {*cache.kept(0)[0][0].tolist()}


@pytest.mark.model
def test_padded_prompts_in_chunks_keep_what_each_keeps_alone():
    """With masks of the chunk's own columns."""
    model = LLAMA.model()
    prompt, padding = torch.randint(3, VOCAB, (3, 131)), (0, 17, 31)
    mask = torch.stack([torch.arange(131) >= n for n in padding]).long()
    widths = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("attention_mask") is not None:
            widths.append(kwargs["attention_mask"].shape[-1])

    def kept(cache: Any, ids: Tensor, mask: Tensor, size: int) -> list[list[list[int]]]:
        with torch.no_grad(), adakv.attach(model):
            for start in range(0, 130, size):
                part = slice(start, min(start + size, ids.shape[1] - 1))
                shown = mask[:, : part.stop]
                positions = (shown.cumsum(-1) - 1).clamp(min=0)[:, part]
                model(ids[:, part], attention_mask=shown, position_ids=positions,
                      past_key_values=cache)  # fmt: skip
            write(model, cache, ids, 3, mask)
        return [[row.tolist() for rows in cache.kept(i) for row in rows] for i in range(4)]

    hook = model.model.layers[0].self_attn.register_forward_pre_hook(look, with_kwargs=True)
    together = adakv.Cache(model, "ada_snapkv", 40, chunk_budget=48)
    rows = kept(together, prompt, mask, 40)
    hook.remove()
    assert max(widths[:4]) == 40
    for b, pad in enumerate(padding):
        alone = adakv.Cache(model, "ada_snapkv", 40, chunk_budget=48)
        with torch.no_grad(), adakv.attach(model):
            for start, end in ((0, 40), (40, 80), (80, 120), (120, 130)):
                if end > pad:
                    model(prompt[b : b + 1, max(start, pad) : end], past_key_values=alone)
        write(model, alone, prompt[b : b + 1, pad:], 3)
        assert alone.seen == [together.seen[b]]
        for layer in range(4):
            mine = [row.tolist() for row in alone.kept(layer)[0]]
            assert rows[layer][2 * b : 2 * b + 2] == mine


@pytest.mark.slow
@pytest.mark.model
def test_memory_is_flat_in_the_length_of_a_prompt_in_chunks():
    """With torch, transformers and the model; a prompt of 1,048,576 tokens takes as much."""
    script = Path(__file__).parents[2] / "benchmarks" / "long_prompt.py"
    told = subprocess.run(
        [sys.executable, str(script), "131072"], check=True, capture_output=True, text=True
    ).stdout
    assert float(told.split()[2]) < 1


@pytest.mark.model
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_budget": 20}, "chunk_budget must be at least 32, got 20"),
        ({"chunk_budget": 80, "chunked_prefill": True}, "chunk_budget must not be given with"),
        ({"chunk_budget": 80, "policy": "model_column_max"}, "chunk_budget: ColumnMax needs"),
        ({"chunk_budget": 80, "policy": "expected"}, "chunk_budget: ExpectedAttention needs"),
    ],
)
def test_wrong_chunk_budgets_are_named(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        adakv.Cache(LLAMA.model(), **{"policy": "ada_snapkv", "budget": 48, **settings})


@pytest.mark.model
@pytest.mark.parametrize("policy", ["ada_snapkv", "r_kv", "streaming"])
def test_what_is_protected_stays_through_chunks_and_texts(policy: str):
    model = LLAMA.model(max_position_embeddings=2048)
    prompt = torch.randint(3, VOCAB, (1, 400))
    spans = [(10, 20), (70, 75), (399, 410)]
    cache = adakv.Cache(
        model,
        policy,
        64,
        chunk_budget=70,
        protect=spans,
        decode_budget=40,
        every=8,
        pin_prompt=False,
    )
    read(model, cache, prompt[:, :399], 50)
    write(model, cache, prompt, 100)
    must = {*range(10, 20), *range(70, 75)}
    for layer in range(4):
        for row in cache.kept(layer)[0]:
            assert must <= {*row.tolist()}
    assert cache.stats()["lengths"].float().mean() <= 64 + 40 + 8
    crowded = adakv.Cache(model, policy, 64, chunk_budget=70, protect=[(100, 180)])
    with pytest.raises(ValueError, match=r"protect: sequence 0 has .* protected tokens.* chunk_bu"):
        read(model, crowded, prompt, 50)


@pytest.mark.slow
@pytest.mark.model
def test_memory_is_flat_in_the_length_of_a_text():
    model = LLAMA.model(num_hidden_layers=2, max_position_embeddings=32768)
    prompt = torch.randint(3, VOCAB, (1, 200))
    cache = adakv.Cache(model, "ada_snapkv", 100, decode_budget=512)
    ids, pages = prompt, []
    for _ in range(20):
        ids = write(model, cache, ids, 1000)
        pages.append((cache.pages.num_pages, cache.pages.max_row_pages))
        assert cache.stats()["lengths"].float().mean() <= 100 + 512 + 128
    assert ids.shape[1] == 20200
    assert len(set(pages[1:])) == 1


@pytest.mark.slow
@pytest.mark.model
def test_every_page_comes_back_after_a_thousand_texts():
    model = LLAMA.model(num_hidden_layers=2)
    counts = torch.randint(1, 120, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [torch.randint(3, VOCAB, (20 + 37 * i % 90,)) for i in range(1000)]
    stream = adakv.generate_stream(
        model,
        prompts,
        policy="ada_snapkv",
        budget=40,
        decode_policy="r_kv",
        decode_budget=16,
        every=8,
        max_new_tokens=counts,
        options=adakv.BatchOptions(eos_token_id=[], max_batch=16),
    )
    (kv,) = (x for x in gc.get_objects() if type(x) is KVCache and x.num_sequences == 16)
    pages = kv.num_pages
    written = [len(new.result.tokens) for new in stream if new.result is not None]
    assert sorted(written) == sorted(counts)
    assert (kv.num_pages, kv.pages_used) == (pages, 0)
