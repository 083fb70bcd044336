"""A verb's arguments are the same in C++, in C and in the list that both faces go through."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CPP = Path(__file__).resolve().parent.parent / "cpp"
VERBS = [
    "Score", "ValueNorm", "Allocate", "Select", "Compact", "Append", "Fork", "Plan", "Attend",
    "Shortlist",
]  # fmt: skip
OWN = {"workspace", "workspace_bytes", "stream"}


def struct(text: str, name: str) -> list[str]:
    """The declarations of a struct, with their comments, one a line."""
    found = re.search(rf"struct {name} {{\n(.*?)\n}}", text, re.DOTALL)
    assert found, name
    return [line for line in found[1].splitlines() if ";" in line]


def names(lines: list[str]) -> list[str]:
    return [re.split(r" =|;", line)[0].split()[-1] for line in lines]


@pytest.mark.parametrize("verb", VERBS)
def test_every_face_has_the_members_of_the_struct_in_its_order(verb: str) -> None:
    include = CPP / "include" / "adakv"
    ours = names(struct((include / "ops.h").read_text(), f"{verb}Args"))
    c = "".join((include / name).read_text() for name in ("c.h", "c_fork.h", "c_shortlist.h"))
    in_c = names(struct(c, f"Adakv{verb}Args"))
    listed = (CPP / "ops" / "members.h").read_text().split(f"MembersOf<{verb}Args> {{")[1]
    members = re.findall(r"ADAKV_MEMBER\((\w+)\)", listed.split("};\n};")[0])
    assert members == [name for name in ours if name not in OWN]
    assert members == [name for name in in_c if name not in OWN]


@pytest.mark.parametrize("verb", VERBS)
def test_inputs_come_first_then_options_then_outputs(verb: str) -> None:
    lines = struct((CPP / "include" / "adakv" / "ops.h").read_text(), f"{verb}Args")

    def part(line: str) -> int:
        if re.search(r"\b(workspace|stream)\b.*;", line.split("//")[0]):
            return 3
        if re.match(r" +(TensorView|LayerView)", line):
            return (
                2 if re.search(r"// (of the same B sequences|\[.*\]\S*( \S+)?), out", line) else 0
            )
        return 1

    parts = [part(line) for line in lines]
    assert parts == sorted(parts), list(zip(names(lines), parts, strict=True))
