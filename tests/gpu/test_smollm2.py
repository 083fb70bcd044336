"""A real model, SmolLM2-135M in float32: the same kept entries and the same text as on the CPU.

Where the model is is said by the environment variable ADAKV_MODEL (`make test-gpu` sets it).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import adakv
from adakv.cli.inputs import load_model, manual_text

MODEL = os.environ.get("ADAKV_MODEL", "")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.model,
    pytest.mark.skipif(not Path(MODEL).is_file(), reason="ADAKV_MODEL names no model"),
]
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 32}
DEVICES = ("cpu", "cuda")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {
        device: load_model(MODEL, dtype=torch.float32, device=torch.device(device))[0]
        for device in DEVICES
    }


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    tokenizer = load_model(MODEL, dtype=torch.float32, device=torch.device("cpu"))[1]
    text = manual_text(tokenizer, 2400)
    return torch.tensor(tokenizer(text)["input_ids"][:2400])


def run(model: Any, given: dict[str, Any], **settings: Any) -> tuple[list[list[int]], list[Any]]:
    """The text, with a second turn, and what every head kept of the prompt."""
    given = {name: x.to(model.device) for name, x in given.items()}
    chunk = {"prefill_chunk_size": 512} if settings.get("chunked_prefill") else {}
    with adakv.attach(model):
        cache = adakv.Cache(model, ratio=0.1, **settings)
        first = model.generate(**given, past_key_values=cache, **chunk, **GREEDY)
        kept = [
            [head.tolist() for row in cache.kept(layer) for head in row]
            for layer in range(model.config.num_hidden_layers)
        ]
        if chunk:
            return first.tolist(), kept
        turn = torch.cat([first, first[:, :20]], 1)
        mask = torch.ones_like(turn)
        mask[:, : given["input_ids"].shape[1]] = given["attention_mask"]
        text = model.generate(turn, attention_mask=mask, past_key_values=cache, **GREEDY)
    return text.tolist(), kept


@pytest.mark.parametrize(
    ("policy", "how"),
    [
        ("ada_snapkv", "alone"),
        ("ada_snapkv", "padded"),
        ("ada_snapkv", "in chunks"),
        ("ada_pyramidkv", "alone"),
        ("critical_ada_snapkv", "padded"),
        ("model_column_max", "alone"),
    ],
)
def test_equals_the_cpu(models: dict[str, Any], ids: torch.Tensor, policy: str, how: str) -> None:
    batch = ids.view(2, -1) if how == "padded" else ids[None, :1500]
    mask = torch.ones_like(batch)
    if how == "padded":
        mask[1, :333] = 0
    given = {"input_ids": batch, "attention_mask": mask}
    settings = {"policy": policy, "chunked_prefill": how == "in chunks"}
    cpu, cuda = (run(models[device], given, **settings) for device in DEVICES)
    assert cuda == cpu
