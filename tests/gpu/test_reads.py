"""Sparse reads on a GPU: the same texts as on the CPU in float32, with and without CUDA graphs."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import adakv
import cases
from adakv import ops
from adakv.policy import SmallKV, SpecAttn
from adakv.shortlist import shortlist
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


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_bounds_read_beside_append_list_the_same_pages(dim: int) -> None:
    """Rows grow by a token each time, and over the end of a page; nothing waits in between."""
    lengths = torch.randint(100, 900, (16, 4)).tolist()
    layer = cases.paged_layer(
        lengths, new_tokens=16, head_dim=dim, dtype=torch.bfloat16, device="cuda"
    )
    bounds = torch.randn(len(layer.pages), 2 * dim, device="cuda").to(layer.pages.dtype)
    queries, new = (torch.randn(16, h, 1, dim, device="cuda").to(bounds.dtype) for h in (16, 4))
    found = []
    for _ in range(16):
        ops.append(new, new, layer)
        given = queries, bounds, layer.lengths, layer.block_table
        found += [shortlist(*given, least=2, prefetch=True), shortlist(*given, least=2)]
    for early, late in zip(found[::2], found[1::2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(early, late, strict=True))


@pytest.mark.parametrize(
    "read",
    [
        SpecAttn(small="", mass=0.7, least=2, full_layers=0, layers=(0, 0, 1, 1)),
        SmallKV(small="", share=0.5),
        SmallKV(small="", share=0.5, reserve="cpu"),
    ],
    ids=str,
)
def test_reads_beside_a_small_model_equal_the_cpu(read: SpecAttn | SmallKV) -> None:
    """And with ``reserve="cpu"`` all entries lie there while a text is written."""
    model, small = LLAMA.model(), LLAMA.model(num_hidden_layers=2)
    prompt, texts = torch.randint(3, VOCAB, (1, 150)), []
    for device in ("cpu", "cuda"):
        mine, beside = (copy.deepcopy(x).to(device) for x in (model, small))
        cache = adakv.Cache(mine, "full", read=replace(read, small=beside))
        with adakv.attach(mine):
            text = mine.generate(
                prompt.to(device), past_key_values=cache,
                do_sample=False, eos_token_id=None, max_new_tokens=40,
            )  # fmt: skip
        texts.append(text.tolist())
        is_away = getattr(read, "reserve", "device") == "cpu"
        assert cache.pages.device.type == ("cpu" if is_away else device)
    assert texts[0] == texts[1]
