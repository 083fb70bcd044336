"""Caches of quantised pages under transformers: nearly the full cache's logits, in half of the
bytes, and everything that plain pages do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import adakv
import codes
from adakv.formats import has_tails
from hf.families import LLAMA, VOCAB
from hf.test_hf import GREEDY, prompts
from hf.test_model_wide import held

pytestmark = pytest.mark.model

FORMATS = pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        *((torch.bfloat16, kind) for kind in ("int8", "fp8", "int4", "int2")),
        *((torch.float16, kind) for kind in ("int8", "int4")),
    ],
    ids=str,
)
PADDING = (0, 33, 100)  # of 150 tokens


def llama(dtype: torch.dtype) -> Any:
    return LLAMA.model().to(dtype)


def logits(model: Any, cache: Any, steps: int = 20) -> Tensor:
    """Logits of each of a few tokens after the prompts, ``[steps, B, V]`` float32."""
    torch.manual_seed(1)
    batch, out = prompts(150, PADDING), []
    mask = batch["attention_mask"]
    with torch.no_grad(), adakv.attach(model):
        model(**batch, past_key_values=cache)
        for _ in range(steps):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            token = torch.randint(3, VOCAB, (len(PADDING), 1))
            position = mask.sum(1, keepdim=True) - 1
            given = {"attention_mask": mask, "position_ids": position}
            out.append(model(token, past_key_values=cache, **given).logits[:, -1].float())
    return torch.stack(out)


def divergence(of: Tensor, from_: Tensor) -> float:
    """The mean KL of next tokens."""
    p, q = from_.log_softmax(-1), of.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


class RoundTrip(DynamicCache):
    """A full cache that holds what codes say of its entries; prompts are read before that."""

    def __init__(self, model: Any, kv_dtype: str) -> None:
        super().__init__(config=model.config)
        self.kv_dtype = kv_dtype

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **more: Any
    ) -> Any:
        new = (key_states, value_states)
        if has_tails(self.kv_dtype):
            held = super().update(*new, layer_idx, *args, **more)
            held = pages_read_back(*held, self.kv_dtype)
        else:
            held = super().update(*map(self._read_back, new), layer_idx, *args, **more)
        return held if key_states.shape[2] == 1 else new

    def _read_back(self, x: Tensor) -> Tensor:
        return codes.dequantise(*codes.quantise(x, self.kv_dtype)).to(x.dtype)


def pages_read_back(keys: Tensor, values: Tensor, kv_dtype: str) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, Hkv, T, D]`` behind the padding as int4 or int2 pages of 32 have them,
    but the last one, full or not."""
    keys, values = keys.clone(), values.clone()
    for b, start in enumerate(PADDING):
        for page in range(start, keys.shape[2] - 32, 32):
            for h in range(keys.shape[1]):
                at = b, h, slice(page, page + 32)
                read = codes.dequantise_page(*codes.quantise_page(keys[at], values[at], kv_dtype))
                keys[at], values[at] = read.to(keys.dtype)
    return keys, values


@FORMATS
def test_with_room_for_everything_it_is_a_full_cache_of_codes(
    dtype: torch.dtype, kv_dtype: str
) -> None:
    model = llama(dtype)
    full = logits(model, DynamicCache(config=model.config))
    rounded = logits(model, RoundTrip(model, kv_dtype))
    cache = adakv.Cache(model, budget=500, kv_dtype=kv_dtype)
    got = logits(model, cache)
    plain = logits(model, adakv.Cache(model, budget=500))
    flipped = divergence(rounded, full) / 50 if has_tails(kv_dtype) else 0  # codes, by rounding
    assert divergence(got, rounded) < 3 * divergence(plain, full) + flipped
    assert divergence(got, full) < {"int8": 0.02, "fp8": 0.5, "int4": 1, "int2": 4}[kv_dtype]
    assert cache.pages is not None and cache.pages.kv_dtype == kv_dtype


@pytest.mark.parametrize(("kv_dtype", "numbers"), [("auto", 0), ("int8", 2), ("fp8", 1)])
def test_bytes_are_those_of_the_pages(kv_dtype: str, numbers: int) -> None:
    model = llama(torch.bfloat16)
    cache = adakv.Cache(model, budget=40, kv_dtype=kv_dtype)
    logits(model, cache)
    stats, kv = cache.stats(), cache.pages
    assert kv is not None
    groups = -(-kv.head_dim // 64)
    entry = 2 * (kv.head_dim * (2 if kv_dtype == "auto" else 1) + groups * numbers * 2) + 4
    page_size = 16 if kv_dtype == "auto" else 32
    assert kv.page_bytes == page_size * entry
    assert stats["bytes"] == stats["pages_used"] * page_size * entry
    layer = kv.layer(0)
    parts = (layer.pages, layer.page_positions, layer.key_scales, layer.value_scales)
    assert kv.num_pages * kv.page_bytes == sum(x.nbytes for x in parts if x is not None)


@pytest.mark.parametrize(("kv_dtype", "bits", "group"), [("int4", 4, 64), ("int2", 2, 32)])
def test_bytes_have_the_tails(kv_dtype: str, bits: int, group: int) -> None:
    model = llama(torch.bfloat16)
    cache = adakv.Cache(model, budget=40, kv_dtype=kv_dtype)
    logits(model, cache)
    stats, kv = cache.stats(), cache.pages
    assert kv is not None
    d, groups = kv.head_dim, -(-kv.head_dim // group)
    page = 2 * 32 * d * bits // 8 + 4 * d + 32 * (4 * groups + 4)
    tails = kv.num_layers * len(PADDING) * kv.num_kv_heads * 2 * 32 * d * 2
    assert kv.page_bytes == page and kv.tail_bytes * len(PADDING) == tails
    assert stats["bytes"] == stats["pages_used"] * page + tails
    held = kv.all_layers.tails
    assert held is not None and held.nbytes == tails


@FORMATS
def test_what_is_kept_does_not_depend_on_the_format(dtype: torch.dtype, kv_dtype: str) -> None:
    model = llama(dtype)
    caches = [adakv.Cache(model, budget=40, kv_dtype=kind) for kind in ("auto", kv_dtype)]
    for cache in caches:
        logits(model, cache)
    kept = [held(cache) for cache in caches]
    assert kept[0] == kept[1]


@FORMATS
def test_a_cache_that_grows_writes_the_same(dtype: torch.dtype, kv_dtype: str) -> None:
    """More tokens than there were pages for, and a second turn."""
    model, batch = llama(dtype), prompts(60, (0, 20))
    options = GREEDY | {"max_new_tokens": 70}
    with adakv.attach(model):
        texts = []
        for room in (1, 500):
            cache = adakv.Cache(model, budget=40, max_new_tokens=room, kv_dtype=kv_dtype)
            first = model.generate(**batch, past_key_values=cache, **options)
            turn = torch.cat([first, batch["input_ids"][:, -9:]], 1)
            mask = torch.cat(
                [batch["attention_mask"], torch.ones(2, turn.shape[1] - 60, dtype=torch.int64)], 1
            )
            texts.append(
                model.generate(turn, attention_mask=mask, past_key_values=cache, **options)
            )
    assert torch.equal(*texts)


@FORMATS
def test_a_batch_writes_what_each_prompt_gets_alone(dtype: torch.dtype, kv_dtype: str) -> None:
    model = llama(dtype)
    given = [torch.randint(3, VOCAB, (length,)) for length in (70, 40, 100, 5)]
    options = adakv.BatchOptions(max_batch=3, eos_token_id=())
    settings: dict[str, Any] = {"budget": 40, "kv_dtype": kv_dtype}
    results = adakv.generate_batch(model, given, max_new_tokens=9, options=options, **settings)
    for prompt, result in zip(given, results, strict=True):
        with adakv.attach(model):
            cache = adakv.Cache(model, **settings)
            mask = torch.ones_like(prompt[None])
            alone = model.generate(
                prompt[None],
                attention_mask=mask,
                past_key_values=cache,
                **GREEDY | {"max_new_tokens": 9},
            )
        assert result.tokens == alone[0, len(prompt) :].tolist()


def test_formats_are_refused_before_anything_is_changed() -> None:
    model = LLAMA.model()
    with pytest.raises(
        ValueError, match="one of 'auto', 'int8', 'fp8', 'int4', 'int2' or as 'mixed3', got 8"
    ):
        adakv.Cache(model, budget=40, kv_dtype=8)  # type: ignore[arg-type]
    cache = adakv.Cache(model, budget=40, kv_dtype="int8")
    with pytest.raises(ValueError, match=r"int8 take float16 and bfloat16, got .* in float32"):
        logits(model, cache)
    assert cache.seen == [] and cache.pages is None
    with pytest.raises(ValueError, match=r"take float16 and bfloat16"):
        adakv.generate_batch(model, [[5, 6, 7]], budget=40, kv_dtype="fp8")
    with pytest.raises(ValueError, match="page_size must be 32 for pages of int4, got 16"):
        adakv.Cache(model, budget=40, kv_dtype="int4", page_size=16)
    with pytest.raises(ValueError, match="kv_dtype must be one of"):
        adakv.generate_batch(model, [[5, 6, 7]], budget=40, kv_dtype="int3")
