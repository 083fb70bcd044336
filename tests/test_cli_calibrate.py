"""adakv calibrate: where the tokens of a model stand out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adakv.cli.calibrate import outlier_of
from adakv.cli.main import run_command_line
from small_model import save_model

CHANNEL = 11


@pytest.fixture
def model(tmp_path: Path) -> str:
    """Its first layer's MLP writes large numbers to one channel, which the second layer sees."""
    folder = save_model(tmp_path / "model")
    network: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        network.model.layers[0].mlp.down_proj.weight[CHANNEL] *= 1e5
    network.save_pretrained(folder)
    return folder


def test_calibrate_finds_layer_and_channel(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("To be, or not to be, that is the question. " * 5)
    given = ["calibrate", model, "--text", str(text), "--tokens", "100", "--json", str(out)]
    assert run_command_line(given) == 0
    assert capsys.readouterr().out == f"HiddenOutlier(channel={CHANNEL}, layer=1)\n"
    told = json.loads(out.read_text())
    assert told["tokens"] == 100
    found = told["outlier"]
    assert (found["layer"], found["channel"]) == (1, CHANNEL)
    assert found["largest"][1] > 4 * found["largest"][0]
    network: Any = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([list(range(5, 60))])
    with torch.no_grad():
        state = network(ids, output_hidden_states=True).hidden_states[1][0, :, CHANNEL]
    assert outlier_of(network, ids[0]).tokens == tuple(state.abs().topk(5).indices.tolist())


def test_calibrate_says_that_nothing_stands_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, text = save_model(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question.")
    assert run_command_line(["calibrate", folder, "--text", str(text)]) == 2
    assert "model: no token stands out" in capsys.readouterr().err
    assert run_command_line(["calibrate", folder, "--text", str(text), "--plot", "x.png"]) == 2
    assert "--plot must not be given to calibrate" in capsys.readouterr().err
