"""What must stay of a prompt, on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import adakv
from adakv.cli.inputs import InputError, load_model
from adakv.cli.main import run_command_line
from adakv.cli.protect import system_spans, tokens_with
from adakv.eval import data
from test_cli import assert_refused

CPU = torch.device("cpu")
TEMPLATE = (
    "{% if messages[0].role != 'system' %}system: Be kind.|{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}|{% endfor %}model: "
)
LONG = "It was the best of times, it was the worst of times. " * 6


@pytest.fixture
def chat(model: str, tmp_path: Path) -> str:
    """The tiny model with a chat template; its tokens are bytes."""
    folder = tmp_path / "chat"
    shutil.copytree(model, folder)
    _, tokenizer = load_model(model, dtype=torch.float32, device=CPU)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("content", ["Who?", "0 is a number", "xylophones", " x0", "0"])
@pytest.mark.parametrize("system", [None, "Say little, and that politely."])
def test_the_system_prompt_ends_where_the_user_begins(chat: str, content: str, system: str | None):
    _, tokenizer = load_model(chat, dtype=torch.float32, device=CPU)
    messages = [{"role": "user", "content": content}, {"role": "user", "content": "And more"}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    before = f"system: {system or 'Be kind.'}|user: "
    assert system_spans(tokenizer, messages) == [(0, len(before))]
    with pytest.raises(InputError, match=r"no message of a user, but of \['system'\]"):
        system_spans(tokenizer, [{"role": "system", "content": "Be kind."}])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert system_spans(tokenizer, [{"role": "user", "content": content}]) == []


def written(path: Path, command: list[str]) -> list[int]:
    options = ["--policy", "ada_snapkv", "--budget", "80", "--dtype", "float32"]
    assert run_command_line([*command, *options, "--max-new-tokens", "6", "--json", str(path)]) == 0
    (run,) = json.loads(path.read_text())["runs"]
    tokens: list[int] = run["tokens"]
    return tokens


def test_generate_protects_what_it_is_told(chat: str, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text(LONG)
    network, tokenizer = load_model(chat, dtype=torch.float32, device=CPU)
    question, before = "Which?", len("system: Be kind.|user: ")
    content = f"{LONG}\n\n{question}".strip()
    framed = f"system: Be kind.|user: {content}|model: "
    command, options = ["generate", chat, str(text)], ["--protect", "3:9", "--protect", "70:80"]
    commas = [(i, i + 1) for i, character in enumerate(LONG) if character in ",."]
    for words, prompt, spans in (
        ([], LONG, [(3, 9), (70, 80)]),
        (["--protect-tokens", ",", "--protect-tokens", "."], LONG, [(3, 9), (70, 80), *commas]),
        (["--question", question, "--protect-system"], framed, [(3, 9), (70, 80), (0, before)]),
    ):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with adakv.attach(network):
            cache = adakv.Cache(network, "ada_snapkv", 80, protect=spans)
            expected = network.generate(
                ids, past_key_values=cache, max_new_tokens=6, do_sample=False
            )[0, ids.shape[1] :]
        found = written(tmp_path / "run.json", [*command, *options, *words])
        assert found == expected.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--protect", "5"], "'5' must be BEGIN:END, two numbers of tokens"),
        (["--protect", "9:3"], "'9:3' must be BEGIN:END"),
        (["--protect=-1:3"], "'-1:3' must be BEGIN:END"),
        (
            ["--protect", "0:40"],
            "72 must stay in every kv head, and one of layer 0 has room",
        ),
        (["--protect-tokens", ""], "a text must not be empty"),
        (["--protect-tokens", "t"], "has 48 protected tokens"),
        (["--protect-system"], "--protect-system needs --question and a chat template"),
        (["--protect", "0:10", "--protect-system", "--question", "Who?"], None),
        (["--protect", "20:50", "--protect-system", "--question", "Who?"], "has 50 protected tok"),
    ],
)
def test_what_can_not_be_protected_is_refused(
    chat: str,
    options: list[str],
    message: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    text = tmp_path / "text.txt"
    text.write_text(LONG)
    command = ["generate", chat, str(text), "--policy", "ada_snapkv", "--budget", "64", *options]
    if message is None:
        assert run_command_line([*command, "--max-new-tokens", "2"]) == 0
    else:
        assert_refused(command, message, capsys)


def test_many_prompts_protect_each_its_own(
    chat: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    systems = ["Be kind.", "Say little."]
    lines: list[dict[str, Any]] = [
        {"messages": [{"role": "system", "content": x}, {"role": "user", "content": LONG}]}
        for x in systems
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    options = ["--policy", "ada_snapkv", "--budget", "80", "--dtype", "float32"]
    command = ["generate", chat, "--prompts", str(prompts), "--out", str(out), *options]
    command += ["--max-new-tokens", "5", "--protect", "40:46", "--protect-system"]
    command += ["--protect-tokens", "m"]
    assert run_command_line(command) == 0
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert results[0]["settings"]["protect"] == ["40:46"]
    assert results[0]["settings"]["protect_tokens"] == ["m"]
    assert results[0]["settings"]["protect_system"] is True
    assert run_command_line(command) == 0  # they are known again
    network, tokenizer = load_model(chat, dtype=torch.float32, device=CPU)
    for system, result in zip(systems, results, strict=True):
        before = f"system: {system}|user: "
        ids = tokenizer(f"{before}{LONG.strip()}|model: ")["input_ids"]
        spans = [(40, 46), (0, len(before))]
        given: dict[str, Any] = {"policy": "ada_snapkv", "budget": 80, "max_new_tokens": 5}
        given |= {"protect": spans, "protect_tokens": tokenizer("m")["input_ids"]}
        (alone,) = adakv.generate_batch(network, [ids], **given)
        assert result["tokens"] == alone.tokens
    capsys.readouterr()
    prompts.write_text(json.dumps({"prompt": LONG}))
    refused = [*command, "--overwrite"]
    assert_refused(refused, f"{prompts}:1: --protect-system needs messages, got prompt", capsys)


def test_eval_protects_in_every_prompt(
    model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "eval.json"
    command = ["eval", model, "--text", text, "--tokens", "300", "--prompts", "1"]
    command += ["--policies", "ada_snapkv", "--shares", "1/4"]
    assert run_command_line([*command, "--protect", "0:20", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["protect"] == ["0:20"]
    capsys.readouterr()
    message = "protect: sequence 0 has 60 protected tokens; with the policy's window of 32 entries"
    assert_refused([*command, "--protect", "0:60"], message, capsys)
    message = "--protect-tokens doesn't go with --written"
    assert_refused([*command, "--protect-tokens", ".", "--written", "8"], message, capsys)


def test_eval_protects_tokens_by_their_text(
    model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Spans of the spaces of the one prompt, found here, are the same."""
    command = ["eval", model, "--text", text, "--tokens", "300", "--prompts", "1"]
    command += ["--policies", "streaming", "--shares", "1/2"]
    records, kl = tmp_path / "records", []
    _, tokenizer = load_model(model, dtype=torch.float32, device=CPU)
    (item,) = data.continuations(text, tokenizer, data.Size(300, 1, 1))[:1]
    (space,) = tokenizer(" ")["input_ids"]
    spans = [f"{i}:{i + 1}" for i, token in enumerate(item.prompt) if token == space]
    assert spans
    for options in (
        [],
        ["--protect-tokens", " "],
        [x for span in spans for x in ("--protect", span)],
    ):
        records.unlink(missing_ok=True)
        assert run_command_line([*command, *options, "--records", str(records)]) == 0
        about, *found = map(json.loads, records.read_text().splitlines())
        assert about.get("protect_tokens") == ([" "] if "--protect-tokens" in options else None)
        kl.append([record["kl"] for record in found])
    assert kl[1] == kl[2] != kl[0]


def test_tokens_are_known_by_a_text_in_them(model: str):
    _, tokenizer = load_model(model, dtype=torch.float32, device=CPU)
    prompts = [tokenizer(x)["input_ids"] for x in ("a, b\n", "c; a\n\n")]
    wanted = {*tokenizer("\n,")["input_ids"]}
    assert {*tokens_with(tokenizer, ["\n", ",", "d"], prompts)} == wanted
    assert tokens_with(tokenizer, [], prompts) == []
