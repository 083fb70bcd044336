"""Which tokens of a prompt stand for an image or a sound, from what a processor gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from adakv.errors import short
from adakv.hf.wrappers import unwrapped
from adakv.policy import spans_of

#: Settings of a model's config that hold the id of the token that stands for each piece of an image
#: (or of a video, whose pictures are images) or of a sound, by class.
PLACEHOLDERS = {
    "image": ("image_token_id", "image_token_index", "video_token_id", "video_token_index"),
    "audio": ("audio_token_id", "audio_token_index"),
}


def classes_of(model: Any, inputs: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Which tokens of prompts are of images and of sounds, for ``adakv.Cache(classes=...)``.

    Parameters
    ----------
    model : PreTrainedModel
        Its config says which tokens stand for pieces of an image.
    inputs : mapping
        What the model's processor gave: ``input_ids`` ``[T]`` or ``[B, T]`` and, wherever there is
        padding, ``attention_mask``.

    Returns
    -------
    classes : dict
        Spans by class, one list for each sequence, as :func:`adakv.spans_of` gives them.

    Raises
    ------
    ValueError
        If the model reads neither images nor sounds, or if ``inputs`` are no such mapping.
    """
    config = unwrapped(model).config
    ids = {
        name: [token for x in settings if (token := getattr(config, x, None)) is not None]
        for name, settings in PLACEHOLDERS.items()
    }
    if not any(ids.values()):
        raise ValueError(
            f"model: the config of {type(model).__name__} names no token that stands for an image "
            "or a sound; give spans by hand, as classes={'image': [(3, 19)]}"
        )
    if not isinstance(inputs, Mapping) or "input_ids" not in inputs:
        raise ValueError(f"inputs must have input_ids, as of a processor, got {short(inputs)}")
    prompts, mask = inputs["input_ids"], inputs.get("attention_mask")
    return {name: spans_of(prompts, tokens, mask) for name, tokens in ids.items() if tokens}


def classes_of_all(model: Any, prompts: Sequence[Tensor]) -> dict[str, list[Any]]:
    """:func:`classes_of` of prompts ``[T]`` of any lengths, at least one."""
    found = [classes_of(model, {"input_ids": ids}) for ids in prompts]
    return {name: [of_prompt[name] for of_prompt in found] for name in found[0]}
