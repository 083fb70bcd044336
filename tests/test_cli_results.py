"""Results of many prompts: what a stopped run wrote stays, and no input is ever overwritten."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from adakv.cli.inputs import InputError
from adakv.cli.main import run_command_line
from adakv.cli.results import ResultFile
from adakv.hf.generate import BatchResult

PROMPTS = ["It was the best of times.", "It was the worst of times.", "It was the age of wisdom."]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


def command(model: str, prompts: Path, out: str | Path, *more: str) -> list[str]:
    files = ["--prompts", str(prompts), "--out", str(out)]
    sizes = ["--policy", "streaming", "--budget", "8", "--max-new-tokens", "3"]
    return ["generate", model, *files, *sizes, *more]


def test_results_are_there_as_soon_as_they_are_written(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    results = ResultFile(str(path), overwrite=False)
    results.check([[1]] * 3, [2] * 3, {})
    results.begin()
    for index in (2, 0, 1):
        results.write(BatchResult(index, 5, [7] * index, "é" * index, "eos"))
        assert json.loads(path.read_text().splitlines()[-1])["index"] == index
    results.finish()
    results.close()
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_a_stopped_run_goes_on(model: str, prompts: Path, tmp_path: Path, capsys):
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    assert run_command_line(command(model, prompts, whole)) == 0
    first, second, third = whole.read_text().splitlines(keepends=True)
    changed = third.replace('"text": "', '"text": "done before ')
    out.write_text(changed + first[:20])  # killed while it wrote its second line
    assert run_command_line(command(model, prompts, out)) == 0
    assert out.read_text() == first + second + changed
    assert "1 prompts were done before; 2 prompts with" in capsys.readouterr().err
    assert run_command_line(command(model, prompts, out)) == 0
    assert out.read_text() == first + second + changed
    assert run_command_line(command(model, prompts, out, "--overwrite")) == 0
    assert out.read_text() == whole.read_text()


def test_a_refused_run_empties_nothing(model: str, prompts: Path, tmp_path: Path, capsys):
    out = tmp_path / "out.jsonl"
    assert run_command_line(command(model, prompts, out)) == 0
    before = out.read_bytes()
    prompts.write_text(prompts.read_text() + "{}\n")
    for more in ([], ["--overwrite"]):
        assert run_command_line(command(model, prompts, out, *more)) == 2
        assert out.read_bytes() == before
    prompts.write_text('{"prompt": "Another."}\n')
    capsys.readouterr()
    assert run_command_line(command(model, prompts, out)) == 2
    assert "holds the results of other prompts" in capsys.readouterr().err
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (
            ["--policy", "random", "--budget", "40"],
            "policy streaming, now random, budget 8, now 40",
        ),
        (["--policy", "streaming", "--budget", "9"], "budget 8, now 9"),
        (
            ["--policy", "streaming", "--ratio", "0.9"],
            "budget 8, now None, ratio None, now 0.9",
        ),
        (
            ["--policy", "streaming", "--budget", "8", "--dtype", "bfloat16"],
            "dtype float32, now bfloat16",
        ),
    ],
)
def test_results_of_other_settings_are_refused_and_kept(
    now: list[str], message: str, model: str, prompts: Path, tmp_path: Path, capsys
):
    out = tmp_path / "out.jsonl"
    assert run_command_line(command(model, prompts, out, "--dtype", "float32")) == 0
    before = out.read_bytes()
    files = ["--prompts", str(prompts), "--out", str(out), "--max-new-tokens", "3"]
    changed = ["generate", model, *files, "--dtype", "float32", *now]
    assert run_command_line(changed) == 2
    error = capsys.readouterr().err
    assert f"holds results of other settings ({message}, at index 0)" in error
    assert out.read_bytes() == before
    assert run_command_line([*changed, "--overwrite"]) == 0
    assert out.read_bytes() != before


def test_results_of_another_text_of_the_same_length_are_refused(
    model: str, prompts: Path, tmp_path: Path, capsys
):
    out = tmp_path / "out.jsonl"
    assert run_command_line(command(model, prompts, out)) == 0
    before = out.read_bytes()
    prompts.write_text(prompts.read_text().replace("best", "last"))
    assert run_command_line(command(model, prompts, out)) == 2
    assert "the one at index 0 was another text" in capsys.readouterr().err
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"notes\n", b"notes", b"{}\n", b'{"index": 0}\n', b"\xff\n", b"[" * 5000 + b"\n"]
)
def test_files_that_hold_no_results_are_refused_and_kept(content: bytes, tmp_path: Path):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match="holds something else than results"):
        ResultFile(str(path), overwrite=False)
    assert path.read_bytes() == content


@pytest.mark.parametrize("kind", ["same", "dotted", "symbolic link", "hard link"])
def test_prompts_are_never_overwritten(kind: str, prompts: Path, tmp_path: Path, capsys):
    out, before = tmp_path / "link", prompts.read_text()
    if kind == "symbolic link":
        out.symlink_to(prompts)
    elif kind == "hard link":
        os.link(prompts, out)
    else:
        out = prompts
    written = str(out) if kind != "dotted" else f"{tmp_path}/./{prompts.name}"
    for more in ([], ["--overwrite"]):
        assert run_command_line(command("MODEL", prompts, written, *more)) == 2
        assert prompts.read_text() == before


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_texts_and_models_are_never_overwritten(option: str, model: str, tmp_path: Path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times.")
    weights = Path(model) / "model.safetensors"
    before = weights.read_bytes()
    for path in (text, weights):
        assert run_command_line(["generate", model, str(text), option, str(path)]) == 2
        assert "would overwrite" in capsys.readouterr().err
    assert text.read_text() == "It was the best of times."
    assert weights.read_bytes() == before


def test_two_outputs_are_two_files(tmp_path: Path, capsys):
    text, out = tmp_path / "text.txt", str(tmp_path / "out")
    text.write_text("It was the best of times.")
    words = ["generate", "MODEL", str(text), "--json", out, "--plot", out]
    assert run_command_line(words) == 2
    assert "--plot and --json must be two files" in capsys.readouterr().err


def test_results_go_into_a_pipe(model: str, prompts: Path):
    read, write = os.pipe()
    assert run_command_line(command(model, prompts, f"/dev/fd/{write}")) == 0
    os.close(write)
    with open(read, encoding="utf-8") as pipe:
        lines = [json.loads(line) for line in pipe]
    assert sorted(line["index"] for line in lines) == [0, 1, 2]


@pytest.mark.parametrize("out", ["-", "/dev/stdout"])
def test_results_go_behind_what_standard_output_holds(out: str, model: str, prompts: Path, capfd):
    os.write(1, b"before\n")
    assert run_command_line(command(model, prompts, out)) == 0
    before, *lines = capfd.readouterr().out.splitlines()
    assert before == "before"
    assert sorted(json.loads(line)["index"] for line in lines) == [0, 1, 2]
