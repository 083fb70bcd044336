"""Words, files and outputs as nobody means them: one line and exit code 2."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest

import adakv
from adakv.cli.main import run_command_line
from adakv.cli.prompts import read_prompts
from adakv.eval.files import parse_json, read_text

DIGITS = "1" * 5000
HALF = "\udcff"  # what Python makes of a byte that is not UTF-8


def assert_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("adakv: ")
    assert captured.err.count("\n") == 1
    assert len(captured.err) < 4000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "a\0b", "TEXT"], r"'a\x00b' can't be the name of a file"),
        (["generate", "\ud800", "TEXT"], r"'\ud800' can't be the name of a file"),
        (["generate", "MODEL", "a\0b"], "can't be the name of a file"),
        (["generate", "MODEL", ""], "'' can't be the name of a file"),
        (["generate", "MODEL", "TEXT", "--json", "a\0b"], "can't be the name of a file"),
        (["generate", "MODEL", "TEXT", "--question", HALF], "character 0 is not of UTF-8 text"),
        (["generate", "MODEL", "--prompts", "a\0", "--out", "x"], "can't be the name of a file"),
        (["generate", "MODEL", "--prompts", "x", "--out", "a\0"], "can't be the name of a file"),
        (["report", "MODEL", "TEXT", "--out", "a\0b"], "can't be the name of a file"),
        (["demo", "\ud800"], "can't be the name of a file"),
        (["demo", "MODEL", "--question", HALF], "is not of UTF-8 text"),
        (["eval", "MODEL", "--text", "a\0b"], "can't be the name of a file"),
        (["generate", "MODEL", "/dev/zero"], "/dev/zero can't be read: it is a device"),
        (["generate", "MODEL", "a" * 5000], "can't be read: File name too long"),
        (["generate", "MODEL", "TEXT", "--budget", DIGITS], "is not a valid integer"),
        (["generate", "MODEL", "TEXT", "--ratio", DIGITS], "--ratio must be above 0"),
        (["generate", "MODEL", "TEXT", "--policy", f"Recency(pinned={DIGITS})"], "--policy"),
        (["generate", "MODEL", "TEXT", "--policy", "-" * 10**5 + "(1)"], "--policy"),
        (["generate", "MODEL", "TEXT", "--policy", "a\0(1)"], "--policy"),
        (["generate", "MODEL", "TEXT", "--policy", HALF], "--policy"),
        (["eval", "MODEL", "--text", "TEXT", "--shares", f"1/{DIGITS}"], "--shares must be"),
        (["eval", "MODEL", "--text", "TEXT", "--shares", "1e-400"], "--shares must be"),
        (["eval", "MODEL", "--text", "TEXT", "--tokens", DIGITS], "is not a valid integer"),
        (["generat", "MODEL"], "no such command 'generat': did you mean 'generate'?"),
        ([HALF], "no such command"),
    ],
    ids=lambda value: ascii(value)[1:40],
)
def test_hostile_words_are_one_line(words: list[str], message: str, text: str, capsys):
    """Before any model is loaded: there is none."""
    assert_refused([text if word == "TEXT" else word for word in words], message, capsys)


def test_a_question_is_not_markup(model: str, text: str, capsys):
    words = ["--tokens", "300", "--max-new-tokens", "2", "--ratio", "0.3"]
    assert run_command_line(["demo", model, "--question", "[/bold] [red]:smile:", *words]) == 0
    assert "[/bold] [red]:smile:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, ":1: JSON is nested too deeply"),
        ('{"prompt": ' + "[" * 900 + "]" * 900 + "}", ":1: prompt must be a string"),
        (f'{{"input_ids": [{DIGITS}]}}', ":1: JSON holds a number of too many digits"),
        (f'{{"max_new_tokens": {DIGITS}}}', ":1: JSON holds a number of too many digits"),
        (f'{{"input_ids": [{DIGITS[:100]}]}}', ":1: input_ids must be [T] integers of 64 bits"),
        (r'{"prompt": "\ud800"}', ":1: JSON holds half a character, a lone surrogate"),
        ('{"prompt": NaN}', ":1: prompt must be a string that isn't empty, got NaN"),
        ('{"prompt": "a", "max_new_tokens": 1e400}', ":1: max_new_tokens must be an integer"),
    ],
    ids=lambda value: value[:30],
)
def test_hostile_lines_are_refused(line: str, message: str, model: str, tmp_path: Path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(line)
    words = ["generate", model, "--prompts", str(prompts), "--out", str(tmp_path / "out")]
    assert_refused(words, f"{prompts}{message}", capsys)


def test_zeros_in_a_prompt_are_characters(model: str, tmp_path: Path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(json.dumps({"prompt": "a\0b"}))
    words = ["--max-new-tokens", "2", "--policy", "streaming", "--budget", "5"]
    command = ["generate", model, "--prompts", str(prompts), "--out", str(out), *words]
    assert run_command_line(command) == 0
    assert json.loads(out.read_text())["prompt_tokens"] == 3


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfonce")
    assert read_text(str(path)) == "once"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n\xef\xbb\xbf\n\xef\xbb\xbf{"prompt": "b"}\n')
    assert [line.prompt for line in read_prompts(str(path))] == ["a", "b"]


@pytest.mark.parametrize("value", [r'"\ud83d\ude00"', r'"\\ud800"', "1e400", "[[[]]]"])
def test_whole_characters_are_json(value: str):
    assert parse_json(value) == json.loads(value)


def test_a_full_disk_is_said(model: str, text: str, tmp_path: Path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Who?"}\n')
    short = ["--max-new-tokens", "2", "--policy", "streaming", "--budget", "5"]
    files = ["--prompts", str(prompts), "--out", "/dev/full"]
    message = "/dev/full can't be written: No space left on device"
    assert_refused(["generate", model, *files, *short], message, capsys)
    assert_refused(["generate", model, text, "--json", "/dev/full", *short], message, capsys)


@pytest.mark.parametrize("words", [["info"], ["--help"]])
def test_a_full_standard_output_is_said(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        message = "standard output can't be written: No space left on device"
        assert_refused(words, message, capsys)


@pytest.mark.parametrize("words", [["info"], ["--help"]])
def test_a_reader_that_left_is_said(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        monkeypatch.setattr(sys, "stderr", sys.stderr)  # click puts a wrapper there
        assert_refused(words, "standard output can't be written: Broken pipe", capsys)


def test_a_closed_standard_input_is_said(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert_refused(["generate", "MODEL", "-"], "standard input is closed", capsys)


def test_a_closed_standard_output_is_said(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)  # as Python starts where it is closed
    assert_refused(["info"], "standard output is closed", capsys)


def test_an_output_that_cannot_show_a_character_escapes_it(
    model: str, text: str, monkeypatch: pytest.MonkeyPatch
):
    data = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(data, encoding="ascii"))
    words = ["demo", model, "--question", "é?", "--tokens", "300", "--max-new-tokens", "2"]
    assert run_command_line([*words, "--ratio", "0.3"]) == 0
    assert rb"\xe9?" in data.getvalue()


def test_info_fits_80_columns(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert run_command_line(["info"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_policies_shows_how_each_is_written_down(capsys):
    for name in adakv.policies():
        policy = adakv.policy.get(name)
        assert run_command_line(["policies", name]) == 0
        assert capsys.readouterr().out.strip() == str(policy)
        assert adakv.policy.get(str(policy)) == policy


@pytest.fixture
def model_with_code(model: str, tmp_path: Path) -> tuple[str, Path]:
    """A folder whose config names Python code of its own, and the file that it writes."""
    folder, trace = tmp_path / "model", tmp_path / "it ran"
    folder.mkdir()
    for path in Path(model).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config |= {"model_type": "its_own", "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(trace)!r}).touch()\n"
        "class Config(LlamaConfig):\n    model_type = 'its_own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    return str(folder), trace


def test_code_of_a_model_runs_only_if_it_may(
    model_with_code: tuple[str, Path], text: str, monkeypatch: pytest.MonkeyPatch, capsys
):
    folder, trace = model_with_code
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\ny\n"))  # transformers would ask
    assert_refused(["generate", folder, text], "--trust-remote-code", capsys)
    assert not trace.exists()
    words = ["--max-new-tokens", "2", "--budget", "48", "--trust-remote-code"]
    assert run_command_line(["generate", folder, text, *words]) == 0
    assert trace.exists()
