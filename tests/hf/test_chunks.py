"""Prompts in chunks: what is held of them, and that nothing else changes."""

from __future__ import annotations

import gc

import pytest
import torch

import adakv
from hf.families import LLAMA, VOCAB
from hf.test_hf import prompts
from hf.test_model_wide import held

pytestmark = pytest.mark.model


def bytes_of_tensors() -> int:
    """Memory that live tensors share among them."""
    gc.collect()
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in gc.get_objects()
        if type(x) in (torch.Tensor, torch.nn.Parameter) and x.layout == torch.strided
    }
    return sum(storages.values())


@pytest.mark.parametrize("policy", ["model_column_max", "ada_snapkv", "ada_expected"])
def test_a_prompt_in_chunks_holds_little_more_than_its_entries(policy: str) -> None:
    """Not its queries: G = 4 times as many as its keys. Heads are as wide as real ones."""
    model = LLAMA.model(
        num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, head_dim=128,
        max_position_embeddings=4096,
    )  # fmt: skip
    ids = torch.randint(3, VOCAB, (1, 4000))
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, policy, budget=64, chunked_prefill=True)
        before = bytes_of_tensors()
        for chunk in ids.split(250, dim=1):
            model(chunk, past_key_values=cache, logits_to_keep=1)
        grown = bytes_of_tensors() - before
    entries = 2 * 2 * 2 * 4000 * 128 * 4  # layers, K and V, kv heads, tokens, D, float32
    assert entries <= grown
    # Moments of ExpectedAttention don't grow with the prompt: [Hq, D, D] a layer.
    assert grown <= 1.2 * entries + (2 * 8 * 128 * 128 * 4 if policy == "ada_expected" else 0)


@pytest.mark.parametrize("policy", ["model_column_max", "h2o", "critical_ada_snapkv", "knorm"])
@pytest.mark.parametrize("padding", [(0, 0, 0), (0, 70, 33)])
def test_chunks_keep_what_the_whole_prompt_keeps(policy: str, padding: tuple[int, ...]) -> None:
    model, batch, kept = LLAMA.model(), prompts(150, padding), []
    for size in (150, 40):
        with torch.no_grad(), adakv.attach(model):
            cache = adakv.Cache(model, policy, budget=44, chunked_prefill=size < 150)
            for start in range(0, 150, size):
                part = slice(start, start + size)
                mask = batch["attention_mask"][:, : part.stop]
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, part]
                model(
                    batch["input_ids"][:, part],
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                )
            cache.decoded_pages()
        kept.append(held(cache))
    assert kept[0] == kept[1]
