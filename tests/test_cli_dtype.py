"""The type of weights and cache: the model's own where that is fast, unless one is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adakv.cli.inputs import load_model, multiplies_bfloat16
from adakv.cli.main import run_command_line

CPU = torch.device("cpu")


@pytest.fixture
def saved(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """The tiny model, saved in another type."""
    folder = str(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(model, dtype=request.param).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def processor(monkeypatch: pytest.MonkeyPatch, *instructions: str) -> None:
    found = dict.fromkeys(("avx2", *instructions), True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        ([], False),
        (["avx512_f", "avx512_vnni", "amx_tile"], False),
        (["avx512_bf16"], True),
        (["amx_bf16"], True),
        (["bf16"], True),
    ],
)
def test_a_cpu_multiplies_bfloat16_if_it_has_instructions_for_it(
    instructions: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
):
    processor(monkeypatch, *instructions)
    assert multiplies_bfloat16(CPU) is expected
    assert multiplies_bfloat16(torch.device("cuda"))


def test_a_torch_that_tells_nothing_is_taken_for_slow(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not multiplies_bfloat16(CPU)


@pytest.mark.parametrize(
    ("saved", "instructions", "expected"),
    [
        (torch.bfloat16, ["amx_bf16"], torch.bfloat16),
        (torch.bfloat16, [], torch.float32),
        (torch.float16, ["amx_bf16"], torch.float32),
        (torch.float16, [], torch.float32),
        (torch.float32, ["amx_bf16"], torch.float32),
    ],
    indirect=["saved"],
)
def test_a_model_loads_in_its_own_type_where_that_is_fast(
    saved: str, instructions: list[str], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    processor(monkeypatch, *instructions)
    network, _ = load_model(saved, dtype=None, device=CPU)
    assert {weight.dtype for weight in network.parameters()} == {expected}
    network, _ = load_model(saved, dtype=torch.float16, device=CPU)
    assert network.dtype == torch.float16


@pytest.mark.parametrize("saved", [torch.bfloat16], indirect=True)
@pytest.mark.parametrize(
    ("instructions", "options", "expected"),
    [
        (["amx_bf16"], [], "bfloat16"),
        ([], ["--kv-dtype", "int8"], "bfloat16"),
        ([], [], "float32"),
        ([], ["--dtype", "auto"], "float32"),
        ([], ["--dtype", "bfloat16"], "bfloat16"),
    ],
)
def test_the_type_is_said(
    saved: str,
    instructions: list[str],
    options: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    processor(monkeypatch, *instructions)
    text, path = tmp_path / "text.txt", tmp_path / "run.json"
    text.write_text("It was the best of times, it was the worst of times. " * 3)
    sizes = ["--budget", "48", "--max-new-tokens", "2", "--json", str(path)]
    assert run_command_line(["generate", saved, str(text), *sizes, *options]) == 0
    assert f"2 written, in {expected}" in capsys.readouterr().out
    assert json.loads(path.read_text())["dtype"] == expected
    pages = ["--out", str(tmp_path / "pages"), *sizes, *options]
    assert run_command_line(["report", saved, str(text), *pages]) == 0
    assert expected in capsys.readouterr().out
    assert json.loads(path.read_text())["dtype"] == expected


def test_evaluations_say_their_type(model: str, tmp_path: Path, capsys):
    text, path = tmp_path / "text.txt", tmp_path / "eval.json"
    text.write_text("It was the best of times, it was the worst of times. " * 30)
    sizes = ["--tokens", "200", "--prompts", "1", "--shares", "1/2", "--policies", "snapkv"]
    command = ["eval", model, "--text", str(text), *sizes, "--json", str(path)]
    assert run_command_line(command) == 0
    assert f"{Path(model).name} in float32" in capsys.readouterr().out
    assert json.loads(path.read_text())["dtype"] == "float32"
