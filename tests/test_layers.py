"""Nobody looks up: every ``#include`` and ``import`` against the floors of the library.

6  cli, eval               python/adakv/{cli,eval}/
5  adapters                python/adakv/{hf,vllm}/
4  policies                python/adakv/policy/
3  torch ops, cache face   python/adakv/{errors,_register,ops,cache}.py
2  bindings: Python, C     bindings/, cpp/capi/
1  kernels, one interface  cpp/ops/, cpp/cpu/, cuda/
0  types and cache memory  cpp/include/adakv/, cpp/cache/
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
    "cpp/cache": ("adakv/",),
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
    "ops": 3,
    "_register": 3,
    "cache": 3,
    "step": 3,
    "policy": 4,
    "entries": 4,
    "reading": 4,
    "hf": 5,
    "vllm": 5,
}
TOP_FLOOR = 6
SIDEWAYS = {("entries", "policy"), ("reading", "policy"), ("reading", "entries")}
TRANSFORMERS = ("hf/", "cli/", "eval/")


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


PARTS = ["scorers", "prompt_scorers", "press", "allocators", "selectors"]


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
