"""Nobody looks up: every ``#include`` and ``import`` against the floors of the library.

6  cli, eval               python/adakv/{cli,eval}/
5  adapters                python/adakv/{hf,vllm}/
4  policies, reader        python/adakv/policy/,
                           python/adakv/{reading,entries,recent,
                           reselection,page_bounds,page_history,
                           beside,kept_scores,shrinking}.py
3  torch ops, cache, step  python/adakv/{errors,shown,_register,_schedules,tensors,ops,fork}.py,
                           python/adakv/{moving,formats,cache_file,cache,room,basis,tiers,
                           tiered_cache,devices,shape,shortlist,step}.py
2  bindings: Python, C     bindings/, cpp/capi/
1  kernels, one interface  cpp/ops/, cpp/cpu/, cuda/
0  types and cache memory  cpp/include/adakv/, cpp/cache/

And what CONTRIBUTING.md says of names, sizes and seams: a verb is the name of its files on every
floor, files and functions are short, and no test or benchmark replaces what adakv does.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "adakv"
CORE_SUFFIXES = {".h", ".cc", ".cu", ".cuh"}

#: What an include of each folder may begin with, besides the standard library.
INCLUDES = {
    "cpp/include/adakv": ("adakv/",),
    "cpp/cache": ("adakv/", "cache/"),
    "cpp/capi": ("adakv/", "ops/", "capi/"),
    "cpp/ops": ("adakv/", "ops/"),
    "cpp/cpu": ("adakv/", "ops/", "cpu/"),
    "cuda": ("adakv/", "ops/"),
    "bindings": ("adakv/", "ops/", "pybind11/"),
}
FRAMEWORKS = re.compile(r"^(torch|ATen|c10|pybind11|Python\.h)")

FLOORS = {
    "_C": 2,
    "errors": 3,
    "shown": 3,
    "ops": 3,
    "tensors": 3,
    "_register": 3,
    "_schedules": 3,
    "cache": 3,
    "cache_file": 3,
    "formats": 3,
    "devices": 3,
    "room": 3,
    "fork": 3,
    "moving": 3,
    "shape": 3,
    "basis": 3,
    "tiers": 3,
    "tiered_cache": 3,
    "step": 3,
    "shortlist": 3,
    "policy": 4,
    "entries": 4,
    "reading": 4,
    "reselection": 4,
    "kept_scores": 4,
    "shrinking": 4,
    "recent": 4,
    "page_bounds": 4,
    "page_history": 4,
    "beside": 4,
    "hf": 5,
    "vllm": 5,
}
TOP_FLOOR = 6
SIDEWAYS = {
    ("entries", "policy"),
    ("reading", "policy"),
    ("reading", "entries"),
    ("reading", "kept_scores"),
    *(("page_bounds", x) for x in ("policy", "entries")),
    *(("beside", x) for x in ("policy", "page_bounds")),
    *(("page_history", x) for x in ("policy", "entries", "page_bounds")),
    *(("reselection", x) for x in ("policy", "entries", "recent")),
    *(("kept_scores", x) for x in ("policy", "entries")),
    *(("shrinking", x) for x in ("policy", "entries", "reselection", "kept_scores")),
}
TRANSFORMERS = ("hf/", "cli/", "eval/")


def test_layers_the_documented_floors_are_these():
    page = (ROOT / "docs/architecture.md").read_text()
    for floor in (3, 4, 5):
        (row,) = re.findall(rf"^\| {floor} \|.*\|(.*)\|$", page, re.MULTILINE)
        told = re.findall(r"\w+", re.sub(r"python/adakv/|\.py", "", row))
        assert sorted(told) == sorted(name for name, at in FLOORS.items() if at == floor)


VERBS = re.findall(
    r"^void (\w+)\(const", (ROOT / "cpp/include/adakv/ops.h").read_text(), re.MULTILINE
)
#: Where a verb is, on every floor; of several one suffices.
LIFE_OF_A_VERB = (
    ["cpp/cpu/{}.cc"],
    ["cuda/{}.cu", "cuda/{}/any.cu"],
    ["tests/ops/test_{}.py"],
    ["tests/cpp/{}_test.cc"],
    ["benchmarks/bench_{}.py"],
)


@pytest.mark.parametrize("verb", VERBS)
def test_layers_a_verb_is_the_name_of_its_files(verb: str):
    for places in LIFE_OF_A_VERB:
        names = [place.format(verb) for place in places]
        assert any((ROOT / name).exists() for name in names), f"no {' or '.join(names)}"


@pytest.mark.parametrize("verb", VERBS)
def test_layers_a_verb_of_more_than_two_cuda_files_has_a_folder(verb: str):
    files = [p.name for p in (ROOT / "cuda").glob(f"{verb}[._]*")]
    assert len(files) <= 2, f"{files} belong into cuda/{verb}/"


#: Of code, without docstrings: more is hard to read at once.
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 500, 60
FOLDERS = ("cpp", "cuda", "bindings", "python", "tests", "benchmarks", "examples")


def test_layers_files_are_short():
    files = [p for f in FOLDERS for p in (ROOT / f).rglob("*")]
    files = [p for p in files if p.suffix in {*CORE_SUFFIXES, ".c", ".py", ".pyi"}]
    long = [p for p in files if len(p.read_text().splitlines()) > MOST_LINES_OF_A_FILE]
    assert files and not long, long


def test_layers_python_functions_are_short():
    for path in (p for f in FOLDERS for p in (ROOT / f).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            first = node.body[0]
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= first.end_lineno - first.lineno + 1
            message = f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"
            assert lines <= MOST_LINES_OF_A_FUNCTION, message


def functions(tree: ast.AST) -> set[str]:
    """Names of all that is defined with ``def``, in classes and outside."""
    found = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return {node.name for node in found}


def replaced(tree: ast.AST) -> Iterator[str]:
    """Names that code gives another meaning: by ``setattr``, pytest's or its own, by mock's
    ``patch``, by assigning to what it imports from adakv, or by assigning a function."""
    own = functions(tree)
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).split(".")[0] == "adakv"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func).split(".")[-1] in ("setattr", "patch", "object"):
                names = [x.value for x in node.args[:2] if isinstance(x, ast.Constant)]
                yield from (str(name).split(".")[-1] for name in names)
        elif isinstance(node, ast.Assign):
            is_function = isinstance(node.value, ast.Lambda) or ast.unparse(node.value) in own
            for target in node.targets:
                holder, _, name = ast.unparse(target).rpartition(".")
                if holder and (is_function or holder.split(".")[0] in imported):
                    yield name


@pytest.mark.parametrize("folder", ["benchmarks", "tests", "examples", "python/adakv/eval"])
def test_layers_nobody_replaces_what_adakv_does(folder: str):
    """What is measured and tested is what runs: a seam that is missing is made, not patched."""
    ours = set().union(*(functions(ast.parse(path.read_text())) for path in python_files()))
    for path in (ROOT / folder).rglob("*.py"):
        for name in replaced(ast.parse(path.read_text())):
            assert name not in ours, f"{path.relative_to(ROOT)} replaces {name}"


@pytest.mark.parametrize(
    "code",
    [
        "from adakv.hf import Cache\nCache.take = None",
        "import adakv\nadakv.hf.Cache.take = other.take",
        "def f(): pass\nlayer.inner.take = f",
        "layer.take = lambda: None",
        "setattr(Cache, 'take', f)",
        "monkeypatch.setattr(Cache, 'take', f)",
        "monkeypatch.setattr('adakv.hf.Cache.take', f)",
        "mock.patch.object(Cache, 'take')",
    ],
)
def test_layers_replacements_are_found(code: str):
    assert "take" in replaced(ast.parse(code))
    assert "take" not in replaced(ast.parse("take = layer.take\nself.take = take\nx.take = 1"))


def core_files() -> list[Path]:
    folders = (ROOT / folder for folder in INCLUDES)
    return sorted(p for f in folders for p in f.rglob("*") if p.suffix in CORE_SUFFIXES)


def includes(path: Path) -> Iterator[tuple[str, bool]]:
    """Each included name and whether it is in quotes."""
    for line in path.read_text().splitlines():
        if match := re.match(r'\s*#\s*include\s*([<"])([^>"]+)[>"]', line):
            yield match[2], match[1] == '"'


@pytest.mark.parametrize("path", core_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_layers_of_includes(path: Path):
    folder = next(f for f in INCLUDES if (ROOT / f) in path.parents)
    for name, quoted in includes(path):
        if FRAMEWORKS.match(name):
            allowed = folder == "bindings" and name.startswith("pybind11/")
        elif quoted:
            own = (path.parent / name).exists() or (
                folder == "cuda" and (ROOT / "cuda" / name).exists()
            )
            allowed = own or name.startswith(INCLUDES[folder])
        else:
            allowed = folder == "cuda" or not name.startswith(("cuda", "nv"))
        assert allowed, f"{path.relative_to(ROOT)} must not include {name}"


def python_files() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules (or the names in them) that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(name: str) -> int:
    """The floor of ``adakv.<name>``."""
    if name in FLOORS:
        return FLOORS[name]
    return TOP_FLOOR  # the names of `adakv` itself, which loads what is below, are for floor 6


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_layers_of_imports(path: Path):
    place = path.relative_to(PACKAGE)
    own = place.parts[0].removesuffix(".py")
    for name in imports(path):
        message = f"{place} must not import {name}"
        if name.split(".")[0] == "transformers":
            assert str(place).startswith(TRANSFORMERS), message
        if name.split(".")[0] != "adakv" or own == "__init__":
            continue
        module = name.split(".")[1] if "." in name else ""
        assert floor(module) <= floor(own), message
        if floor(module) == floor(own):  # sideways only within a folder or to a floor's base
            is_base = floor(own) in (3, TOP_FLOOR) or (own, module) in SIDEWAYS
            assert module == own or is_base, message
        if module == "_C":
            assert floor(own) == 3, message


PARTS = ["scorers", "prompt_scorers", "press", "allocators", "profile", "selectors"]


@pytest.mark.parametrize("part", PARTS)
def test_layers_parts_of_a_policy_do_not_know_each_other(part: str):
    below = tuple(f"adakv.policy.{name}." for name in ("inputs", "attention", "base"))
    for name in imports(PACKAGE / "policy" / f"{part}.py"):
        if name.startswith("adakv.policy"):
            assert name.startswith(below), f"policy/{part}.py must not import {name}"


def test_layers_import_needs_no_transformers():
    """``import adakv`` loads floors 3 and 4 and nothing above."""
    code = (
        "import sys; sys.modules['transformers'] = None; import adakv; "
        "above = [m for m in sys.modules if m.startswith(('adakv.hf', 'adakv.cli'))]; "
        "assert not above, above"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
