"""The trainer in examples/: what it writes is a gate, which has learnt what there was to learn."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from adakv.cli.main import run_command_line
from adakv.policy import Gate

EXAMPLE = Path(__file__).resolve().parent.parent / "examples/train_gate.py"


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module."""
    spec = importlib.util.spec_from_file_location("train_gate", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_gate", module)
    spec.loader.exec_module(module)
    return module


def lines(count: int) -> tuple[Tensor, Tensor]:
    """Hidden states of 2 layers and targets of 3 heads that follow from them by straight lines."""
    torch.manual_seed(0)
    hidden = torch.randn(2, count, 16) * torch.linspace(0.1, 3, 16) + 1
    slopes = torch.randn(2, 16, 3)
    return hidden.bfloat16(), hidden.bfloat16().float() @ slopes - 5


def test_a_line_is_found(trainer: Any) -> None:
    x, y = lines(400)
    weights = trainer.line(x, y, ridge=0)
    for layer in range(2):
        found = reference.gate(x[layer][None].double(), weights, layer)[0].mT
        torch.testing.assert_close(found.float(), y[layer], atol=1e-3, rtol=1e-3)
    assert trainer.explained(weights, x, y) > 0.9999


def test_two_layers_come_near_a_bend(trainer: Any) -> None:
    x, y = lines(4000)
    y = y.abs()
    line, two = trainer.line(x, y), trainer.two_layers(x, y, 32, 200)
    assert trainer.explained(line, x, y) < 0.5 < 0.9 < trainer.explained(two, x, y)


@pytest.mark.model
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("width", ["0", "8"])
def test_what_was_trained_runs_on_the_command_line(
    trainer: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: str
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "numbers.txt").write_text(" ".join(map(str, range(200))))
    (texts / "binary").write_bytes(bytes(range(256)) * 100)
    out = tmp_path / "gate.safetensors"
    options = ["--texts", str(texts), "--out", str(out), "--device", "cpu", "--width", width]
    options += ["--prompts", "2", "--length", "100", "--per-prompt", "80", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", ["train_gate.py", model, *options])
    trainer.main()
    policy = f"{Gate(str(out))} * ModelWide() * TopScore()"
    command = ["generate", model, str(texts / "numbers.txt"), "--policy", policy, "--budget", "48"]
    assert run_command_line([*command, "--max-new-tokens", "3"]) == 0
