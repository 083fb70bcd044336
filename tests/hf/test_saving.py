"""Caches in files: what is read goes on like what was written; anything else is refused."""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

import adakv
from adakv.formats import has_tails
from hf.families import FAMILIES, HYBRIDS, LLAMA
from hf.forwards import ids, logits


@pytest.mark.parametrize("page_size", [8, 64])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8", "int4", "int2"])
def test_what_is_read_goes_on_like_what_was_written(
    kv_dtype: str, page_size: int, tmp_path: Path, device: torch.device
) -> None:
    model, path = LLAMA.model().to(device), tmp_path / "doc.safetensors"
    prompt, steps = ids(90, batch=2).to(device), ids(60, batch=2).to(device)
    model = model if kv_dtype == "auto" else model.bfloat16()
    size = None if has_tails(kv_dtype) else page_size
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40, kv_dtype=kv_dtype)
        logits(model, prompt, cache)
        logits(model, steps[:, :20], cache)
        cache.save(path)
        loaded = adakv.Cache.load(model, path, page_size=size, max_new_tokens=10)
        assert loaded.seen == cache.seen == [110, 110]
        assert torch.equal(loaded.stats()["lengths"], cache.stats()["lengths"])
        for layer in range(4):
            for mine, others in zip(loaded.kept(layer), cache.kept(layer), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))
        for i in range(20, 60):
            both = [logits(model, steps[:, i : i + 1], each) for each in (cache, loaded)]
            torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4 if kv_dtype == "auto" else 0.05)
        loaded.fork() if has_tails(kv_dtype) else loaded.crop(-5)
        again = tmp_path / "again.safetensors"
        cache.save(again)
        loaded.reset()
        assert logits(model, prompt, loaded).shape[1] == 90
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["again.safetensors", path.name]


def test_padding_and_windows_are_in_the_file(tmp_path: Path) -> None:
    family = next(f for f in FAMILIES if f.prefix == "Gemma3")
    model, prompt, path = family.model(), ids(40, batch=2), tmp_path / "doc.safetensors"
    mask = torch.ones_like(prompt)
    mask[0, :9] = 0
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=36)
        logits(model, prompt, cache, attention_mask=mask)
        cache.save(path)
        loaded = adakv.Cache.load(model, path)
        tokens = ids(30, batch=2)
        for i in range(30):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            both = [
                logits(model, tokens[:, i : i + 1], each, attention_mask=mask)
                for each in (cache, loaded)
            ]
            torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)
        assert loaded.seen == [61, 70]


def test_files_are_for_the_model_that_they_were_made_for(tmp_path: Path) -> None:
    model, path = LLAMA.model(), tmp_path / "doc.safetensors"
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40)
        with pytest.raises(adakv.Error, match="holds nothing"):
            cache.save(path)
        logits(model, ids(60), cache)
        cache.save(path)
    other = LLAMA.model(num_hidden_layers=2)
    with pytest.raises(ValueError, match="another model"):
        adakv.Cache.load(other, path)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="other weights"):
        adakv.Cache.load(model, path)
    hybrid = HYBRIDS[0].model()
    with adakv.attach(hybrid):
        cache = adakv.Cache(hybrid, budget=40)
        logits(hybrid, ids(60), cache)
        with pytest.raises(ValueError, match="states"):
            cache.save(path)
    with pytest.raises(OSError):
        adakv.Cache.load(model, tmp_path / "none")


@pytest.fixture
def saved(tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    model, path = LLAMA.model(), tmp_path / "doc.safetensors"
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=36, page_size=8)
        logits(model, ids(50), cache)
    cache.save(path)
    return model, path


def test_altered_and_cut_files_are_refused(saved: tuple[PreTrainedModel, Path]) -> None:
    model, path = saved
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(0)
    places = [chance.randrange(header) for _ in range(150)]
    places += [chance.randrange(len(whole)) for _ in range(150)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises((adakv.Error, ValueError)):
            adakv.Cache.load(model, path)
    for _ in range(40):
        path.write_bytes(whole[: chance.randrange(len(whole))])
        with pytest.raises((adakv.Error, ValueError)):
            adakv.Cache.load(model, path)
    path.write_bytes(whole + b"more")
    with pytest.raises(adakv.Error):
        adakv.Cache.load(model, path)


def changed(path: Path, **about: Any) -> None:
    """Rewrites a file with another description, and with checksums that fit."""
    with safe_open(str(path), framework="pt") as file:
        known = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors.update(about.pop("tensors", {}))
    known.update({key: x if isinstance(x, str) else json.dumps(x) for key, x in about.items()})
    tensors["checksums"] = torch.zeros(len(tensors), dtype=torch.int32)
    save_file(tensors, path, known)
    correct_sums(path)


def correct_sums(path: Path) -> None:
    """Writes the CRC-32 of the head, and of each tensor as it lies in the file."""
    data = bytearray(path.read_bytes())
    size = 8 + int.from_bytes(data[:8], "little")
    head = json.loads(data[8:size])
    head.pop("__metadata__")
    begin, _ = head.pop("checksums")["data_offsets"]
    places = sorted(x["data_offsets"] for x in head.values())
    parts = [data[:size], *(data[size + a : size + b] for a, b in places)]
    sums = b"".join(zlib.crc32(part).to_bytes(4, "little") for part in parts)
    data[size + begin : size + begin + len(sums)] = sums
    path.write_bytes(data)


@pytest.mark.parametrize(
    "about",
    [
        {"kind": "another"},
        {"version": "1"},
        {"shape": [4, 1, 2, 1 << 30]},
        {"shape": [4, 1 << 30, 2, 16]},
        {"shape": [4, 1, 2]},
        {"shape": "[" * 100000},
        {"seen": [1 << 40]},
        {"seen": [3]},
        {"seen": [True]},
        {"columns": -1},
        {"columns": 1.5},
        {"dtype": "int64"},
        {"dtype": "nn"},
        {"kv_dtype": "int8"},
        {"kv_dtype": "int2"},
        {"prompt_lens": []},
        {"budget": {"budget": 40, "ratio": 1}},
        {"budget": {"model": 3}},
        {"budget": {"budget": "40"}},
        {"policy": "__import__('os').system('true') * TopScore() * 3"},
        {"tensors": {"lengths": torch.full((4, 1, 2), 1 << 30, dtype=torch.int32)}},
        {"tensors": {"lengths": torch.full((4, 1, 2), -1, dtype=torch.int32)}},
        {"tensors": {"layers.9.keys": torch.zeros(3)}},
        {"tensors": {"shown": torch.zeros(1, 400, dtype=torch.uint8)}},
    ],
    ids=str,
)
def test_hostile_files_are_refused(saved: tuple[PreTrainedModel, Path], about: Any) -> None:
    model, path = saved
    adakv.Cache.load(model, path)
    changed(path, **about)
    with pytest.raises((adakv.Error, ValueError)):
        adakv.Cache.load(model, path)


def test_positions_of_hostile_files_are_refused(saved: tuple[PreTrainedModel, Path]) -> None:
    model, path = saved
    with safe_open(str(path), framework="pt") as file:
        right = file.get_tensor("layers.1.positions")
    for wrong in (right.flip(0), right + 1000, right - 10):
        changed(path, tensors={"layers.1.positions": wrong.contiguous()})
        with pytest.raises(adakv.Error, match="positions"):
            adakv.Cache.load(model, path)
    changed(path, tensors={"layers.1.positions": right})
    adakv.Cache.load(model, path)


def test_scores_of_hostile_files_are_refused(saved: tuple[PreTrainedModel, Path]) -> None:
    """All layers have some that fit, or none has."""
    model, path = saved
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=36, keep_scores=True)
        logits(model, ids(50), cache)
    cache.save(path)
    with safe_open(str(path), framework="pt") as file:
        right = file.get_tensor("scores.0")
    nan = right.clone()
    nan[3] = torch.nan
    for wrong in (right[:-1], right.double(), right[None], nan):
        changed(path, tensors={"scores.0": wrong.contiguous()})
        with pytest.raises(adakv.Error, match="scores"):
            adakv.Cache.load(model, path)
    changed(path, tensors={"scores.0": right})
    adakv.Cache.load(model, path)
    changed(path, tensors={"scores.4": right})
    with pytest.raises(adakv.Error, match="tensors"):
        adakv.Cache.load(model, path)
