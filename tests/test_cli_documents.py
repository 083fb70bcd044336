"""``adakv compress``, ``shrink`` and ``ask``: a text is read once, and asked about later."""

from __future__ import annotations

from pathlib import Path

import pytest

from adakv.cli.documents import frame_of
from adakv.cli.main import run_command_line

pytestmark = pytest.mark.model


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("The ferry to Torvay leaves at eight. " * 10)
    return path


def test_a_text_is_read_once_and_asked_about(
    model: str, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "book.kv"
    arguments = ["compress", model, str(book), "--out", str(out), "--ratio", "0.5"]
    assert run_command_line([*arguments, "--dtype", "float32", "--device", "cpu"]) == 0
    assert out.exists() and "370 tokens read" in capsys.readouterr().err
    questions = ["--question", "When?", "--question", "Where to?", "--question", "When?"]
    assert run_command_line(["ask", str(out), *questions, "--max-new-tokens", "12"]) == 0
    answers = capsys.readouterr().out.split("\n")
    assert len(answers) >= 3


def test_less_of_a_text_is_kept_without_reading_it_again(
    model: str, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large, small = str(tmp_path / "large.kv"), str(tmp_path / "small.kv")
    place = ["--dtype", "float32", "--device", "cpu"]
    arguments = ["compress", model, str(book), "--out", large, "--ratio", "0.6", *place]
    assert run_command_line(arguments) == 0
    assert run_command_line(["shrink", large, "--out", small, "--ratio", "0.15"]) == 0
    assert f"in {small}" in capsys.readouterr().err
    assert Path(small).stat().st_size < 0.8 * Path(large).stat().st_size
    question = ["--question", "When?", "--max-new-tokens", "4"]
    assert run_command_line(["ask", small, *question]) == 0
    for arguments, message in (
        ([large, "--out", large, "--ratio", "0.1"], "would overwrite"),
        ([large, "--out", small], "give either --ratio or --budget"),
        ([large, "--out", small, "--ratio", "0.1", "--budget", "99"], "give either"),
        ([large, "--out", small, "--ratio", "7"], "ratio must be above 0"),
    ):
        assert run_command_line(["shrink", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_what_is_wrong_is_one_line(
    model: str, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = str(tmp_path / "none.kv")
    for arguments, message in (
        (["ask", none, "--question", "Why?"], "can't be read"),
        (["ask", str(book), "--question", "Why?"], "is no safetensors file"),
        (["ask", str(book)], "--question"),
        (["compress", model, str(book)], "--out"),
        (["compress", model, str(book), "--out", str(book)], "would overwrite"),
    ):
        assert run_command_line(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error


def test_a_question_has_its_place_in_a_chat_template() -> None:
    class Tokenizer:
        chat_template = "yes"

        def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
            return f"<user>{messages[0]['content']}</user><bot>"

    assert frame_of(Tokenizer(), "A text.") == ("<user>A text.\n\n", "", "</user><bot>")
    Tokenizer.chat_template = ""
    assert frame_of(Tokenizer(), "A text.") == ("A text.", "\n\nQuestion: ", "\nAnswer:")
