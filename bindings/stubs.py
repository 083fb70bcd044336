"""Writes what bindings/ defines to python/adakv/_C.pyi, from the signatures that pybind11 knows.

    python bindings/stubs.py [--check]

With ``--check`` it writes nothing, and fails if the file says something else.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adakv import _C

FILE = Path(__file__).resolve().parent.parent / "python" / "adakv" / "_C.pyi"
HEAD = """\
# What bindings/ defines, written by bindings/stubs.py (make stubs). Descriptions are in ops.py and
# cache.py.
# ruff: noqa
# fmt: off
import collections.abc
import torch
"""


def signature(function: Any) -> str:
    """``name(parameter: type, ...) -> type``, as pybind11 writes it above the docstring."""
    line = function.__doc__.splitlines()[0]
    name, _, rest = line.partition("(")
    parameters = re.sub(r"\b(self|arg0): adakv\._C\.\w+", "self", rest)
    parameters = parameters.replace("adakv._C.", "")
    return f"def {name}({parameters}: ..."


def members(namespace: dict[str, Any]) -> Iterator[str]:
    for name, member in namespace.items():
        if isinstance(member, type):
            bases = "" if member.__base__.__module__ == "pybind11_builtins" else "(RuntimeError)"
            yield f"class {name}{bases}:"
            lines = list(members(vars(member)))
            yield from (f"    {line}" for line in lines or ["..."])
        elif isinstance(member, property):
            yield "@property"
            yield signature(member.fget).replace("def (", f"def {name}(")
        elif isinstance(member, staticmethod):
            yield "@staticmethod"
            yield signature(member.__func__)
        elif callable(member) and (name == "__init__" or name[0] != "_"):
            yield signature(member)
        elif name == "__version__":
            yield f"{name}: str"


def main() -> None:
    text = HEAD + "\n".join(members(vars(_C))) + "\n"
    if "--check" not in sys.argv:
        FILE.write_text(text)
    elif FILE.read_text() != text:
        sys.exit(f"{FILE} is not what the bindings define: make stubs")


if __name__ == "__main__":
    main()
