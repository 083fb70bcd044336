"""Sequences of a batch that wait in other memory for pages: their texts are the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import adakv
from hf.families import LLAMA, V4, VOCAB
from hf.test_images_in_batches import shown, small, words

pytestmark = pytest.mark.model

LENGTHS, NEW = (70, 40, 100, 33), (260, 150, 200, 240)


def written(
    model: Any, park: str | None, pages: int, prompts: Sequence[Any] = (), **settings: Any
) -> tuple[list[list[int]], set[int], int]:
    """The texts, the prompts that waited between two of their tokens, and how many ran at most."""
    torch.manual_seed(3)
    prompts = prompts or [torch.randint(3, VOCAB, (length,)) for length in LENGTHS]
    chances = {"temperature": settings.pop("temperature", 0.0), "seed": 7}
    stream = adakv.generate_stream(
        model,
        prompts,
        max_new_tokens=NEW[: len(prompts)],
        options=adakv.BatchOptions(eos_token_id=(), cache_bytes=pages, park=park, **chances),
        **settings,
    )
    texts: list[list[int]] = [[] for _ in prompts]
    # Tokens of the others since the last one of each: one a step, and another of who joins.
    since: dict[int, Counter[int]] = {}
    waited, most = set(), 0
    for new in stream:
        if any(count > 2 for count in since.get(new.index, Counter()).values()):
            waited.add(new.index)
        for counts in since.values():
            counts[new.index] += 1
        since[new.index] = Counter()
        texts[new.index].append(new.token)
        if new.result is not None:
            del since[new.index]
        most = max(most, len(since))
    return texts, waited, most


@pytest.mark.parametrize(
    "settings",
    [
        {"budget": 40},
        {"budget": 40, "temperature": 0.8},
        {"policy": "ada_snapkv", "ratio": 0.5},
        {"policy": "full"},
    ],
    ids=str,
)
def test_texts_are_the_same_with_parking(settings: dict[str, Any], device: torch.device) -> None:
    model = LLAMA.model(num_hidden_layers=2).to(device)
    page_bytes = 16 * (2 * 16 * 4 + 4)
    expected, none, few = written(model, None, 176 * page_bytes, **settings)
    texts, waited, most = written(model, "cpu", 176 * page_bytes, **settings)
    assert texts == expected
    assert [len(text) for text in texts] == list(NEW)
    assert not none and waited and most >= few


@pytest.mark.parametrize("kv_dtype", ["int8", "int4", "int2"])
def test_quantised_texts_are_the_same_with_parking(kv_dtype: str, device: torch.device) -> None:
    model = LLAMA.model(num_hidden_layers=2).bfloat16().to(device)
    expected, _, _ = written(model, None, 400_000, budget=40, kv_dtype=kv_dtype)
    texts, waited, _ = written(model, "cpu", 90_000, budget=40, kv_dtype=kv_dtype)
    assert texts == expected and waited


@pytest.mark.skipif(V4, reason="one version is enough")
@pytest.mark.parametrize("name", ["Qwen2VL", "PaliGemma"])
def test_texts_about_images_are_the_same_with_parking(name: str) -> None:
    """What waits keeps its place behind the image: RoPE of three positions, tokens of two types."""
    model = small(name)
    prompts = [words(50), shown(name, 67, 3, 1), shown(name, 66, 20, 2)]
    page_bytes = 16 * (2 * 16 * 4 + 4)
    for policy in ("ada_snapkv", "csp"):
        settings = {"policy": policy, "budget": 40}
        expected, none, _ = written(model, None, 1000 * page_bytes, prompts, **settings)
        texts, waited, _ = written(model, "cpu", 200 * page_bytes, prompts, **settings)
        assert texts == expected
        assert not none and waited & {1, 2}


def test_parking_is_refused_where_it_can_not_be() -> None:
    model = LLAMA.model(num_hidden_layers=2)
    options = adakv.BatchOptions(park="cpu")
    with pytest.raises(ValueError, match=r"park must not be given with prefix"):
        adakv.generate_batch(model, [[3, 4]], budget=36, prefix=[5] * 50, options=options)
    with pytest.raises(ValueError, match=r"park must not be given with decode_budget"):
        both = {"budget": 36, "decode_budget": 36}
        adakv.generate_batch(model, [[3, 4]], policy="ada_snapkv", options=options, **both)
    with pytest.raises(ValueError, match="park must be cpu or cuda, got 'nowhere'"):
        adakv.BatchOptions(park="nowhere")
    with pytest.raises(adakv.Error, match="can never fit"):
        tight = adakv.BatchOptions(park="cpu", cache_bytes=50_000)
        adakv.generate_batch(model, [[3, 4]], budget=36, max_new_tokens=300, options=tight)
