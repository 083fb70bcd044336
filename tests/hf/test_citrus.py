"""Prompts in chunks, of which stays what an instruction looks at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import adakv
from adakv.policy import RepeatAttention, TopScore, Uniform
from hf.families import FAMILIES, LLAMA, VOCAB
from hf.test_model_wide import held
from hf.test_texts import write

pytestmark = pytest.mark.model

SCORER = RepeatAttention(window=8, pinned=0, reduce="mean", all_heads=True)
CITRUS = adakv.Policy(SCORER, Uniform(), TopScore())


def read(model: Any, cache: Any, prompt: Tensor, size: int) -> list[list[int]]:
    """What the kv heads of all layers hold after each chunk of so many tokens."""
    lengths = []
    with torch.no_grad(), adakv.attach(model):
        for chunk in prompt.split(size, 1):
            model(chunk, past_key_values=cache, logits_to_keep=1)
            lengths.append(cache.stats()["lengths"].flatten().unique().tolist())
    return lengths


def test_a_chunk_is_kept_whole_and_the_best_of_those_before() -> None:
    """2048 tokens in chunks of 256, of which 768 stay before the newest chunk."""
    model = LLAMA.model(num_hidden_layers=2, max_position_embeddings=4096)
    policy = "RepeatAttention(window=256, pinned=0, reduce='mean', all_heads=True)"
    cache = adakv.Cache(model, f"{policy} * Uniform() * TopScore()", 1024, chunk_budget=1024)
    cache.repeat_after_prompt(torch.randint(3, VOCAB, (1, 12)))
    lengths = read(model, cache, torch.randint(3, VOCAB, (1, 2048)), 256)
    assert lengths == [[min(256 * (i + 1), 1024)] for i in range(8)]
    assert cache.seen == [2048]
    for layer in range(2):
        first, *others = (row.tolist() for row in cache.kept(layer)[0])
        assert all(row == first for row in others)
        assert first[-256:] == [*range(2048 - 256, 2048)]


@pytest.mark.parametrize("kv_dtype", [None, "int4"])
def test_the_first_choice_is_that_of_the_whole_prompt(kv_dtype: str | None) -> None:
    """Nothing was missing before it: so the instruction looks at what it would look at then."""
    model = LLAMA.model()
    if kv_dtype is not None:
        model = model.bfloat16()
    prompt, instruction = (torch.randint(3, VOCAB, (2, n)) for n in (120, 20))
    chunks = adakv.Cache(model, CITRUS, 50, chunk_budget=50, kv_dtype=kv_dtype)
    chunks.repeat_after_prompt(instruction)
    assert read(model, chunks, prompt[:, :45], 45) == [[45]]
    read(model, chunks, prompt[:, 45:], 75)
    whole = adakv.Cache(model, CITRUS, 50, kv_dtype=kv_dtype)
    with torch.no_grad(), adakv.attach(model):
        model(prompt, past_key_values=whole)
        whole.repeat(instruction)
    if kv_dtype is None:
        assert held(chunks) == held(whole)
    else:  # the instruction looks at codes
        assert chunks.stats()["lengths"].tolist() == whole.stats()["lengths"].tolist()


def test_a_first_chunk_is_chosen_from_with_the_second() -> None:
    model = LLAMA.model()
    cache = adakv.Cache(model, CITRUS, 20, chunk_budget=40)
    cache.repeat_after_prompt(torch.randint(3, VOCAB, (1, 5)))
    prompt = torch.randint(3, VOCAB, (1, 130))
    assert read(model, cache, prompt[:, :120], 60) == [[60], [40]]
    write(model, cache, prompt, 3)
    assert cache.seen == [132]
    assert cache.stats()["lengths"].unique().tolist() == [20 + 2]


def test_room_for_the_whole_prompt_changes_nothing() -> None:
    model = LLAMA.model()
    prompt = torch.randint(3, VOCAB, (2, 130))
    plain = write(model, adakv.Cache(model, "full"), prompt, 20)
    cache = adakv.Cache(model, CITRUS, 200, chunk_budget=200)
    cache.repeat_after_prompt(torch.randint(3, VOCAB, (2, 9)))
    read(model, cache, prompt[:, :129], 40)
    assert torch.equal(write(model, cache, prompt, 20), plain)


def test_generate_reads_the_instruction_by_itself() -> None:
    model = LLAMA.model()
    prompt, instruction = (torch.randint(3, VOCAB, (1, n)) for n in (161, 9))
    texts = []
    for is_by_hand in (True, False):
        cache = adakv.Cache(model, CITRUS, 30, chunk_budget=50)
        cache.repeat_after_prompt(instruction)
        if is_by_hand:
            read(model, cache, prompt[:, :160], 40)
        with torch.no_grad(), adakv.attach(model):
            model.generation_config.eos_token_id = None
            texts.append(
                model.generate(
                    prompt,
                    past_key_values=cache,
                    prefill_chunk_size=None if is_by_hand else 40,
                    max_new_tokens=20,
                    do_sample=False,
                    attention_mask=torch.ones_like(prompt),
                )
            )
        assert cache.seen == [180]
    assert torch.equal(*texts)


def test_what_is_wrong_is_named() -> None:
    model, prompt = LLAMA.model(), torch.randint(3, VOCAB, (2, 130))
    settings: dict[str, Any] = {"policy": CITRUS, "budget": 50, "chunk_budget": 50}
    cache = adakv.Cache(model, **settings)
    for shape, given in (("None", None), (r"\[1, 9\]", prompt[:1, :9])):
        if given is not None:
            cache.repeat_after_prompt(given)
        with pytest.raises(ValueError, match=rf"repeat must be given: .*\[2, R\] .*got {shape}"):
            read(model, cache, prompt, 40)
    cache.repeat_after_prompt(prompt[:, :9])
    read(model, cache, prompt, 40)
    with pytest.raises(ValueError, match="decode_budget: RepeatAttention needs repeat"):
        adakv.Cache(model, "ada_snapkv", 50, decode_policy="citrus", decode_budget=50)
    sliding = next(family for family in FAMILIES if family.prefix == "GptOss").model()
    with pytest.raises(ValueError, match="layers without full attention can't forget"):
        adakv.Cache(sliding, **settings).repeat_after_prompt(prompt)
