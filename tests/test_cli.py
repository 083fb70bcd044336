"""The command line, on a tiny random model in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import adakv
from adakv.cli.commands import run_command_line
from small_model import LIMIT, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 10)
    return str(path)


def test_info_names_backends_and_policies(capsys: pytest.CaptureFixture[str]):
    assert run_command_line(["info"]) == 0
    out = capsys.readouterr().out
    for word in (*adakv.policies(), *adakv.backends(), adakv.__version__, torch.__version__):
        assert word in out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["generate", "--help"], ["--version"]])
def test_help_is_no_error(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert run_command_line(arguments) == 0
    assert "adakv" in capsys.readouterr().out


def test_generate_writes_what_it_found(model: str, text: str, tmp_path: Path):
    json_path, plot_path = tmp_path / "new" / "run.json", tmp_path / "kept.png"
    command = ["generate", model, text, "--policy", "critical_ada_snapkv", "--budget", "48"]
    options = ["--max-new-tokens", "5", "--json", str(json_path), "--plot", str(plot_path)]
    assert run_command_line([*command, *options]) == 0
    (run,) = json.loads(json_path.read_text())["runs"]
    assert run["prompt_tokens"] == len(Path(text).read_text())
    assert len(run["tokens"]) == 5
    assert [sum(layer) for layer in run["kept"]] == [2 * 48, 2 * 48]
    assert 0 < run["cache_bytes"] < run["full_bytes"] / 2
    assert plot_path.read_bytes().startswith(b"\x89PNG")


def test_generate_with_everything_kept_agrees_with_the_full_cache(
    model: str, text: str, tmp_path: Path
):
    path = tmp_path / "run.json"
    command = ["generate", model, text, "--question", "What was it?", "--ratio", "1"]
    options = ["--compare-full", "--dtype", "float32", "--max-new-tokens", "6"]
    assert run_command_line([*command, *options, "--json", str(path)]) == 0
    full, kept = json.loads(path.read_text())["runs"]
    assert full["same_choice"] is None
    assert full["kept"] == []
    assert kept["tokens"] == full["tokens"]
    assert kept["same_choice"] == 1
    assert kept["same_start"] == 6


def test_demo_compares_three_caches(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "demo.json"
    options = ["--tokens", "600", "--max-new-tokens", "4", "--ratio", "0.2", "--json", str(path)]
    assert run_command_line(["demo", model, *options]) == 0
    full, *runs = json.loads(path.read_text())["runs"]
    assert [run["title"] for run in runs] == ["ada_snapkv", "critical_ada_snapkv"]
    assert runs[0]["cache_bytes"] == runs[1]["cache_bytes"] < full["cache_bytes"] / 3
    out = capsys.readouterr().out
    assert all(run["title"] in out for run in (full, *runs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "adasnap"], "unknown policy 'adasnap'; known are streaming, random, snapkv"),
        (["--budget", "64", "--ratio", "0.5"], "give --budget or --ratio, not both"),
        (["--budget", "0"], "--budget must be at least 1, got 0"),
        (["--budget", "8"], "budget must be at least 32"),
        (["--budget", "many"], "'many' is not a valid integer"),
        (["--ratio", "1.5"], "--ratio must be above 0 and at most 1, got 1.5"),
        (["--ratio", "nan"], "--ratio must be above 0 and at most 1, got nan"),
        (["--max-new-tokens", "0"], "0 is not in the range"),
        (["--max-new-tokens", str(LIMIT)], f"but the model takes {LIMIT} in all"),
        (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["--device", "meta"], "--device must be cpu or cuda, got 'meta'"),
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--json", "/proc/no/run.json"], "/proc/no/run.json can't be written"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(
    model: str, text: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    command = ["generate", model, text]
    if "--json" in options:
        command += ["--max-new-tokens", "1"]
    assert_refused([*command, *options], message, capsys)


@pytest.mark.skipif("cuda" in adakv.backends(), reason="there is a CUDA device")
def test_missing_cuda_says_why(model: str, text: str, capsys: pytest.CaptureFixture[str]):
    reason = adakv.cuda_unavailable_reason()
    assert reason
    assert_refused(["generate", model, text, "--device", "cuda"], reason, capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't be read: No such file or directory"),
        (b"\xff\xfe\x00", "is not UTF-8 text: byte 0 can't be read"),
        (b" \n", "holds no text"),
    ],
)
def test_unreadable_texts_are_refused(
    content: bytes | None, message: str, model: str, tmp_path: Path, capsys
):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert_refused(["generate", model, str(path)], f"{path} {message}", capsys)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.gguf", None, "can't be read: No such file or directory"),
        ("model.gguf", b"PK\x03\x04", "is not a GGUF file"),
        ("model.gguf", b"GGUF\x03\0\0\0", "can't be loaded"),
        ("model.bin", b"", "is no model: give a folder, a .gguf file or a name on the hub"),
        ("missing", None, "is no model: give a folder, a .gguf file or a name on the hub"),
        ("empty/", None, "can't be loaded"),
    ],
)
def test_unreadable_models_are_refused(
    name: str, content: bytes | None, message: str, text: str, tmp_path: Path, capsys
):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    if name.endswith("/"):
        path.mkdir()
    assert_refused(["generate", str(path), text], message, capsys)


def assert_refused(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(command) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("adakv: ")
    assert captured.err.count("\n") == 1
