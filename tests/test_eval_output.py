"""What is made of quality metrics: files, tables, pages; and lm-eval's face."""

from __future__ import annotations

import functools
import importlib
import json
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import adakv
from adakv.cli.main import run_command_line
from adakv.eval import data, processes, summary
from adakv.eval.metrics import Quality
from adakv.eval.records import Key, Record, RecordFile
from small_model import save_model

pytestmark = pytest.mark.usefixtures("one_thread")

PLACE = {"dtype": "float32", "device": "cpu"}
ABOUT = {"model": "small", "tokens": 64}
TEXT = "It was the best of times, it was the worst of times. Why? Nobody knew, 🙂 not even Ω. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose attention is far from even."""
    return save_model(tmp_path_factory.mktemp("model"), initializer_range=0.3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 20)
    return str(path)


def record(policy: str, group: str, kl: float, *, share: float = 0.5, item: str = "0") -> Record:
    key = Key("qa", f"{group}.{item}", policy, share)
    return Record(key, group, Quality(kl, 1 - kl, float(kl < 1), 2, 1, 1), 64, 10, 40)


# --- records ------------------------------------------------------------------------------------


def test_records_survive_a_torn_line(tmp_path: Path):
    path = tmp_path / "new" / "records.jsonl"
    file = RecordFile(str(path), ABOUT)
    first, second = record("a", "0", 0.5), record("b", "1", 0.25)
    file.add(first)
    file.add(second)
    with path.open("a") as torn:
        torn.write('{"task": "qa", "it')
    again = RecordFile(str(path), ABOUT)
    assert again.records == [first, second]
    again.add(first)
    assert RecordFile(str(path), ABOUT).records == [first, second, first]


@pytest.mark.parametrize("content", ["no newline", "{}\n[]\n", '{"model": "small"}\n{"x": 1}\n'])
def test_records_refuse_and_keep_other_files(content: str, tmp_path: Path):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"notes.txt holds no records of adakv eval"):
        RecordFile(str(path), {"model": "small"})
    assert path.read_text() == content


def test_records_of_another_run_are_refused(tmp_path: Path):
    path = str(tmp_path / "records.jsonl")
    RecordFile(path, ABOUT)
    with pytest.raises(ValueError, match="was begun with tokens 64, now 128; give another file"):
        RecordFile(path, {**ABOUT, "tokens": 128})
    with pytest.raises(ValueError, match="can't be written"):
        RecordFile("/proc/no/records.jsonl", ABOUT)


# --- summary ------------------------------------------------------------------------------------


def test_summary_averages_over_texts():
    records = [
        record("a", "0", 0.2),
        record("a", "0", 0.4, item="1"),
        record("a", "1", 0.5),
        record("b", "0", 0.6),
        record("b", "0", 0.8, item="1"),
        record("b", "1", 0.5),
    ]
    a, b = summary.summarize(records)
    assert (a.policy, a.items, a.bytes_share, a.paired) == ("a", 3, 0.25, {})
    assert a.metrics["kl"].mean == pytest.approx(0.4)
    assert a.metrics["kl"].error == pytest.approx(0.1)  # of 0.3 and 0.5
    assert a.metrics["kl"].texts == 2
    assert b.paired["kl"].mean == pytest.approx(0.2)  # of 0.4 and 0
    assert b.paired["kl"].error == pytest.approx(0.2)


def test_paired_comparison_takes_what_both_have():
    records = [record("a", "0", 0.2), record("b", "0", 0.3), record("b", "1", 9.0)]
    _, b = summary.summarize(records)
    assert b.paired["kl"].mean == pytest.approx(0.1)
    assert b.paired["kl"].texts == 1


@pytest.mark.parametrize(
    ("differences", "p"),
    [([1, 1, 1], 0.25), ([1, -1], 1.0), ([0, 0, 0], 1.0), ([3, 1, -1], 0.75), ([1] * 5, 2 / 32)],
)
def test_randomization_test_by_hand(differences: list[float], p: float):
    assert summary.difference(differences).p == pytest.approx(p)


def test_randomization_test_of_many():
    assert summary.difference([1.0] * 30).p < 0.001
    assert summary.difference([1.0, -1.0] * 15).p > 0.9


def test_tables_name_what_they_hold():
    records = [record("a", "0", 0.5), record("b", "0", 0.25), record("a", "0", 1.5, share=0.125)]
    tables = summary.tables(summary.summarize(records))
    kl, _, exact, paired = (table.markdown() for table in tables)
    assert "| kept | 1/2 | 1/8 |" in kl
    assert "| a | 0.500 ± 0.000 | 1.500 ± 0.000 |" in kl
    assert "| b | 0.250 ± 0.000 |  |" in kl
    assert "| full cache | 1.000 ± 0.000 | 1.000 ± 0.000 |" in exact
    assert "| b | -0.250 ± 0.000 (p 1.00) |" in paired
    assert [summary.share_name(share) for share in (1, 1 / 32, 0.3)] == ["1/1", "1/32", "0.3"]


# --- the command line ---------------------------------------------------------------------------


def test_eval_goes_on_and_writes_everything(folder: str, text: str, tmp_path: Path, capsys: Any):
    files = {name: tmp_path / name for name in ("r.jsonl", "out.json", "out.png", "out.md")}
    command = ["eval", folder, "--text", text, "--needles", text, "--aware", "yes"]
    command += ["--tokens", "300", "--prompts", "3", "--per-prompt", "1", "--dtype", "float32"]
    command += ["--records", str(files["r.jsonl"]), "--shares", "1/4,1"]
    assert run_command_line([*command, "--policies", "snapkv"]) == 0
    before = files["r.jsonl"].read_text()
    outputs = ["--json", "out.json", "--plot", "out.png", "--markdown", "out.md"]
    command += [str(tmp_path / o) if "." in o else o for o in outputs]
    capsys.readouterr()
    assert run_command_line([*command, "--policies", "snapkv,random,streaming"]) == 0
    after = files["r.jsonl"].read_text()
    assert after.startswith(before)
    assert after.count("\n") == 1 + 3 * (before.count("\n") - 1) == 1 + 3 * 2 * 3 * 2
    found = json.loads(files["out.json"].read_text())
    cells = {(c["task"], c["policy"], c["share"]): c for c in found["cells"]}
    assert len(cells) == 3 * 2 * 2
    for (_, _, share), cell in cells.items():
        kl = cell["metrics"]["kl"]
        assert kl["texts"] == 3
        if share == 1:
            assert kl["mean"] == pytest.approx(0, abs=1e-6)
            assert cell["metrics"]["agreement"]["mean"] == 1
        else:
            assert kl["mean"] > 0.01
            assert share < cell["bytes_share"] < share + 3 * 16 / 300  # pages, one in reserve
    table = files["out.md"].read_text()
    assert "| snapkv | " in table
    assert "exact answers by depth" in table
    assert "KL to the full cache" in capsys.readouterr().out
    assert files["out.png"].read_bytes().startswith(b"\x89PNG")


def test_eval_by_several_processes_finds_the_same(folder: str, text: str, tmp_path: Path):
    """They go on with a file of records that one began; tables have the same order."""
    command = ["eval", folder, "--text", text, "--needles", text, "--tokens", "300"]
    command += ["--prompts", "2", "--dtype", "float32", "--shares", "1/2,1/8"]
    command += ["--policies", "snapkv,streaming,ada_snapkv"]
    one, two = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    results = [tmp_path / "1.json", tmp_path / "2.json"]
    assert run_command_line([*command, "--records", str(one), "--json", str(results[0])]) == 0
    lines = one.read_text().splitlines(keepends=True)
    two.write_text("".join(lines[:5]))
    command += ["--records", str(two), "--json", str(results[1]), "--processes", "2"]
    assert run_command_line(command) == 0
    again = two.read_text().splitlines(keepends=True)
    assert again[:5] == lines[:5]
    assert sorted(again) == sorted(lines)
    assert len({path.read_text() for path in results}) == 1


def test_processes_that_are_killed_are_told(text: str, folder: str):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tasks = {"text": data.continuations(text, tokenizer, data.Size(100, 1, 1))}
    policies = {"streaming": adakv.policy.get("streaming")}
    begin_and_die = functools.partial(os._exit, 3)
    with pytest.raises(adakv.Error, match="processes: one of 2 was killed or ran out of memory"):
        list(processes.run(begin_and_die, 2, tasks, policies, [0.5]))


def test_eval_measures_formats_of_pages(folder: str, text: str, tmp_path: Path):
    """Half of the bytes, and hardly another answer."""
    path = tmp_path / "eval.json"
    command = ["eval", folder, "--text", text, "--tokens", "300", "--prompts", "2"]
    options = ["--policies", "ada_snapkv", "--kv-dtypes", "auto,int8,int4", "--shares", "1"]
    assert run_command_line([*command, *options, "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    plain, quantised, int4 = results["cells"]
    names = ["ada_snapkv", "ada_snapkv in int8", "ada_snapkv in int4"]
    assert [cell["policy"] for cell in results["cells"]] == names
    assert results["dtype"] == "bfloat16"
    assert quantised["bytes_share"] < 0.8 * plain["bytes_share"]
    assert quantised["metrics"]["kl"]["mean"] < plain["metrics"]["kl"]["mean"] + 0.05
    assert int4["metrics"]["kl"]["mean"] > quantised["metrics"]["kl"]["mean"]


def test_eval_measures_formats_at_equal_bytes(folder: str, text: str, tmp_path: Path):
    path = tmp_path / "eval.json"
    command = ["eval", folder, "--text", text, "--tokens", "600", "--prompts", "1"]
    options = ["--policies", "ada_snapkv", "--kv-dtypes", "auto,int8", "--shares", "1/4"]
    assert run_command_line([*command, *options, "--equal-bytes", "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    plain, int8 = results["cells"]
    assert results["equal_bytes"] is True
    assert 0.93 * plain["bytes_share"] < int8["bytes_share"] <= plain["bytes_share"]


def test_the_quality_of_bits_is_measured(
    folder: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By a script that keeps matrices in float32 and fills caches in bfloat16."""
    script = Path(__file__).parent.parent / "benchmarks" / "quality_of_bits.py"
    given = ["--text", text, "--tokens", "800", "--prompts", "1"]
    monkeypatch.setattr(sys, "argv", [str(script), folder, *given, "--out", str(tmp_path / "bits")])
    runpy.run_path(str(script), run_name="__main__")
    about, *cells = map(json.loads, (tmp_path / "bits.jsonl").read_text().splitlines())
    assert about["dtype"] == "bfloat16, weights in float32" and len(cells) == 3 * 3 * 5
    places = {(cell["task"], cell["share"]): {} for cell in cells if cell["share"] < 1}
    for cell in cells:
        places.get((cell["task"], cell["share"]), {})[cell["policy"]] = cell["bytes_share"]
    for sizes in places.values():
        plain = sizes.pop("ada_snapkv")
        assert len(sizes) == 2 and max(sizes.values()) < plain + 0.02  # tables are longer there
    assert (tmp_path / "bits.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give at least one of --qa, --text and --needles"),
        (["--text", "no.txt"], "no.txt can't be read: No such file"),
        (
            ["--text", "{text}", "--policies", "adasnap"],
            "--policies: there is no policy 'adasnap': did you mean 'ada_snapkv'?",
        ),
        (["--text", "{text}", "--policies", ","], "got none"),
        (
            ["--text", "{text}", "--equal-bytes", "--written", "40"],
            "--equal-bytes doesn't go with --written",
        ),
        (
            ["--text", "{text}", "--policies", "more_tokens", "--kv-dtypes", "int8"],
            "--kv-dtypes: more_tokens has a budget in bytes and its own format",
        ),
        (["--text", "{text}", "--shares", "1/0"], "--shares must be numbers like 1/8 or 0.125"),
        (["--text", "{text}", "--shares", "2"], "--shares must be above 0 and at most 1, got 2"),
        (["--text", "{text}", "--prompts", "0"], "prompts must be at least 1, got 0"),
        (["--text", "{text}", "--tokens", "9000"], "tokens, but 12 prompts of 9064 are asked for"),
        (["--text", "{text}", "--tokens", "1000", "--prompts", "1"], "the model takes 1024"),
    ],
)
def test_eval_refuses_in_one_line(
    options: list[str], message: str, folder: str, text: str, capsys: Any
):
    assert run_command_line(["eval", folder, *(o.format(text=text) for o in options)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


# --- lm-eval ------------------------------------------------------------------------------------


class StubLM:
    """As much of lm-eval's HFLM as CompressedLM relies on."""

    max_length = 1024

    def __init__(self, pretrained: str, dtype: str, device: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=dtype).eval()
        self.device = torch.device(device)
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *args: None)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any
    ) -> torch.Tensor:
        return self.model.generate(context, max_length=max_length, do_sample=False, **options)


@pytest.fixture
def lm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """adakv.eval.lm, on lm-eval itself where it is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        registry, models = types.ModuleType("registry"), types.ModuleType("models")
        registry.register_model = lambda name: lambda model_class: model_class
        models.HFLM = StubLM
        modules = {"api.registry": registry, "models.huggingface": models}
        for name in ("lm_eval", "lm_eval.api", "lm_eval.models"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, f"lm_eval.{name}", module)
        monkeypatch.delitem(sys.modules, "adakv.eval.lm", raising=False)
    return importlib.import_module("adakv.eval.lm")


def test_lm_loglikelihoods(lm: Any, folder: str):
    full, some = (lm.CompressedLM(folder, "ada_snapkv", ratio=r, **PLACE) for r in (1, 0.3))
    context = list(range(1, 200))
    requests = [
        (("", ""), context, [7, 8, 9]),
        (("", ""), [3], [4, 5]),
        (("", ""), context, [10]),
    ]
    found, compressed = (m._loglikelihood_tokens(requests, disable_tqdm=True) for m in (full, some))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for (_, before, after), (value, is_first) in zip(requests, found, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        chosen = logits.log_softmax(-1).gather(-1, torch.tensor(after)[:, None])
        assert value == pytest.approx(chosen.sum().item(), rel=1e-4)
        assert is_first == (logits.argmax(-1).tolist() == after)
    assert compressed[0][0] != pytest.approx(found[0][0], rel=1e-4)
    assert compressed[1] == found[1]
    assert compressed[2][0] != pytest.approx(found[2][0], rel=1e-4)


def test_lm_generates_from_a_compressed_cache(lm: Any, folder: str):
    context = torch.arange(1, 200)[None]
    options = {"attention_mask": torch.ones_like(context)}
    full = lm.CompressedLM(folder, "ada_snapkv", ratio=1.0, **PLACE)
    some = lm.CompressedLM(folder, "ada_snapkv", budget=40, **PLACE)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).generate(
        context, max_new_tokens=9, do_sample=False, **options
    )
    assert torch.equal(full._model_generate(context, 208, [], **options), expected)
    assert not torch.equal(some._model_generate(context, 208, [], **options), expected)


def test_lm_refuses(lm: Any, folder: str):
    with pytest.raises(ValueError, match="give either budget or ratio"):
        lm.CompressedLM(folder, **PLACE)
    model = lm.CompressedLM(folder, ratio=0.5, **PLACE)
    with pytest.raises(adakv.Error, match="such tasks have no prompt to compress"):
        model.loglikelihood_rolling([])
    with pytest.raises(ValueError, match="a request has 1025 tokens, but the model takes 1024"):
        model._loglikelihood_tokens([(("", ""), [1] * 1023, [1, 2])], disable_tqdm=True)


@pytest.mark.slow
def test_lm_eval_runs_a_local_task(folder: str, tmp_path: Path):
    pytest.importorskip("lm_eval")
    questions = [{"text": f"{i} one two three " * 9, "answer": "four"} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
    }
    (tmp_path / "local.yaml").write_text(json.dumps(task))  # JSON is YAML
    tokenizer = AutoTokenizer.from_pretrained(folder, eos_token="!")  # lm-eval wants one
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    setting = f"pretrained={folder},tokenizer={tmp_path}/tokenizer,dtype=float32"
    options = {
        "--model": "adakv",
        "--model_args": f"{setting},policy=critical_ada_snapkv,ratio=0.4",
        "--device": "cpu",
        "--batch_size": "1",
        "--tasks": "local",
        "--include_path": str(tmp_path),
        "--limit": "4",
        "--output_path": str(tmp_path / "out"),
    }
    command = [sys.executable, "-m", "adakv.eval", *(x for pair in options.items() for x in pair)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    subprocess.run(command, check=True, env=os.environ | offline, capture_output=True)
    (results,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(results.read_text())["results"]["local"]["exact_match,none"] == 0
