"""Benchmarks start, say what they can't do, and their results are there in the form documented."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import adakv

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
SCRIPTS = [p for p in sorted(FOLDER.glob("*.py")) if "import harness" in p.read_text()]
SCRIPTS.append(FOLDER / "end_to_end_vllm.py")
RESULTS = sorted((FOLDER / "results").iterdir())
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def run(script: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Its exit code."""
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.syspath_prepend(str(FOLDER))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    return int(ended.value.code or 0)


@pytest.mark.model
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_benchmarks_parse_their_arguments(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run(script, monkeypatch, "--help") == 0
    assert "--device" in capsys.readouterr().out
    if reason := adakv.cuda_unavailable_reason():
        assert run(script, monkeypatch, "--device", "cuda") == 2
        assert f"argument --device: cuda can't be used here: {reason}" in capsys.readouterr().err


@pytest.mark.parametrize("file", RESULTS, ids=lambda p: p.name)
def test_benchmarks_results_are_compact_json_lines(file: Path):
    assert file.suffix == ".jsonl"
    lines = file.read_text().splitlines()
    for line, record in zip(lines, records(file), strict=True):
        compact = {json.dumps(record, separators=(",", ":"), ensure_ascii=x) for x in (True, False)}
        assert line in compact
    first, *cells = records(file)
    if file.name.startswith("quality"):
        assert "model" in first and cells
        alike = first.get("lines", {})
        assert all({"task", "policy", "share"} <= {*alike, *cell} for cell in cells)
    else:
        for record in (first, *cells):
            assert {"bench", "command", "commit", "machine", "sizes", "timings"} <= {*record}


def test_benchmarks_results_are_drawn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    plot = importlib.import_module("plot_end_to_end")
    file = FOLDER / "results" / "nvidia-h100-x1-end-to-end.jsonl"
    found = plot.curves(records(file))
    assert {4096, 32768} <= {*found}
    assert all(ms > 0 for held in found.values() for points in held.values() for _, ms, _ in points)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_benchmarks_that_documents_name_are_there(page: Path):
    for name in re.findall(r"benchmarks/[\w/.-]+\.(?:py|jsonl?)\b", page.read_text()):
        if "VERB" not in name and "NAME" not in name:
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_benchmarks_sort_kernels_by_kind(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    kernels = importlib.import_module("end_to_end_parts.kernels")
    done = [
        kernels.Kernel("void cutlass::device_kernel<flash::FlashAttnFwdSm90>", 0, 5, 1),
        kernels.Kernel("nvjet_tst_128x256", 4, 8, 2),
        kernels.Kernel("void adakv::(anonymous)::score_kernel<128>", 10, 11, 3),
        kernels.Kernel("void adakv::attend_kernel<128>", 20, 22, 4),
        kernels.Kernel("triton_poi_fused_mul", 22, 23, 4),
    ]
    seconds = kernels.seconds_by_kind(reversed(done))
    expected = {"attention": 5, "products": 4, "compression": 1, "busy": 12}
    expected |= {"attention_in_graphs": 2, "rest_in_graphs": 1}
    assert {kind: round(1e9 * value) for kind, value in seconds.items() if value} == expected
    assert kernels.most_time(done, 1) == [(done[0].name, 1, 5e-9)]
