"""adakv calibrate: where the tokens of a model stand out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import adakv
from adakv.cli.main import run_command_line
from adakv.eval.calibration import calibration, channels_and_shares, outlier_of
from adakv.hf.attachment import CACHE
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
    assert (told["kind"], told["version"]) == ("adakv calibration", 1)
    assert (told["model"], told["tokens"], told["ratio"]) == (model, 100, 0.25)
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
    out = tmp_path / "out.json"
    assert run_command_line(["calibrate", folder, "--text", str(text), "--json", str(out)]) == 0
    assert capsys.readouterr() == ("", "no token stands out\n")
    assert json.loads(out.read_text())["outlier"] is None


def test_channels_are_those_of_queries_and_keys(model: str) -> None:
    network: Any = AutoModelForCausalLM.from_pretrained(model)
    ids, asked = torch.tensor([list(range(5, 60))]), []
    for layer in network.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda _m, _i, out: asked.append(out))
    cache = DynamicCache()
    with torch.no_grad():
        network(ids, past_key_values=cache)
        before = torch.stack(asked)  # [L, 1, T, Hq * D]
        channels, _ = channels_and_shares(network, ids[0], 0.5)
    heads, dim = network.config.num_key_value_heads, channels.query.shape[2]
    cos, sin = network.model.rotary_emb(before, torch.arange(55)[None])
    for i, layer in enumerate(cache.layers):
        q = before[i].view(1, 55, -1, dim).transpose(1, 2)
        turned, _ = apply_rotary_pos_emb(q, q, cos, sin)
        mean = turned[0].abs().mean(1).view(heads, -1, dim).mean(1)
        torch.testing.assert_close(channels.query[i], mean)
        keys = layer.keys[0]
        torch.testing.assert_close(channels.range[i], keys.amax(1) - keys.amin(1))


def test_shares_become_the_budgets_of_a_profile(model: str, tmp_path: Path) -> None:
    """A file gives a prompt the budgets that were measured on it."""
    network: Any = AutoModelForCausalLM.from_pretrained(model)
    ids, out = torch.arange(5, 85), tmp_path / "out.json"
    told = calibration(network, ids, 0.5, name="it")
    out.write_text(json.dumps(told))
    shares = torch.tensor(told["shares"])
    assert shares.shape == (network.config.num_hidden_layers, network.config.num_key_value_heads)
    assert shares.sum() == shares.numel() * (40 - 1)
    policy = f"PromptAttention(window=1) * Profile(file={str(out)!r}) * TopScore()"
    with adakv.attach(network), torch.no_grad():
        cache = adakv.Cache(network, policy, ratio=0.5)
        network(ids[None], **{CACHE: cache})
    assert cache.stats()["lengths"][:, 0].long().equal(shares + 1)
