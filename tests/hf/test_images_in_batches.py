"""Prompts with images beside others in one cache: each text is what its prompt gets alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import adakv
from adakv.hf.attachment import CACHE
from hf.families import LLAMA, V4
from hf.test_images import FAMILIES, IMAGE, WITH_TYPES

pytestmark = [pytest.mark.model, pytest.mark.skipif(V4, reason="one version is enough")]

SHARED = [name for name in FAMILIES if name != "Gemma3"]  # whose windows can't share slots
SETTINGS: tuple[dict[str, Any], ...] = (
    {"budget": 40},
    {"policy": "csp", "budget": 40},
    {"policy": "EliteQueries(window=8) * StrengthSkew() * TopScore()", "budget": 64},
    {"policy": "hae", "budget": 64},
)
NEW = 7


def small(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**FAMILIES[name][0])
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    model.generation_config.eos_token_id = None
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def shown(name: str, length: int, at: int, seed: int) -> dict[str, Any]:
    """A prompt with an image, as a processor gives it."""
    _, count, image = FAMILIES[name]
    torch.manual_seed(seed)
    ids = torch.randint(10, 97, (1, length))
    ids[:, at : at + count] = IMAGE
    given = {key: x * (seed if x.is_floating_point() else 1) for key, x in image.items()}
    given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name in WITH_TYPES:
        given[WITH_TYPES[name]] = (ids == IMAGE).int()
    return given


def words(length: int) -> Tensor:
    return torch.randint(10, 97, (length,))


def alone(model: Any, prompt: Any, **settings: Any) -> list[int]:
    """What transformers' generate writes with a cache for this prompt only."""
    if isinstance(prompt, Tensor):
        prompt = {"input_ids": prompt[None], "attention_mask": torch.ones_like(prompt[None])}
    with adakv.attach(model):
        classes = adakv.classes_of(model, prompt)
        cache = adakv.Cache(model, classes=classes, **settings)
        written = model.generate(**prompt, **{CACHE: cache}, max_new_tokens=NEW, do_sample=False)
    return written[0, prompt["input_ids"].shape[1] :].tolist()


def written(model: Any, prompts: list[Any], **settings: Any) -> list[list[int]]:
    """What a batch writes, two prompts at a time."""
    how: dict[str, Any] = {"max_new_tokens": NEW, "options": adakv.BatchOptions(max_batch=2)}
    return [result.tokens for result in adakv.generate_batch(model, prompts, **how | settings)]


@pytest.mark.parametrize("name", SHARED)
def test_texts_are_those_of_each_prompt_alone(name: str) -> None:
    """Images at unequal places, and a text between them."""
    model = small(name)
    prompts = [shown(name, 67, 3, 1), words(50), shown(name, 66, 20, 2)]
    for settings in SETTINGS:
        expected = [alone(model, prompt, **settings) for prompt in prompts]
        assert written(model, prompts, **settings) == expected


def test_the_model_gets_the_images() -> None:
    model, prompts = small("SmolVLM"), [shown("SmolVLM", 67, 3, 1), shown("SmolVLM", 66, 20, 2)]
    given: list[Tensor] = []

    def note(module: Any, args: Any, arguments: dict[str, Any]) -> None:
        given.append(arguments.get("pixel_values"))

    model.register_forward_pre_hook(note, with_kwargs=True)
    written(model, [prompts[0], words(9), prompts[1]], budget=40)
    found = [pixels for pixels in given if pixels is not None]
    for pixels, prompt in zip(found, prompts, strict=True):
        assert torch.equal(pixels, prompt["pixel_values"])


@pytest.mark.parametrize("name", ["Qwen2VL", "PaliGemma", "SmolVLM"])
def test_many_questions_about_one_image(name: str) -> None:
    """As forks of a cache that has read the image, each of which goes on with a question."""
    model, prefix, questions = small(name), shown(name, 66, 20, 2), [words(5), words(9), words(1)]
    settings = {"policy": "csp", "budget": 40}
    expected = []
    for question in questions:
        with adakv.attach(model), torch.no_grad():
            cache = adakv.Cache(model, classes=adakv.classes_of(model, prefix), **settings)
            read = model(**prefix, **{CACHE: cache}, use_cache=True)
            # What transformers' generate gives for tokens behind an image.
            position = 66 + int(getattr(model.model, "rope_deltas", None) or 0)
            position += name == "PaliGemma"
            tokens, new = [], question
            for _ in range(NEW):
                places = torch.arange(position, position + len(new))[None]
                read = model(new[None], position_ids=places, **{CACHE: cache}, use_cache=True)
                position += len(new)
                new = read.logits[0, -1:].argmax(-1)
                tokens.append(int(new))
        expected.append(tokens)
    assert written(model, questions, prefix=prefix, **settings) == expected


def test_classes_by_hand() -> None:
    """Spans are given for each prompt, or for all; they need not be where the config says."""
    model, texts = LLAMA.model(), [words(70), words(61)]
    settings = {"policy": "csp", "budget": 40}
    spans = [[(3, 40)], [(20, 25), (30, 41)]]

    def one(text: Tensor, of_one: Any) -> list[int]:
        with adakv.attach(model):
            cache = adakv.Cache(model, classes={"image": of_one}, **settings)
            given = {"input_ids": text[None], "attention_mask": torch.ones_like(text[None])}
            how = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
            return model.generate(**given, **{CACHE: cache}, **how)[0, len(text) :].tolist()

    settings["options"] = adakv.BatchOptions(eos_token_id=())
    found = written(model, texts, classes={"image": spans}, **settings)
    common = written(model, texts, classes={"image": spans[1]}, **settings)
    del settings["options"]
    assert found == [one(*pair) for pair in zip(texts, spans, strict=True)]
    assert common == [one(text, spans[1]) for text in texts]


def test_processes_read_images() -> None:
    prompts = [shown("SmolVLM", 67, 3, 1), words(50), shown("SmolVLM", 66, 20, 2)]
    given: dict[str, Any] = {"policy": "csp", "budget": 40, "max_new_tokens": NEW}
    given["classes"] = {"image": [[(3, 7)], None, [(20, 24)]]}
    expected = adakv.generate_batch(small("SmolVLM"), prompts, **given)
    assert adakv.generate_on(["cpu", "cpu"], smolvlm, prompts, **given) == expected


def smolvlm(device: torch.device) -> Any:
    """A model for each process."""
    return small("SmolVLM").to(device)


def test_what_makes_no_sense_is_refused_before_any_work() -> None:
    model, image = small("SmolVLM"), shown("SmolVLM", 67, 3, 1)
    several = {key: torch.cat([x, x]) for key, x in image.items()}
    padded = image | {"attention_mask": image["attention_mask"].clone()}
    padded["attention_mask"][0, 0] = 0
    refused: list[tuple[dict[str, Any], str]] = [
        ({"prompts": [several]}, r"prompts\[0\] must have the input_ids \[1, T\] of one prompt"),
        ({"prompts": [words(9), {}]}, r"prompts\[1\] must have the input_ids .* got None"),
        ({"prompts": [padded]}, r"prompts\[0\] must have no padding"),
        ({"prompts": [image], "prefix": words(9)}, r"prompts\[0\] must be .* behind a prefix"),
        ({"prompts": [words(9)], "prefix": padded}, "prefix must have no padding"),
        ({"policy": "aircache", "budget": 67}, r"prompts\[1\] has 70 tokens that are not of class"),
        ({"classes": {"picture": [(3, 7)]}}, "classes: each must be one of .*; got 'picture'"),
        ({"classes": {"image": [[(3, 7)]]}}, r"classes\['image'\] must have one list or row for"),
        ({"model": LLAMA.model()}, "names no token that stands for an image"),
    ]
    calls: list[Any] = []
    model.model.text_model.register_forward_hook(lambda *call: calls.append(call[1:]))
    for wrong, message in refused:
        given = {"model": model, "prompts": [image, words(70)], "policy": "csp", "budget": 40}
        with pytest.raises(ValueError, match=message):
            adakv.generate_stream(**given | wrong)
    assert all(len(args) == 0 or args[0].shape[1] == 1 for args, *_ in calls)


def test_a_recorded_loop_refuses_images_instead_of_leaving_them_out() -> None:
    model, image = small("SmolVLM"), shown("SmolVLM", 67, 3, 1)
    with adakv.attach(model), pytest.raises(ValueError, match="images and sounds must not be"):
        cache = adakv.Cache(model, budget=40)
        loop = adakv.cuda_graph_sample
        model.generate(**image, **{CACHE: cache}, custom_generate=loop, max_new_tokens=NEW)
