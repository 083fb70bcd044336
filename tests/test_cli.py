"""The command line, on a tiny random model in a folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import pytest
import torch

import adakv
from adakv.cli.inputs import InputError, load_model
from adakv.cli.main import cli, run_command_line
from adakv.cli.measure import Setting, run_all
from adakv.cli.prompts import read_prompts
from adakv.formats import has_tails
from small_model import LIMIT


@pytest.mark.parametrize("command", ["info", "policies"])
def test_what_is_there_fits_eighty_columns(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    assert run_command_line([command]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "\u2026" not in out, "something is cut off"
    expected = {
        "info": (*adakv.backends(), adakv.__version__, torch.__version__),
        "policies": adakv.policies(),
    }
    for word in expected[command]:
        assert word in out


def test_every_policy_has_one_line(capsys: pytest.CaptureFixture[str]):
    assert run_command_line(["policies"]) == 0
    lines = capsys.readouterr().out.partition("* the default")[0].splitlines()
    for name in adakv.policies():
        if "@" not in name:
            assert len([line for line in lines if line.strip().startswith(f"{name} ")]) == 1
    assert run_command_line(["policies", "ada_snapkv"]) == 0
    assert capsys.readouterr().out == "WindowAttention() * Adaptive() * TopScore()\n"


def test_generate_shows_its_text_while_it_writes(model: str):
    class Numbers:
        """Decodes tokens to words."""

        def decode(self, tokens: list[int], **kwargs: object) -> str:
            return " ".join(map(str, tokens))

    network, _ = load_model(model, dtype=torch.float32, device=torch.device("cpu"))
    pieces: list[str] = []
    settings = [Setting("snapkv", budget=48), Setting("ada_snapkv", budget=48)]
    prompt = torch.arange(100)[None]
    runs = run_all(network, Numbers(), prompt, settings, 9, on_text=pieces.append)
    assert len(pieces) >= 8
    assert "".join(pieces).split() == list(map(str, runs[-1].tokens))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "MODEL", "TEXT", "--policy", "adasnapkv"], "did you mean 'ada_snapkv'?"),
        (["generate", "MODEL", "TEXT", "--policy", "best"], "`adakv policies` lists them"),
        (["generate", "MODEL", "TEXT", "--polcy", "snapkv"], "--policy"),
        (["eval", "MODEL", "--text", "TEXT", "--policies", "tovas"], "did you mean 'tova'?"),
        (["policies", "critical_ada"], "did you mean 'critical_ada_snapkv'?"),
        (["polices"], "did you mean 'policies'?"),
        (["generate", "FOLDER/smollm.gguf", "TEXT"], "did you mean 'FOLDER/SmolLM2.gguf'?"),
        (["generate", "FOLDER/SmolLM", "TEXT"], "did you mean 'FOLDER/SmolLM2.gguf'?"),
        (
            ["generate", "MODEL", "TEXT", "--decode-budget", "9", "--decode-policy", "r_kw"],
            "--decode-policy: there is no policy 'r_kw': did you mean 'r_kv'?",
        ),
        (["generate", "MODEL", "FOLDER/SmolLM.gguf"], "did you mean 'FOLDER/SmolLM2.gguf'?"),
        (["eval", "MODEL", "--text", "FOLDER/smol.gguf"], "did you mean 'FOLDER/SmolLM2.gguf'?"),
        (["ask", "FOLDER/SmolLM2.guf", "--question", "?"], "did you mean 'FOLDER/SmolLM2.gguf'?"),
        (["generate"], "Missing argument 'MODEL'. See `adakv generate --help`."),
    ],
)
def test_mistyped_names_are_told_the_nearest(
    arguments: list[str],
    message: str,
    model: str,
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "SmolLM2.gguf").touch()

    def placed(word: str) -> str:
        word = word.replace("FOLDER", str(tmp_path))
        return {"MODEL": model, "TEXT": text}.get(word, word)

    assert_refused(list(map(placed, arguments)), placed(message), capsys)


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


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8", "int4", "int2"])
def test_generate_in_half_of_the_bytes(model: str, text: str, tmp_path: Path, kv_dtype: str):
    runs = []
    for kind in ("auto", kv_dtype):
        path = tmp_path / f"{kind}.json"
        options = ["--ratio", "1", "--kv-dtype", kind, "--dtype", "bfloat16", "--json", str(path)]
        assert run_command_line(["generate", model, text, "--max-new-tokens", "5", *options]) == 0
        runs += json.loads(path.read_text())["runs"]
    assert runs[1]["title"] == f"{runs[0]['title']}, {kv_dtype}"
    plain, quantised = 2 * 16 * 2 + 4, 2 * (16 + (4 if kv_dtype == "int8" else 2)) + 4
    if has_tails(kv_dtype):  # the prompt is short: most of it are the tails
        codes = 2 * 16 * (4 if kv_dtype == "int4" else 2) // 8
        quantised = (codes * 32 + 16 * 4 + 32 * 8) / 32 + 4
    share = runs[1]["cache_bytes"] / runs[0]["cache_bytes"]  # pages are twice as long
    assert 1 <= share / (quantised / plain) < 1.1
    many, out = tmp_path / "many.jsonl", tmp_path / "out.jsonl"
    many.write_text(json.dumps({"prompt": "It was the best"}) + "\n")
    options = ["--kv-dtype", kv_dtype, "--dtype", "bfloat16", "--ratio", "1"]
    command = ["generate", model, "--prompts", str(many), "--out", str(out)]
    assert run_command_line([*command, *options, "--max-new-tokens", "5"]) == 0
    assert json.loads(out.read_text().splitlines()[0])


def test_generate_within_bytes(model: str, text: str, tmp_path: Path):
    """The share of the full cache's bytes decides how many bits there are, and what is kept."""
    runs = []
    for given in (["--kv-dtype", "auto"], []):
        path = tmp_path / "run.json"
        options = ["--budget-bytes", "90%", *given, "--dtype", "bfloat16", "--json", str(path)]
        assert run_command_line(["generate", model, text, "--max-new-tokens", "1", *options]) == 0
        runs += json.loads(path.read_text())["runs"]
    plain, chosen = runs
    assert plain["title"] == adakv.policy.DEFAULT
    assert chosen["title"] == f"{adakv.policy.DEFAULT}, int8"
    assert max(run["cache_bytes"] / run["full_bytes"] for run in runs) < 0.9
    assert sum(map(sum, plain["kept"])) < sum(map(sum, chosen["kept"]))
    many, out = tmp_path / "many.jsonl", tmp_path / "out.jsonl"
    many.write_text(json.dumps({"prompt": "It was the best of times. " * 4}) + "\n")
    command = ["generate", model, "--prompts", str(many), "--out", str(out)]
    options = ["--budget-bytes", "1MiB", "--max-new-tokens", "5"]
    assert run_command_line([*command, *options]) == 0
    settings = json.loads(out.read_text().splitlines()[0])["settings"]
    assert (settings["budget_bytes"], settings["kv_dtype"]) == ("1MiB", None)
    assert settings["dtype"] == "bfloat16"  # which fewer bits stand for


def test_demo_compares_three_caches(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, plot_path = tmp_path / "demo.json", tmp_path / "kept.png"
    options = ["--tokens", "600", "--max-new-tokens", "4", "--ratio", "0.2", "--json", str(path)]
    assert run_command_line(["demo", model, *options, "--plot", str(plot_path)]) == 0
    content = json.loads(path.read_text())
    full, *runs = content["runs"]
    assert [run["title"] for run in runs] == ["critical_ada_snapkv", "model_rank_fusion"]
    assert max(run["cache_bytes"] for run in runs) < full["cache_bytes"] / 3
    for run in (full, *runs):
        assert len(run["texts"]) == len(content["questions"]) == len(run["right"])
        assert run["tokens_per_second"] > 0
    out = capsys.readouterr().out
    assert all(run["title"] in out for run in (full, *runs))
    assert all(question in out for question, _ in content["questions"])
    assert plot_path.read_bytes().startswith(b"\x89PNG")


def test_demo_counts_the_answers_of_the_cache_that_it_names(model: str, tmp_path: Path):
    """With everything kept, compressed caches say what the full one says."""
    path = tmp_path / "demo.json"
    options = ["--tokens", "300", "--max-new-tokens", "5", "--ratio", "1", "--json", str(path)]
    assert run_command_line(["demo", model, *options, "--dtype", "float32"]) == 0
    full, *runs = json.loads(path.read_text())["runs"]
    assert all(run["texts"] == full["texts"] for run in runs)


def test_demo_asks_another_question(model: str, tmp_path: Path, capsys):
    path = tmp_path / "demo.json"
    options = ["--tokens", "300", "--max-new-tokens", "2", "--json", str(path)]
    assert run_command_line(["demo", model, *options, "--question", "Who is who?"]) == 0
    assert "Who is who?" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert content["questions"] == [["Who is who?", None]]
    assert [len(run["texts"]) for run in content["runs"]] == [1, 1, 1]
    assert all(run["right"] == [] for run in content["runs"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--policy", "adasnap"],
            "--policy: there is no policy 'adasnap': did you mean 'ada_snapkv'?",
        ),
        (["--budget", "64", "--ratio", "0.5"], "give --budget or --ratio, not both"),
        (["--budget", "64", "--budget-bytes", "1MB"], "give --budget or --budget-bytes, not both"),
        (["--budget-bytes", "lots"], "--budget-bytes must be bytes, as an integer or a text such"),
        (["--budget-bytes", "1kB"], "budget_bytes must have room for"),
        (["--budget", "0"], "--budget must be at least 1, got 0"),
        (["--budget", "8"], "budget must be at least 36"),
        (["--budget", "many"], "'many' is not a valid integer"),
        (["--ratio", "1.5"], "--ratio must be above 0 and at most 1, got 1.5"),
        (["--ratio", "nan"], "--ratio must be above 0 and at most 1, got nan"),
        (["--max-new-tokens", "0"], "0 is not in the range"),
        (["--max-new-tokens", str(LIMIT)], f"but the model takes {LIMIT} in all"),
        (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["--device", "meta"], "--device must be cpu or cuda, got 'meta'"),
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--kv-dtype", "int3"], "'int3' is not one of"),
        (["--kv-dtype", "mixed9"], "mixed keys must have 2 to 8 bits, got 'mixed9'"),
        (["--kv-dtype", "auto:1/4+int4:1/4"], "tiers must have shares above 0 that sum to 1"),
        (["--kv-dtype", "ranks=1/4"], "a tier's width must be rank= or channels= and a share"),
        (["--kv-dtype", "fp8", "--dtype", "float32"], "take float16 and bfloat16, got"),
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


def test_generate_goes_on_after_many_prompts(model: str, tmp_path: Path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "new" / "results.jsonl"
    text = "It was the best of times, it was the worst of times. " * 3
    lines = [
        {"prompt": text, "max_new_tokens": 9},
        {"input_ids": [5, 6, 7] * 30},
        {"prompt": text[:80], "max_new_tokens": 2},
    ]
    prompts.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    options = ["--budget", "40", "--max-new-tokens", "4", "--max-batch", "2", "--dtype", "float32"]
    command = ["generate", model, "--prompts", str(prompts), "--out", str(out), *options]
    assert run_command_line(command) == 0
    results = [json.loads(line) for line in out.read_text().splitlines()]
    fields = ["index", "prompt_tokens", "tokens", "text", "end", "prompt_sha256", "settings"]
    assert all(list(result) == fields for result in results)
    assert results[0]["settings"] == {
        "adakv": adakv.__version__,
        "model": Path(model).name,
        "dtype": "float32",
        "policy": adakv.policy.DEFAULT,
        "budget": 40,
        "ratio": None,
        "kv_dtype": "auto",
    }
    assert [result["index"] for result in results] == [0, 1, 2]
    assert [result["prompt_tokens"] for result in results] == [len(text), 90, 80]
    assert [result["end"] for result in results] == ["length"] * 3
    network, tokenizer = load_model(model, dtype=torch.float32, device=torch.device("cpu"))
    for line, result, new in zip(lines, results, (9, 4, 2), strict=True):
        assert len(result["tokens"]) == new
        assert result["text"] == tokenizer.decode(result["tokens"])
        given = line.get("input_ids") or tokenizer(line["prompt"])["input_ids"]
        (alone,) = adakv.generate_batch(network, [given], budget=40, max_new_tokens=new)
        assert result["tokens"] == alone.tokens


def test_messages_go_through_the_chat_template(tmp_path: Path, model: str):
    network, tokenizer = load_model(model, dtype=torch.float32, device=torch.device("cpu"))
    prompts = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "Who?"}]
    prompts.write_text(json.dumps({"messages": messages}))
    (line,) = read_prompts(str(prompts))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}!"
    assert tokenizer.decode(line.encode(network, tokenizer, 4)) == "user: Who?!"
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(InputError, match="1: messages don't fit the chat template: no users here"):
        line.encode(network, tokenizer, 4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2: not JSON at column 2"),
        ("[5, 6]", ":2: must be an object, got [5, 6]"),
        ("{}", ":2: give one of prompt, messages, input_ids, got none"),
        ('{"prompt": "a", "input_ids": [5]}', ":2: give one of prompt, messages, input_ids, got"),
        ('{"promt": "a"}', ":2: unknown field 'promt'; known are prompt, messages, input_ids"),
        ('{"prompt": ""}', ':2: prompt must be a string that isn\'t empty, got ""'),
        ('{"prompt": 5}', ":2: prompt must be a string that isn't empty, got 5"),
        ('{"messages": "Who?"}', ":2: messages must be a list of objects with role and content"),
        ('{"messages": [{"role": "user"}]}', ":2: messages must be a list of objects with role"),
        ('{"messages": [{"role": "user", "content": "Who?"}]}', ":2: messages need a chat templ"),
        ('{"input_ids": []}', ":2: input_ids must be a list of token ids, got []"),
        ('{"input_ids": [5, 0.5]}', ":2: input_ids must be a list of token ids, got [5, 0.5]"),
        ('{"input_ids": [5, 256]}', ":2: input_ids must hold tokens from 0 to 255, got 5 to 256"),
        ('{"prompt": "a", "max_new_tokens": 0}', ":2: max_new_tokens must be an integer above 0"),
        ('{"prompt": "a", "max_new_tokens": true}', ":2: max_new_tokens must be an integer abov"),
        ('{"prompt": "a", "max_new_tokens": 1024}', ":2: prompt has 1 tokens and 1024 new ones"),
    ],
)
def test_wrong_lines_are_refused_by_place_and_field(
    line: str, message: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f'{{"prompt": "Who?"}}\n{line}\n')
    command = ["generate", model, "--prompts", str(prompts), "--out", str(tmp_path / "out")]
    assert_refused(command, f"{prompts}{message}", capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give TEXT or --prompts"),
        (["text", "--out", "x"], "--out goes only with --prompts"),
        (["text", "--compile"], "--compile goes only with --prompts"),
        (["--prompts", "x"], "--prompts needs --out, another file for the results"),
        (["--prompts", "x", "--out", "x"], "--prompts needs --out, another file"),
        (["text", "--prompts", "x", "--out", "y"], "text doesn't go with --prompts"),
        (["--prompts", "x", "--out", "y", "--json", "z"], "--json doesn't go with --prompts"),
        (["--prompts", "/no/such", "--out", "y"], "/no/such can't be read: No such file"),
    ],
)
def test_options_for_many_prompts_are_refused_elsewhere(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert_refused(["generate", "MODEL", *options], message, capsys)


def test_results_that_cannot_be_written_are_refused(tmp_path: Path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Who?"}')
    command = ["generate", "MODEL", "--prompts", str(prompts), "--out", "/proc/no/x"]
    assert_refused(command, "/proc/no/x can't be written", capsys)


def assert_refused(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(command) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("adakv: ")
    assert captured.err.count("\n") == 1


def test_generate_and_eval_read_some_of_the_pages(model: str, text: str, tmp_path: Path):
    """With all pages listed a text is the same."""
    texts = []
    for read in ([], ["--read", "Quest(share=1.0, full_layers=0)"]):
        out = tmp_path / f"{len(read)}.json"
        arguments = ["generate", model, text, "--policy", "full", "--max-new-tokens", "6"]
        assert run_command_line([*arguments, *read, "--json", str(out)]) == 0
        texts.append(json.loads(out.read_text())["runs"][-1]["tokens"])
    assert texts[0] == texts[1]
    kl = []
    for share in ("1.0", "0.1"):
        out, read = tmp_path / f"{share}.json", f"Quest(share={share}, least=0, full_layers=0)"
        arguments = ["eval", model, "--text", text, "--tokens", "200", "--prompts", "1"]
        arguments += ["--policies", "full", "--shares", "1", "--read", read, "--json", str(out)]
        assert run_command_line(arguments) == 0
        found = json.loads(out.read_text())
        assert found["read"] == read
        kl.append(found["cells"][0]["metrics"]["kl"]["mean"])
    assert kl[0] < 1e-6 < kl[1]


@pytest.mark.parametrize(("whole", "some"), [
    ("SpecAttn(small={0!r}, mass=1.0)", "SpecAttn(small={0!r}, mass=0.01, full_layers=0)"),
    ("SmallKV(small={0!r}, share=1.0)", "SmallKV(small={0!r}, share=0.1)"),
])  # fmt: skip
def test_generate_and_eval_read_by_a_small_model(
    model: str, text: str, tmp_path: Path, whole: str, some: str
):
    """The model itself beside it: where nothing is left out it says the same."""
    texts = []
    for read in ([], ["--read", whole.format(model)]):
        out = tmp_path / f"{len(read)}.json"
        arguments = ["generate", model, text, "--policy", "full", "--max-new-tokens", "6"]
        assert run_command_line([*arguments, *read, "--json", str(out)]) == 0
        texts.append(json.loads(out.read_text())["runs"][-1]["tokens"])
    assert texts[0] == texts[1]
    kl = []
    for number, read in enumerate((whole, some)):
        out = tmp_path / f"read{number}.json"
        arguments = ["eval", model, "--text", text, "--tokens", "200", "--prompts", "1"]
        arguments += ["--policies", "full", "--shares", "1", "--read", read.format(model)]
        assert run_command_line([*arguments, "--json", str(out)]) == 0
        kl.append(json.loads(out.read_text())["cells"][0]["metrics"]["kl"]["mean"])
    assert kl[0] < 1e-5 < kl[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--read", "Quest(shar=1)"], "unexpected keyword argument 'shar'"),
        (["eval", "--read", "TopScore()"], "must be one of Quest"),
        (
            ["eval", "--text", "x", "--read", "Quest()", "--written", "8"],
            "--read doesn't go with --written",
        ),
        (["generate", "--read", "Quest()", "--prompts", "x"], "--read doesn't go with --prompts"),
    ],
)
def test_wrong_reads_are_refused(arguments: list[str], message: str, model: str, capsys):
    command, *options = arguments
    assert run_command_line([command, model, *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", list(cli.commands))
def test_every_option_says_in_a_sentence_what_it_does(name: str):
    """With a unit or a list of words where it takes a value."""
    for option in cli.commands[name].params:
        if isinstance(option, click.Option) and option.name != "help":
            assert option.help is not None
            assert re.match(r"[A-Z].*\.($|  \[default)", option.help), option.opts[0]
            is_number = option.type.name in ("integer", "integer range", "float", "float range")
            assert option.metavar or not is_number, option.opts[0]


def test_the_list_of_commands_cuts_no_sentence(capsys: pytest.CaptureFixture[str]):
    assert run_command_line(["--help"]) == 0
    _, _, told = capsys.readouterr().out.partition("Commands:\n")
    assert all(line.endswith(".") and len(line) <= 80 for line in told.splitlines())
