"""benchmarks/quality_tables.py, and that the documents show what is committed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
#: What docs/quality.md shows, and the notes of other texts.
SHOWN = (
    "model_rank_fusion,model_column_max,layer_defensive,critical_ada_snapkv,kvzip,keydiff,streaming"
)
AGREEING = "model_rank_fusion,critical_ada_snapkv,streaming"
COMPARED = f"{SHOWN},ada_snapkv,snapkv,h2o,r_kv,critical_ada_snapkv@kvpress"
OTHERS = (
    "model_rank_fusion,model_column_max,layer_defensive,critical_ada_snapkv,ada_expected,r_kv,keydiff,kvzip,"
    "critical_ada_snapkv@kvpress"
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("quality_tables")


def record(policy: str, item: str, kl: float, size: int = 50) -> dict[str, Any]:
    key = {"task": "qa", "item": item, "policy": policy, "share": 0.25}
    full = {"exact_full": 1.0, "loss_full": 0.0}
    quality = {"kl": kl, "agreement": 1.0, "exact": 1.0, "loss": 0.0} | full
    return (
        key
        | quality
        | {"group": item, "depth": None, "tokens": 9, "bytes": size, "full_bytes": 200}
    )


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["quality_tables.py", *arguments])
    script.main()


def collected(
    script: ModuleType,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    kl: dict[str, Any],
    *more: str,
) -> list[dict[str, Any]]:
    """What is written of KL by prompt, by policy."""
    lines = [record(policy, str(i), x) for policy, of in kl.items() for i, x in enumerate(of)]
    records, results = folder / "records", folder / "results.jsonl"
    records.write_text("\n".join(map(json.dumps, [{"model": "m"}, *lines])) + "\n")
    about = ("--about", '{"machine": "this"}')
    run(script, monkeypatch, "collect", str(records), str(results), *about, *more)
    first, *lines = map(json.loads, results.read_text().splitlines())
    alike = {"share": [0.25], "texts": min(map(len, kl.values()))}
    assert first == {"model": "m", "machine": "this", "lines": alike}
    assert len(lines) == len(kl) and not any({*alike} & {*line} for line in lines)
    cells: list[dict[str, Any]] = script.read(results)
    return cells


def test_quality_tables_take_what_all_policies_have(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The third prompt of a stopped run is left out. The differences from the default are 1 and 3:
    with two of the four ways to throw their signs, both alike, the mean is as far from 0."""
    kl = {"model_rank_fusion": [1.0, 2.0, 50.0], "snapkv": [2.0, 5.0]}
    default, snapkv = collected(script, tmp_path, monkeypatch, kl)
    about = {"task": "qa", "share": 0.25, "texts": 2, "agreement": 1.0, "bytes_share": 0.25}
    assert default == about | {"policy": "model_rank_fusion", "kl": 1.5, "error": 0.5}
    assert snapkv == about | {"policy": "snapkv", "kl": 3.5, "error": 1.5, "p": 0.5}


def test_quality_tables_say_once_what_most_lines_have(script: ModuleType, tmp_path: Path):
    lines = [
        {"task": "qa", "policy": name, "texts": texts, "share": share, "kl": [1.0] * len(share)}
        for name, texts, share in (("a", 8, [0.5, 0.25]), ("b", 7, [0.5, 0.25]), ("c", 8, [0.5]))
    ]
    first, *own = script.written({"model": "m"}, lines)
    assert first == {"model": "m", "lines": {"share": [0.5, 0.25], "texts": 8}}
    assert [{*line} - {"task", "policy", "kl"} for line in own] == [set(), {"texts"}, {"share"}]
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(map(json.dumps, [first, *own])))
    assert script.read(path) == script.unpacked(lines)


def test_quality_tables_of_formats_compare_with_16_bits(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    kl = {
        "snapkv": [3.0] * 6,
        "snapkv in int8": [1.0, 1.5, 2.0, 2.5, 1.0, 1.0],
        "snapkv in int4": [4.0] * 6,
    }
    cells = collected(script, tmp_path, monkeypatch, kl, "--formats")
    assert [cell.get("p") for cell in cells] == [None, 0.0312, 0.0312]  # 2 of 64, in three digits
    assert all(cell["bytes_share"] == 0.25 for cell in cells)
    run(script, monkeypatch, "show", str(tmp_path / "results.jsonl"), "--formats")
    assert capsys.readouterr().out == (
        "| `qa`, 6 prompts | 1/4 |\n| --- | --- |\n"
        "| `snapkv in int8` | **1.50** |\n| `snapkv` | 3.00 |\n| `snapkv in int4` | 4.00 |\n\n"
    )


def test_quality_tables_name_the_lowest_that_reads_once(script: ModuleType):
    cells = [
        {"policy": "kvzip", "kl": 0.001, "p": 0.008},
        {"policy": "snapkv", "kl": 0.0204, "p": 0.05},
        {"policy": "keydiff", "kl": 0.5, "p": 0.01},
    ]
    cells = [{"task": "qa", "share": 0.25, "texts": 8} | cell for cell in cells]
    (table,) = script.tables(cells, formats=False)
    assert table.rows == (
        ("`kvzip`", "0.0010 †"),
        ("`snapkv`", "**0.020**"),
        ("`keydiff`", "0.50 †"),
    )


def test_quality_tables_leave_out_what_was_not_measured(script: ModuleType):
    keys = [("qa", "a", 0.5), ("qa", "a", 0.25), ("qa", "b", 0.25), ("text", "b", 0.5)]
    cells = [
        {"task": task, "policy": policy, "share": share, "texts": 8, "kl": 2.0 + number}
        for number, (task, policy, share) in enumerate(keys)
    ]
    qa, text = script.tables(cells, formats=False)
    assert qa.rows == (("`a`", "**2.00**", "**3.00**"), ("`b`", "", "4.00"))
    assert text.rows == (("`b`", "**5.00**"),)


def test_quality_tables_compare_with_the_default(script: ModuleType):
    """By geometric means over shares: (2 * 8) ** .5 and 0.5."""

    def cell(task: str, policy: str, share: float, kl: float, **more: float) -> dict[str, Any]:
        return {"task": task, "policy": policy, "share": share, "texts": 8, "kl": kl, **more}

    cells = [
        cell("qa", "model_rank_fusion", 0.5, 1.0),
        cell("qa", "model_rank_fusion", 0.25, 1.0),
        cell("text", "model_rank_fusion", 0.5, 2.0),
        cell("qa", "snapkv", 0.5, 2.0, p=0.01),
        cell("qa", "snapkv", 0.25, 8.0, p=0.05),
        cell("text", "snapkv", 0.5, 1.0, p=0.02),
    ]
    table = script.comparison(cells)
    assert table.columns == ("times the default's KL", "`qa`", "`text`", "better", "worse")
    assert table.rows == (("`snapkv`", "4.00", "0.50", "1", "1"),)


def test_quality_tables_of_agreement(script: ModuleType):
    """Policies in the order of KL; a task that none was asked of is left out."""

    def cell(task: str, policy: str, kl: float, **more: float) -> dict[str, Any]:
        return {"task": task, "policy": policy, "share": 0.25, "texts": 8, "kl": kl, **more}

    cells = [
        cell("qa", "snapkv", 1.0, agreement=0.746),
        cell("qa", "streaming", 2.0, agreement=0.5),
        cell("qa", "model_rank_fusion", 0.5, agreement=0.9),
        cell("text", "snapkv", 1.0),
    ]
    table = script.agreement(cells, ["snapkv", "model_rank_fusion"])
    assert table.columns == ("same next token", "policy", "1/4")
    assert table.rows == (
        ("`qa`", "`model_rank_fusion`", "90 %"),
        ("`qa`", "`snapkv`", "75 %"),
    )


def test_quality_tables_of_agreement_by_kl(script: ModuleType):
    """Medians by hand; 0.03 is in the row that begins with it, and one cell alone makes no row."""
    values = [
        (0.001, 1.0),
        (0.01, 0.9),
        (0.02, 0.5),
        (0.029, 0.8),
        (0.03, 0.75),
        (7.0, 0.4),
        (9, 0.2),
    ]
    cells = [
        {"task": "qa", "policy": "snapkv", "share": 0.25, "texts": 8, "kl": kl, "agreement": same}
        for kl, same in values
    ]
    del cells[0]["agreement"]
    assert script.agreement_by_kl([*cells, {"kl": 8.0}]).rows == (
        ("0.01 to 0.03", "3", "80 %", "56 to 88"),
        ("above 3", "2", "30 %", "22 to 38"),
    )


@pytest.mark.parametrize(
    ("page", "results", "options"),
    [
        ("quality.md", "quality-qwen-05b", ("--policies", SHOWN)),
        ("quality.md", "quality-qwen-05b", ("--compare", "--policies", COMPARED)),
        (
            "quality.md",
            "quality-smollm2-135m quality-smollm2-135m-default",
            ("--agreement", "--policies", AGREEING),
        ),
        ("quality.md", "quality-smollm2-135m", ("--agreement-by-kl",)),
        ("quality.md", "quality-qwen-05b-layers", ("--compare", "--default", "ada_snapkv")),
        ("lab/quality_qwen.md", "quality-qwen-05b-layers", ()),
        ("lab/quality_qwen.md", "quality-qwen-05b-layers", ("--agreement",)),
        ("lab/quality_qwen.md", "quality-qwen-05b", ("--compare",)),
        ("lab/quality_qwen.md", "quality-qwen-05b-other-texts", ("--policies", OTHERS)),
        (
            "lab/quality_tried.md",
            "quality-qwen-05b-tried",
            ("--compare", "--default", "model_column_max"),
        ),
        *(
            ("lab/quality_qwen.md", f"quality-qwen-05b-{name}", ("--compare",))
            for name in ("8k", "code", "chinese")
        ),
        (
            "lab/quality_tried.md",
            "quality-qwen-05b-ranks",
            ("--compare", "--default", "model_column_max"),
        ),
        (
            "lab/quality_tried.md",
            "quality-smollm2-135m-ranks",
            ("--compare", "--default", "model_column_max"),
        ),
        ("lab/bits.md", "quality-qwen-05b-bits", ("--formats",)),
        ("texts.md", "quality-qwen-05b-written", ()),
    ],
)
def test_quality_tables_are_those_of_the_documents(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    page: str,
    results: str,
    options: tuple[str, ...],
):
    files = [str(FOLDER / "results" / f"{name}.jsonl") for name in results.split()]
    run(script, monkeypatch, "show", *files, *options)
    document = (ROOT / "docs" / page).read_text()
    shown = capsys.readouterr().out.strip().split("\n\n")
    assert all(f"\n\n{table}\n\n" in document for table in shown)
    assert shown[0].startswith("|")
