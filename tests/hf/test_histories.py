"""Random lives of caches beside plain lists of what they ought to hold: read, append, fork,
reorder, crop, shrink, save and load, drop.

What they hold is compared bit by bit after every deed, in all of them, as a fork must not see what
becomes of another. In the end all pages are free.
"""

from __future__ import annotations

import gc
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import adakv
from adakv.cache import KVCache, sequences
from adakv.entries import Held
from adakv.hf.attachment import CACHE
from hf.families import LLAMA, VOCAB

LAYERS, HEADS, WINDOW = 4, 2, 8
POLICY = f"WindowAttention(window={WINDOW}) * Uniform() * TopScore()"
DEEDS = ["read", "fork", "drop", "reorder", "crop", "crop", "shrink", "file", *["append"] * 4]


@dataclass
class Entry:
    position: int
    score: float  # of what the prompt's window made of it; +inf for the window
    numbers: Tensor  # [2, D]: key and value


@dataclass
class Text:
    """A sequence."""

    seen: int
    prompt: int
    rows: list[list[Entry]]  # [L * Hkv]

    def copy(self) -> Text:
        return replace(self, rows=[list(row) for row in self.rows])


def stored(cache: Any) -> list[list[tuple[list[int], Tensor]]]:
    """Positions and numbers ``[n, 2, D]`` of the entries that pages hold: ``[B][L * Hkv]``."""
    kv, texts = cache.pages, [[] for _ in cache.seen]
    for layer in kv.layers:
        view = sequences(layer, slice(None))
        lengths = view.lengths.tolist()
        held = Held(view, max(map(max, [[1], *lengths])), kv.dtype)
        both, positions = torch.stack([held.keys, held.values], 3), held.positions.tolist()
        for b, text in enumerate(texts):
            for h, length in enumerate(lengths[b]):
                text.append((positions[b][h][:length], both[b, h, :length]))
    return texts


class Life:
    """Caches and what they ought to hold."""

    def __init__(self, seed: int, model: PreTrainedModel, kv_dtype: str, folder: Path) -> None:
        self.chance, self.model, self.kv_dtype = random.Random(seed), model, kv_dtype
        self.path = folder / "cache.safetensors"
        self.caches: list[tuple[Any, list[Text]]] = []
        self.deeds: list[str] = []

    def run(self, num_deeds: int) -> None:
        for _ in range(num_deeds):
            deed = self.chance.choice(DEEDS) if self.caches else "read"
            self.deeds.append(deed)
            getattr(self, deed)()
            for cache, texts in self.caches:
                self.check(cache, texts)
        if self.kv_dtype == "auto":
            for cache, texts in self.caches:
                self.check_next_token(cache, texts)
        pools: list[KVCache] = [cache.pages for cache, _ in self.caches]
        self.caches.clear()
        for kv in pools:
            for b in range(kv.num_sequences):
                kv.remove(b)
        if any(kv.pages_used for kv in pools):
            gc.collect()  # of those dropped: a cache and its layers know each other
        assert all(kv.pages_used == 0 and kv.num_free == kv.num_pages for kv in pools)

    def check(self, cache: Any, texts: list[Text]) -> None:
        assert cache.seen == [text.seen for text in texts], self.deeds
        for text, rows in zip(texts, stored(cache), strict=True):
            for expected, (positions, numbers) in zip(text.rows, rows, strict=True):
                assert positions == [x.position for x in expected], self.deeds
                assert torch.equal(numbers, torch.stack([x.numbers for x in expected])), self.deeds

    def check_next_token(self, cache: Any, texts: list[Text]) -> None:
        """It attends to what the lists hold, and to nothing else."""
        given: list[Any] = [
            [
                [[make(text.rows[layer * HEADS + h]) for h in range(HEADS)] for text in texts]
                for layer in range(LAYERS)
            ]
            for make in (
                lambda row: torch.stack([x.numbers[0] for x in row]),
                lambda row: torch.stack([x.numbers[1] for x in row]),
                lambda row: torch.tensor([x.position for x in row]),
            )
        ]
        seen, page_size = [text.seen for text in texts], cache.pages.page_size
        made = adakv.Cache.from_entries(self.model, *given, seen, page_size=page_size)
        tokens = self.tokens(len(texts), 1)
        assert torch.equal(self.logits(tokens, made), self.logits(tokens, cache)), self.deeds

    def tokens(self, batch: int, length: int) -> Tensor:
        return torch.tensor(
            [[self.chance.randrange(3, VOCAB) for _ in range(length)] for _ in range(batch)]
        )

    def logits(self, tokens: Tensor, cache: Any) -> Tensor:
        with torch.no_grad():
            out: Tensor = self.model(tokens, **{CACHE: cache}, use_cache=True).logits
        return out

    def any(self) -> tuple[Any, list[Text]]:
        return self.chance.choice(self.caches)

    def read(self) -> None:
        if len(self.caches) == 4:
            return
        batch, length = self.chance.randint(1, 3), self.chance.randint(WINDOW + 1, 60)
        budget, page_size = self.chance.randint(WINDOW + 1, 50), self.chance.choice([8, 16, 32])
        cache = adakv.Cache(
            self.model,
            POLICY,
            budget=budget,
            page_size=None if self.kv_dtype == "int4" else page_size,
            kv_dtype=self.kv_dtype,
            keep_scores=True,
            max_new_tokens=self.chance.randint(1, 40),
        )
        self.logits(self.tokens(batch, length), cache)
        texts = []
        for b, rows in enumerate(stored(cache)):
            assert all(len(positions) == min(budget, length) for positions, _ in rows)
            scores = [x[b, h].tolist() for x in cache.kept_scores for h in range(HEADS)]
            texts.append(
                Text(
                    length,
                    length,
                    [
                        list(map(Entry, row[0], of_row, row[1].clone()))
                        for row, of_row in zip(rows, scores, strict=True)
                    ],
                )
            )
        self.caches.append((cache, texts))

    def append(self) -> None:
        cache, texts = self.any()
        count = self.chance.choice([1, 1, 1, 2, 7, 20])
        self.logits(self.tokens(len(texts), count), cache)
        for text, rows in zip(texts, stored(cache), strict=True):
            new = range(text.seen, text.seen + count)
            for row, (positions, numbers) in zip(text.rows, rows, strict=True):
                assert positions[-count:] == [*new]
                newest = numbers[-count:].clone()
                row += [Entry(at, float("inf"), x) for at, x in zip(new, newest, strict=True)]
            text.seen += count

    def fork(self) -> None:
        cache, texts = self.any()
        for made in cache.fork(self.chance.randint(1, 2)):
            if len(self.caches) < 4:
                self.caches.append((made, [text.copy() for text in texts]))

    def drop(self) -> None:
        if len(self.caches) > 1:
            self.caches.pop(self.chance.randrange(len(self.caches)))

    def reorder(self) -> None:
        cache, texts = self.any()
        sources = [self.chance.randrange(len(texts)) for _ in range(self.chance.randint(1, 3))]
        cache.batch_select_indices(torch.tensor(sources))
        texts[:] = [texts[b].copy() for b in sources]

    def crop(self) -> None:
        cache, texts = self.any()
        count = self.chance.randint(1, 12)
        is_held = all(
            count < text.seen
            and [x.position for x in row[-count:]] == [*range(text.seen - count, text.seen)]
            for text in texts
            for row in text.rows
        )
        if not is_held:
            with pytest.raises(ValueError, match="can't be taken back"):
                cache.crop(-count)
            return
        cache.crop(-count)
        for text in texts:
            text.seen -= count
            text.prompt = min(text.prompt, text.seen)
            text.rows = [row[:-count] for row in text.rows]

    def shrink(self) -> None:
        """The best entries of what is left of the prompt stay, the newest ones in any case, and all
        that came behind it."""
        cache, texts = self.any()
        budget = self.chance.randint(WINDOW + 1, 40)
        cache.shrink(budget=budget)
        for text in texts:
            for i, row in enumerate(text.rows):
                of_prompt = [j for j, x in enumerate(row) if x.position < text.prompt]

                def rank(j: int, row: list[Entry] = row) -> tuple[float, int]:
                    return (float("-inf") if j >= len(row) - WINDOW else -row[j].score), j

                best = set(sorted(of_prompt, key=rank)[:budget])
                text.rows[i] = [
                    x for j, x in enumerate(row) if j in best or x.position >= text.prompt
                ]

    def file(self) -> None:
        cache, texts = self.any()
        cache.save(self.path)
        place = next(i for i, (x, _) in enumerate(self.caches) if x is cache)
        page_size = self.chance.choice([None, 8, 32])
        loaded = adakv.Cache.load(self.model, self.path, page_size=page_size)
        self.caches[place] = loaded, texts


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_lives(kv_dtype: str, tmp_path: Path) -> None:
    live(range(8), kv_dtype, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8"])
def test_a_thousand_lives(kv_dtype: str, tmp_path: Path) -> None:
    count = 600 if kv_dtype == "auto" else 200
    live(range(100, 100 + count), kv_dtype, tmp_path)


def live(seeds: range, kv_dtype: str, folder: Path) -> None:
    model = LLAMA.model() if kv_dtype == "auto" else LLAMA.model().bfloat16()
    with adakv.attach(model):
        for seed in seeds:
            Life(seed, model, kv_dtype, folder).run(16)
