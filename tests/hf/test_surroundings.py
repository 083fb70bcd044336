"""What people run models with: images, pipelines, streamers, offloaded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    TextGenerationPipeline,
)

import adakv
from adakv.hf.attachment import CACHE
from hf.families import LLAMA, V4, VOCAB
from small_model import save_model

pytestmark = pytest.mark.model

PLAIN = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


def test_a_model_with_images_writes_what_it_wrote() -> None:
    text = LLAMA.model().config
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    vision |= {"num_hidden_layers": 2, "image_size": 16, "patch_size": 4, "projection_dim": 32}
    vision["model_type"] = "clip_vision_model"
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(config).eval()
    ids = torch.randint(6, VOCAB, (1, 60))
    ids[:, 3:19] = 5  # an image of 16 patches
    image = {"pixel_values": torch.randn(1, 3, 16, 16), "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **image, **PLAIN)
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=60)
        assert torch.equal(model.generate(ids, **image, **{CACHE: cache}, **PLAIN), expected)
        small = adakv.Cache(model, budget=36, page_size=8)
        model.generate(ids, **image, **{CACHE: small}, **PLAIN)
    assert small.stats()["bytes"] < cache.stats()["bytes"]
    assert adakv.classes_of(model, {"input_ids": ids}) == {"image": [[(3, 19)]]}


def test_a_pipeline_and_a_streamer_take_the_cache(tmp_path: Path) -> None:
    folder = save_model(tmp_path, initializer_range=0.3)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    pipeline = TextGenerationPipeline(model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
    pieces: list[Tensor] = []

    class Streamer:
        def put(self, tokens: Tensor) -> None:
            pieces.append(tokens.flatten())

        def end(self) -> None:
            pass

    prompt = "a text of some length, " * 4
    expected = pipeline(prompt, **PLAIN)
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=len(prompt))
        given = {CACHE: cache, "streamer": Streamer()}
        assert pipeline(prompt, **given, **PLAIN) == expected
    assert len(torch.cat(pieces)) == len(prompt) + 12
    assert cache.stats()["seen"] == [len(prompt) + 11]


@pytest.mark.skipif(V4, reason="one version is enough")
def test_offloaded_weights_are_met_where_they_are() -> None:
    ids = torch.randint(3, VOCAB, (1, 60))
    texts = []
    for is_offloaded in (False, True):
        model: Any = LLAMA.model()
        if is_offloaded:
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        with adakv.attach(model):
            cache = adakv.Cache(model, budget=40)
            texts.append(model.generate(ids, **{CACHE: cache}, **PLAIN))
    assert torch.equal(texts[0], texts[1])
