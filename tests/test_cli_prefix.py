"""``adakv generate --prompts --prefix``: many prompts behind one text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import adakv
from adakv.cli.inputs import load_model
from adakv.cli.main import run_command_line

TEXT = "It was the best of times, it was the worst of times. " * 3


def test_prompts_go_on_behind_a_text(model: str, tmp_path: Path) -> None:
    prompts, text, out = (tmp_path / name for name in ("prompts.jsonl", "book.txt", "out.jsonl"))
    lines = [{"prompt": "Who was it?"}, {"input_ids": [5, 6, 7]}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    text.write_text(TEXT)
    options = ["--budget", "40", "--max-new-tokens", "5", "--dtype", "float32"]
    command = ["generate", model, "--prompts", str(prompts), "--prefix", str(text)]
    command += ["--out", str(out), *options]
    assert run_command_line(command) == 0
    results = [json.loads(line) for line in out.read_text().splitlines()]
    network, tokenizer = load_model(model, dtype=torch.float32, device=torch.device("cpu"))
    expected = adakv.generate_batch(
        network,
        ["Who was it?", [5, 6, 7]],
        prefix=TEXT,
        budget=40,
        max_new_tokens=5,
        tokenizer=tokenizer,
    )
    assert [result["tokens"] for result in results] == [result.tokens for result in expected]
    assert len(results[0]["settings"]["prefix_sha256"]) == 12
    text.write_text(TEXT + "And?")
    assert run_command_line(command) == 2  # the results are those behind another text


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        (
            {"messages": [{"role": "user", "content": "Who?"}]},
            [],
            "messages don't go with --prefix",
        ),
        ({"prompt": "Who?"}, ["--protect-system"], "--protect-system doesn't go with --prefix"),
        ({"prompt": "Who?"}, ["--protect", "0:40"], "prefix has 40 protected tokens"),
    ],
)
def test_what_does_not_go_with_a_prefix_is_refused(
    line: dict[str, object],
    options: list[str],
    message: str,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts, text = tmp_path / "prompts.jsonl", tmp_path / "book.txt"
    prompts.write_text(json.dumps(line))
    text.write_text(TEXT)
    command = ["generate", model, "--prompts", str(prompts), "--prefix", str(text)]
    command += ["--out", str(tmp_path / "out.jsonl"), "--budget", "40", *options]
    assert run_command_line(command) == 2
    assert message in capsys.readouterr().err


def test_a_prefix_goes_with_many_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["generate", "MODEL", "text", "--prefix", "x"]) == 2
    assert "--prefix goes only with --prompts" in capsys.readouterr().err
