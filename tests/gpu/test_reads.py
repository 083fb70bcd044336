"""Sparse reads on a GPU: the same texts as on the CPU in float32, with and without CUDA graphs."""

from __future__ import annotations

import copy

import pytest
import torch

import adakv
from hf.families import LLAMA, VOCAB

pytestmark = [pytest.mark.gpu, pytest.mark.model]

READS = ["Quest(share=0.25, least=2, full_layers=0)", "Quest(share=0.5, mass=0.7, full_layers=1)"]


@pytest.mark.parametrize("read", READS)
def test_texts_equal_the_cpu(read: str) -> None:
    """In transformers' loop, in one of recorded steps and in a batch, whose slots change hands."""
    model, texts = LLAMA.model(), []
    prompts = [torch.randint(3, VOCAB, (n,)) for n in (150, 60, 200, 90)]
    for device in ("cpu", "cuda"):
        mine = copy.deepcopy(model).to(device)
        for custom in (None, adakv.cuda_graph_sample):
            cache = adakv.Cache(mine, "ada_snapkv", 100, read=read)
            with adakv.attach(mine):
                text = mine.generate(
                    prompts[0][None].to(device), past_key_values=cache, custom_generate=custom,
                    do_sample=False, eos_token_id=None, max_new_tokens=40,
                )  # fmt: skip
            texts.append(text[0, 150:].tolist())
        batch = adakv.generate_batch(
            mine, prompts, policy="ada_snapkv", budget=100, max_new_tokens=40,
            options=adakv.BatchOptions(read=read, eos_token_id=(), max_batch=2),
        )  # fmt: skip
        texts += [result.tokens for result in batch]
    of_cpu, of_gpu = texts[: len(texts) // 2], texts[len(texts) // 2 :]
    assert of_gpu == of_cpu and of_cpu[0] == of_cpu[1] == of_cpu[2]
