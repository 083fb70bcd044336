"""Caches whose policies fold: what pages hold, and that everything carries it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import adakv
import folded
import reference
from adakv.policy import Folded, Policy, get
from hf.families import LLAMA
from hf.forwards import logits
from hf.test_hf import captured, prompts
from hf.test_model_wide import held

pytestmark = pytest.mark.model

PADDING = (0, 33, 110)  # of 150 tokens; the last prompt fits into the budget
RULE = Folded(cosine=0.0)  # random keys are less alike than those of texts
PRESETS = ("ada_snapkv", "model_rank_fusion", "kvzip", "layer_defensive", "h2o")


def folding(preset: str, rule: Folded | None = RULE) -> Policy:
    chosen = get(preset)
    return Policy(chosen.scorer, chosen.allocator, chosen.selector, fold=rule)


def read(
    policy: Policy, *, padding: tuple[int, ...] = PADDING, size: int = 150, **settings: Any
) -> adakv.Cache:
    """A cache of prompts of 150 columns that come ``size`` at a time."""
    model, batch = LLAMA.model(), prompts(150, padding)
    ids, shown = batch["input_ids"], batch["attention_mask"]
    with adakv.attach(model):
        cache = adakv.Cache(model, policy, budget=44, chunked_prefill=size < 150, **settings)
        for start in range(0, 150, size):
            mask = shown[:, : start + size]
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:]
            logits(model, ids[:, start : start + size], cache, attention_mask=mask,
                   position_ids=positions)  # fmt: skip
        if "repeat" in policy.needs:
            cache.repeat(ids)
        if size < 150:
            mask = torch.cat([shown, shown[:, -1:]], 1)
            logits(model, ids[:, -1:], cache, attention_mask=mask,
                   position_ids=mask.sum(-1, keepdim=True) - 1)  # fmt: skip
    return cache


def entries(cache: adakv.Cache, layer: int, b: int, h: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values ``[2, n, D]`` of a row, their biases and positions ``[n]``."""
    kv: Any = cache.pages
    view = kv.layer(layer)
    return (
        torch.stack(reference.row_of(view, b, h)),
        reference.biases_of(view, b, h),
        kv.positions(layer)[b][h].long(),
    )


@pytest.mark.parametrize("preset", ["ada_snapkv", "model_rank_fusion"])
@pytest.mark.parametrize("size", [150, 40], ids=["whole", "chunks"])
def test_pages_hold_what_the_definition_folds(preset: str, size: int) -> None:
    """Each prompt by itself: its window's attention, its keys' mean, its kept entries."""
    cache = read(folding(preset), size=size)
    plain = read(folding(preset, None), size=size)
    assert held(cache) == held(plain)
    model, batch = LLAMA.model(), prompts(150, PADDING)
    with torch.no_grad(), captured(model) as calls:
        model(**batch, past_key_values=DynamicCache(config=model.config))
    num_folded = 0
    for layer, call in enumerate(calls):
        queries, keys, values = call["query"], call["key"], call["value"]
        for b, padding in enumerate(PADDING):
            for h in range(keys.shape[1]):
                group = queries.shape[1] // keys.shape[1]
                q = queries[b, h * group : (h + 1) * group, padding:].double()
                k, v = keys[b, h, padding:].double(), values[b, h, padding:].double()
                (_, actual), biases, positions = entries(cache, layer, b, h)
                row = [p for p in positions.tolist() if p < len(k)]
                masses = window_masses(q, k, RULE.window)
                if len(k) <= 44:
                    new, bias = v[row], torch.zeros(len(row)).double()
                else:
                    new, bias = folded.fold(k, v, masses, row, RULE.cosine)
                torch.testing.assert_close(actual[: len(row)], new, rtol=1e-4, atol=1e-4)
                assert torch.allclose(biases[: len(row)].double(), bias, rtol=1e-3, atol=1e-3)
                num_folded += int((bias > 0).sum())
    assert num_folded > 50


def window_masses(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """``[T]``: attention from the last queries ``[G, T, D]``, the mean over those that see one."""
    length = len(keys)
    z = queries[:, -window:] @ keys.mT / keys.shape[1] ** 0.5
    hidden = torch.ones(z.shape[1], length, dtype=torch.bool).triu(length - z.shape[1] + 1)
    p = z.masked_fill(hidden, -torch.inf).softmax(-1).mean(0)
    return p.sum(0) / (~hidden).sum(0)


@pytest.mark.parametrize("preset", PRESETS)
def test_folding_keeps_the_same_entries_and_numbers_are_exact(preset: str) -> None:
    padding = (0, 0) if preset == "kvzip" else PADDING
    cache, plain = (read(folding(preset, rule), padding=padding) for rule in (RULE, None))
    assert held(cache) == held(plain)
    kv, other = cache.pages, plain.pages
    assert kv is not None and other is not None
    assert kv.pages_used == other.pages_used
    assert kv.page_bytes == other.page_bytes + 2 * kv.page_size
    assert cache.stats()["bytes"] == plain.stats()["bytes"] + 2 * kv.page_size * kv.pages_used


def test_values_alone_take_no_memory_and_any_format() -> None:
    rule = Folded(cosine=0.0, biases=False)
    cache, plain = (read(folding("ada_snapkv", rule)) for rule in (rule, None))
    assert cache.stats()["bytes"] == plain.stats()["bytes"]
    both = read(folding("ada_snapkv"))
    for h in range(2):
        assert torch.equal(entries(cache, 0, 0, h)[0], entries(both, 0, 0, h)[0])
        assert not torch.equal(entries(cache, 0, 0, h)[0], entries(plain, 0, 0, h)[0])


def written(cache: adakv.Cache) -> Tensor:
    """Logits of three steps behind what a cache holds, which it then holds, too."""
    model: Any = cache.model
    with adakv.attach(model):
        steps = torch.full((len(cache.seen), 3), 7)
        return torch.cat([logits(model, step, cache) for step in steps.split(1, 1)], 1)


def test_files_forks_and_moves_carry_biases(tmp_path: Path) -> None:
    cache = read(folding("ada_snapkv"), padding=(0, 0))
    cache.save(tmp_path / "cache")
    loaded = adakv.Cache.load(cache.model, tmp_path / "cache")
    assert loaded.budget.policy == cache.budget.policy
    fork, moved = cache.fork(2)
    moved.move_to("cpu")
    before = [entries(cache, layer, b, h) for layer in (0, 1) for b in (0, 1) for h in (0, 1)]
    assert any(bool(biases.any()) for _, biases, _ in before)
    expected = written(cache)
    for other in (loaded, fork, moved):
        torch.testing.assert_close(written(other), expected, rtol=1e-4, atol=1e-4)
    cache.crop(-3)
    after = [entries(cache, layer, b, h) for layer in (0, 1) for b in (0, 1) for h in (0, 1)]
    for a, e in zip(after, before, strict=True):
        assert all(map(torch.equal, a, e))


def test_a_file_with_altered_biases_is_refused(tmp_path: Path) -> None:
    read(folding("ada_snapkv"), padding=(0, 0)).save(tmp_path / "cache")
    data = bytearray((tmp_path / "cache").read_bytes())
    size = 8 + int.from_bytes(data[:8], "little")  # of the head
    about = json.loads(data[8:size])["layers.0.biases"]
    assert about["dtype"] == "F16"
    data[size + about["data_offsets"][0]] ^= 1
    (tmp_path / "other").write_bytes(data)
    with pytest.raises(adakv.Error, match="biases was altered"):
        adakv.Cache.load(LLAMA.model(), tmp_path / "other")


def test_a_smaller_cache_keeps_the_biases_of_what_stays() -> None:
    cache = read(folding("ada_snapkv"), padding=(0, 0), keep_scores=True)
    before = {
        (b, h): dict(zip(p.tolist(), bias.tolist(), strict=True))
        for b in (0, 1)
        for h in (0, 1)
        for _, bias, p in [entries(cache, 0, b, h)]
    }
    cache.shrink(budget=38)
    for (b, h), had in before.items():
        _, biases, positions = entries(cache, 0, b, h)
        assert len(positions) < len(had) or sum(map(len, before.values())) > 4 * 38
        assert biases.tolist() == [had[p] for p in positions.tolist()]


def test_a_second_turn_has_no_biases() -> None:
    cache = read(folding("ada_snapkv"), padding=(0,))
    model: Any = cache.model
    with adakv.attach(model):
        logits(model, torch.arange(5, 25)[None], cache)
    for h in range(2):
        _, biases, positions = entries(cache, 0, 0, h)
        assert not biases[positions >= 150].any() and bool(biases.any())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_dtype": "int8"}, "kv_dtype: pages of int8 have no biases of entries"),
        ({"decode_budget": 40}, "decode_budget: Folded"),
        ({"chunk_budget": 60}, "chunk_budget: Folded"),
        ({"read": "Quest(share=0.25)"}, "read: it chooses pages by their keys alone"),
    ],
)
def test_what_folding_does_not_go_with(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adakv.Cache(LLAMA.model(), folding("ada_snapkv"), budget=44, **settings)
