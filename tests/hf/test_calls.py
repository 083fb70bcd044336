"""How many of adakv's Python functions a layer passes through: what readers and the host follow."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import adakv
from hf.families import LLAMA, VOCAB

PACKAGE = str(Path(adakv.__file__).parent)


def calls_of(run: Callable[[], Any]) -> list[tuple[str, str]]:
    """Files and names of the functions of adakv that ``run`` calls, in turn."""
    found: list[tuple[str, str]] = []

    def look(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and code.co_name[0] != "<":
            found.append((code.co_filename.removeprefix(PACKAGE), code.co_name))

    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def calls_of_layer(policy: str, num_layers: int) -> dict[str, list[tuple[str, str]]]:
    """Those of a prefill and of a step of a model with so many layers."""
    model, prompt = LLAMA.model(num_hidden_layers=num_layers), torch.randint(3, VOCAB, (1, 120))
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, policy, budget=48)
        prefill = calls_of(lambda: model(prompt, past_key_values=cache))
        model(prompt[:, :1], past_key_values=cache)
        step = calls_of(lambda: model(prompt[:, :1], past_key_values=cache))
    return {"prefill": prefill, "step": step}


@pytest.mark.model
@pytest.mark.parametrize(
    ("policy", "what", "most", "most_files"),
    [
        ("ada_snapkv", "prefill", 43, 9),
        ("ada_snapkv", "step", 7, 4),
        ("model_column_max", "prefill", 82, 12),
    ],
)
def test_a_layer_is_few_calls_in_few_files(
    policy: str, what: str, most: int, most_files: int
) -> None:
    """By the difference of models of 8 and of 4 layers."""
    few, many = (calls_of_layer(policy, num_layers)[what] for num_layers in (4, 8))
    of_layer = (len(many) - len(few)) / 4
    files = {file for file, name in many if many.count((file, name)) > few.count((file, name))}
    assert of_layer <= most
    assert len(files) <= most_files, sorted(files)
