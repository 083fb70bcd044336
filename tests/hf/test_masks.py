"""Masks: padding is honoured wherever it is; every other mask than a causal one is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

import adakv
from adakv.hf.padding import Padding
from hf.families import LLAMA, VOCAB
from hf.forwards import ids

pytestmark = pytest.mark.model

HIDDEN = torch.finfo(torch.float32).min
PROMPT, NEW = 60, 4


@torch.no_grad()
def logits(model: Any, tokens: Tensor, cache: Any, **options: Any) -> Tensor:
    return model(tokens, past_key_values=cache, **options).logits


def causal(num_new: int, before: int, batch: int = 1) -> Tensor:
    """``[B, 1, S, before + S]``, additive."""
    mask = torch.full((batch, 1, num_new, before + num_new), HIDDEN)
    return mask.triu(before + 1)


def tree() -> Tensor:
    """Two branches: tokens 1 and 2 are alternatives, and 3 follows 1."""
    mask = causal(NEW, PROMPT)
    mask[0, 0, 2, PROMPT + 1] = mask[0, 0, 3, PROMPT + 2] = HIDDEN
    return mask


def tree_whose_last_row_sees_all() -> Tensor:
    mask = causal(NEW, PROMPT)
    mask[0, 0, 2, PROMPT + 1] = HIDDEN
    return mask


def block() -> Tensor:
    return torch.zeros(1, 1, NEW, PROMPT + NEW)


def bias() -> Tensor:
    return causal(NEW, PROMPT) - 0.7 * (torch.arange(PROMPT + NEW) < 30)


def bias_of_one_token() -> Tensor:
    return bias()[:, :, :1, : PROMPT + 1]


def per_head() -> Tensor:
    mask = causal(NEW, PROMPT).expand(1, 4, -1, -1).clone()
    mask[:, 1, :, :30] = HIDDEN
    return mask


def per_head_of_one_token() -> Tensor:
    return per_head()[:, :, -1:, : PROMPT + 1]


OTHERS = [
    tree,
    tree_whose_last_row_sees_all,
    block,
    bias,
    bias_of_one_token,
    per_head,
    per_head_of_one_token,
]


@pytest.mark.parametrize("inner", ["eager", "sdpa"])
@pytest.mark.parametrize("make", OTHERS, ids=lambda make: make.__name__)
def test_masks_of_later_tokens_that_are_not_causal_are_refused(make: Any, inner: str) -> None:
    model, prompt, mask = LLAMA.model(attn_implementation=inner), ids(PROMPT), make()
    new = ids(mask.shape[2])
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=200)
        logits(model, prompt, cache)
        with pytest.raises(ValueError, match=r"attention_mask of sequence 0 must be causal"):
            logits(model, new, cache, attention_mask=mask)
        full = DynamicCache(config=model.config)
        logits(model, prompt, full)
        actual = logits(model, new, cache, attention_mask=causal(len(new[0]), PROMPT))
    assert torch.allclose(actual, logits(model, new, full), atol=1e-4)
    assert cache.stats()["seen"] == [PROMPT + len(new[0])]


def two_texts() -> Tensor:
    mask = causal(PROMPT, 0)
    mask[..., 30:, :30] = HIDDEN
    return mask


def prompt_bias() -> Tensor:
    return causal(PROMPT, 0) - 0.01 * torch.arange(PROMPT)


def prompt_per_head() -> Tensor:
    mask = causal(PROMPT, 0).expand(1, 4, -1, -1).clone()
    mask[:, 3, 40:, 5] = HIDDEN
    return mask


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    "make", [two_texts, prompt_bias, prompt_per_head], ids=lambda make: make.__name__
)
def test_masks_of_prompts_that_are_not_causal_are_refused(make: Any, chunked: bool) -> None:
    model, prompt = LLAMA.model(attn_implementation="sdpa"), ids(PROMPT)
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40, chunked_prefill=chunked)
        with pytest.raises(ValueError, match="attention_mask of sequence 0 must be causal"):
            logits(model, prompt, cache, attention_mask=make())
        assert cache.stats()["seen"] == []
        expected = logits(model, prompt, adakv.Cache(model, budget=40))
        assert torch.equal(logits(model, prompt, cache), expected)


def test_texts_packed_by_their_lengths_are_refused() -> None:
    """That is how flash attention takes several texts, without a mask."""
    model, ends = LLAMA.model(attn_implementation="sdpa"), torch.tensor([0, 30, 60])
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40)
        with pytest.raises(ValueError, match="cu_seq_lens_q must not be given"):
            logits(model, ids(60), cache, cu_seq_lens_q=ends, cu_seq_lens_k=ends)


@pytest.mark.parametrize("inner", ["eager", "sdpa"])
def test_the_blocks_of_images_in_a_prompt_look_ahead(inner: str) -> None:
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=128,
        layer_types=["full_attention", "sliding_attention"] * 2,
        initializer_range=0.3,
        attn_implementation=inner,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(config).eval()
    prompt, is_padding = ids(PROMPT, 2), torch.zeros(2, PROMPT, dtype=torch.bool)
    is_padding[1, :7] = True
    mask = torch.where(is_padding[:, None, None, :], HIDDEN, causal(PROMPT, 0))  # [2, 1, T, T]
    mask[:, :, 10:26, 10:26] = 0
    masks = {"full_attention": mask, "sliding_attention": mask}
    full, later = DynamicCache(config=config), torch.ones(2, PROMPT + NEW)
    later[:, :PROMPT] = ~is_padding
    tokens = ids(NEW, 2)
    expected = logits(model, prompt, full, attention_mask=masks)
    expected_next = logits(model, tokens, full, attention_mask=later)
    with adakv.attach(model):
        cache = adakv.Cache(model, ratio=1.0)
        assert torch.equal(logits(model, prompt, cache, attention_mask=masks), expected)
        actual_next = logits(model, tokens, cache, attention_mask=later)
    assert torch.allclose(actual_next, expected_next, atol=1e-4)
    assert cache.stats()["seen"] == [PROMPT + NEW, PROMPT - 7 + NEW]


def test_a_mask_may_not_hide_one_token_and_show_padding_instead() -> None:
    model, mask = LLAMA.model(), torch.ones(1, PROMPT + 1)
    mask[0, :5] = 0
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40)
        logits(model, ids(PROMPT), cache, attention_mask=mask[:, :PROMPT])
        with pytest.raises(ValueError, match="must show all tokens seen"):
            logits(model, ids(1), cache, attention_mask=mask.roll(1, 1))
        logits(model, ids(1), cache, attention_mask=mask)
    assert cache.stats()["seen"] == [PROMPT - 5 + 1]


def test_pads_after_the_end_of_a_text_cannot_be_hidden_later() -> None:
    """A batched chat of which one text ended early: transformers filled it with tokens."""
    model, prompt, filled = LLAMA.model(), ids(PROMPT, 2), ids(NEW, 2)
    mask = torch.ones(2, PROMPT + NEW + 6)
    mask[0, PROMPT + 1 : PROMPT + NEW] = 0
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=80)
        logits(model, prompt, cache)
        for token in filled.split(1, 1):
            logits(model, token, cache)
        with pytest.raises(ValueError, match=r"sequence 0 has 64, and 61 are shown.*end of a text"):
            logits(model, ids(6, 2), cache, attention_mask=mask)


def test_a_chunk_may_not_hide_what_an_earlier_one_showed() -> None:
    model, mask = LLAMA.model(), torch.ones(1, PROMPT)
    mask[0, 3:9] = 0
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40, chunked_prefill=True)
        logits(model, ids(30), cache)
        with pytest.raises(ValueError, match="must show all tokens seen: sequence 0 has 30"):
            logits(model, ids(30), cache, attention_mask=mask)


def test_a_mask_too_short_is_refused() -> None:
    model = LLAMA.model(attn_implementation="sdpa")
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40)
        logits(model, ids(PROMPT), cache)
        with pytest.raises(ValueError, match=re.escape("or [B, 1, 4, 64], got [1, 1, 4, 4]")):
            logits(model, ids(4), cache, attention_mask=causal(4, 0))


@pytest.mark.parametrize("num_new, before, prompt", [(60, 0, True), (4, 60, False), (1, 60, False)])
def test_a_mask_is_looked_at_with_one_wait(
    num_new: int, before: int, prompt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says is read from the device at once; without a mask nothing is."""
    waits: list[str] = []

    def counted(name: str) -> Any:
        method = getattr(Tensor, name)

        def count(x: Tensor) -> Any:
            waits.append(name)
            return method(x)

        return count

    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "cpu"):
        monkeypatch.setattr(Tensor, name, counted(name))
    for mask in (causal(num_new, before, 3), torch.ones(3, before + num_new)):
        waits.clear()
        new = Padding().count(mask, [before] * 3, before, num_new, prompt=prompt)
        assert new == [num_new] * 3
        assert waits == ["tolist"]
    Padding().count(None, [before] * 3, before, num_new, prompt=prompt)
    assert waits == ["tolist"]


def test_large_masks_are_looked_at_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adakv.hf.padding._BLOCK", 7 * 300)
    mask = causal(100, 50, 3)
    assert Padding().count(mask, [50] * 3, 50, 100, prompt=False) == [100] * 3
    for row in (0, 6, 7, 98):
        wrong = mask.clone()
        wrong[2, 0, row, 50 + row + 1] = 0
        with pytest.raises(ValueError, match="sequence 2 must be causal"):
            Padding().count(wrong, [50] * 3, 50, 100, prompt=False)
