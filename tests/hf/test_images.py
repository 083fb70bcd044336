"""Models that read images: what an image becomes are tokens of the prompt like others. LLaVA is in
test_surroundings.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import adakv
from adakv.hf.attachment import CACHE
from hf.families import LLAMA, V4

pytestmark = [pytest.mark.model, pytest.mark.skipif(V4, reason="one version is enough")]

PLAIN = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
IMAGE, NUM_TOKENS = 5, 60
TEXT = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": None,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "image_size": 16,
    "patch_size": 4,
}
PIXELS = torch.randn(1, 3, 16, 16)
POLICIES_OF_IMAGES = ("EliteQueries(window=8) * StrengthSkew() * TopScore()", "hae")

Case = tuple[dict[str, Any], int, dict[str, Any]]  # settings, tokens of an image, its inputs


def patches(**vision: Any) -> Case:
    """A family of Qwen's: images as patches of a grid, RoPE of three positions."""
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    sizes = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    sizes |= {"temporal_patch_size": 2, "intermediate_size": 32}
    tokens = {"image_token_id": IMAGE, "video_token_id": 6, "vision_start_token_id": 7}
    settings = {
        "text_config": TEXT | {"rope_parameters": rope},
        "vision_config": sizes | vision,
        **tokens,
    }
    image = {"pixel_values": torch.randn(64, 96), "image_grid_thw": torch.tensor([[1, 8, 8]])}
    return settings, 16, image


def one_picture(text: str, num_tokens: int, vision: dict[str, Any], **settings: Any) -> Case:
    """A family that looks at whole pictures."""
    settings |= {"text_config": TEXT | {"model_type": text}, "vision_config": VISION | vision}
    return settings, num_tokens, {"pixel_values": PIXELS}


def idefics() -> Case:
    settings, tokens, image = one_picture("llama", 4, {}, image_token_id=IMAGE, scale_factor=2)
    return settings, tokens, {"pixel_values": image["pixel_values"][None]}


def mistral3() -> Case:
    vision = {"model_type": "pixtral", "head_dim": 16}
    sizes = {"image_token_index": IMAGE, "spatial_merge_size": 2}
    settings, tokens, image = one_picture("mistral", 4, vision, **sizes)
    return settings, tokens, image | {"image_sizes": torch.tensor([[16, 16]])}


def gemma3() -> Case:
    sizes = {"mm_tokens_per_image": 16, "image_token_index": IMAGE}
    settings, tokens, image = one_picture("gemma3_text", 16, {}, **sizes)
    settings["text_config"] |= {"sliding_window": 32}
    settings["text_config"] |= {"layer_types": ["full_attention", "sliding_attention"] * 2}
    return settings, tokens, image


FAMILIES: dict[str, Case] = {
    "Qwen2VL": patches(embed_dim=32, hidden_size=64),
    "Qwen2_5_VL": patches(
        hidden_size=32, out_hidden_size=64, window_size=16, fullatt_block_indexes=[1]
    ),
    "Qwen3VL": patches(
        hidden_size=32,
        out_hidden_size=64,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0],
    ),
    "Glm4v": patches(hidden_size=32, out_hidden_size=64, image_size=32),
    "Gemma3": gemma3(),
    "PaliGemma": one_picture(
        "gemma",
        16,
        {"model_type": "siglip_vision_model", "projection_dim": 64},
        image_token_index=IMAGE,
        projection_dim=64,
        hidden_size=64,
    ),
    "Idefics3": idefics(),
    "SmolVLM": idefics(),
    "InternVL": one_picture(
        "qwen2",
        4,
        {"image_size": [16, 16], "patch_size": [4, 4]},
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    ),
    "Mistral3": mistral3(),
}
WITH_TYPES = {
    **dict.fromkeys(("Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Glm4v"), "mm_token_type_ids"),
    **dict.fromkeys(("Gemma3", "PaliGemma"), "token_type_ids"),
}


def read(name: str) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """A tiny random model, a prompt that begins with an image, and the image."""
    settings, num_image_tokens, image = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    model.set_attn_implementation("eager")
    for parameter in model.parameters():
        if not parameter.any():  # made as zeros, as Gemma 3's projection of images
            torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(10, 97, (1, NUM_TOKENS))
    ids[:, 2], ids[:, 3 : 3 + num_image_tokens] = 7, IMAGE
    given = image | {"attention_mask": torch.ones_like(ids)}
    if name in WITH_TYPES:
        given[WITH_TYPES[name]] = (ids == IMAGE).int()
    return model, ids, given


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_with_an_image_writes_what_it_wrote(name: str) -> None:
    model, ids, given = read(name)
    expected = model.generate(input_ids=ids, **given, **PLAIN)
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=NUM_TOKENS)
        written = model.generate(input_ids=ids, **given, **{CACHE: cache}, **PLAIN)
        small = adakv.Cache(model, budget=36, page_size=8)
        model.generate(input_ids=ids, **given, **{CACHE: small}, **PLAIN)
    assert torch.equal(written, expected)
    assert 0 < small.stats()["bytes"] < cache.stats()["bytes"]


@pytest.mark.parametrize("name", FAMILIES)
def test_image_tokens_are_found(name: str) -> None:
    """Two images with a word between them, or one behind padding on the left."""
    settings, count, _ = FAMILIES[name]
    config = getattr(transformers, f"{name}Config")(**settings)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    ids = torch.full((2, 3 * count + 9), 11)
    ids[0, 3 : 3 + count] = ids[0, 4 + count : 4 + 2 * count] = IMAGE
    ids[1, 7 : 7 + count] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    classes = adakv.classes_of(model, {"input_ids": ids, "attention_mask": mask})
    assert classes == {"image": [[(3, 3 + count), (4 + count, 4 + 2 * count)], [(2, 2 + count)]]}
    alone = adakv.classes_of(model.model, {"input_ids": ids[0]})
    assert alone == {"image": classes["image"][0]}


@pytest.mark.parametrize("name", FAMILIES)
def test_image_entries_leave_and_no_others(name: str) -> None:
    model, ids, given = read(name)
    count = FAMILIES[name][1]
    text = {t for t in range(NUM_TOKENS) if not 3 <= t < 3 + count}
    for policy in POLICIES_OF_IMAGES:
        with adakv.attach(model):
            classes = adakv.classes_of(model, {"input_ids": ids})
            small = adakv.Cache(model, policy, NUM_TOKENS - count // 2, classes=classes)
            model.generate(input_ids=ids, **given, **{CACHE: small}, **PLAIN)
        full = [i for i, layer in enumerate(small.layers) if not layer.is_sliding]
        kept = [set(row.tolist()) for i in full for row in small.kept(i)[0]]
        assert all(text <= row for row in kept)
        if policy == "hae":
            assert all(row == kept[0] for row in kept)
        assert sum(len(row & set(range(NUM_TOKENS))) for row in kept) == len(kept) * (
            NUM_TOKENS - count // 2
        )


@torch.no_grad()
def test_a_policy_of_images_asks_for_classes() -> None:
    model, ids, given = read("SmolVLM")
    with adakv.attach(model):
        cache = adakv.Cache(model, "aircache", budget=64)
        with pytest.raises(ValueError, match=r"classes must be given .*adakv\.classes_of"):
            model(input_ids=ids, **given, **{CACHE: cache})
        assert cache.seen == [] and cache.stats()["bytes"] == 0
    with pytest.raises(ValueError, match="inputs must have input_ids, as of a processor, got"):
        adakv.classes_of(model, ids)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="names no token that stands for an image or a sound"):
        adakv.classes_of(LLAMA.model(), {"input_ids": ids})


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_image_is_looked_at(name: str) -> None:
    model, ids, given = read(name)
    logits = []
    for sign in (1, -1):
        image = given | {"pixel_values": sign * given["pixel_values"]}
        with adakv.attach(model):
            cache = adakv.Cache(model, budget=NUM_TOKENS)
            model(input_ids=ids, **image, **{CACHE: cache})
            logits.append(model(input_ids=ids[:, :1] * 0 + 11, **{CACHE: cache}).logits)
    assert not torch.allclose(*logits)
