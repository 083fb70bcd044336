"""What the documents say is there is there, and their examples run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import adakv

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_docs_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_docs_examples_compile(page: Path):
    for block in blocks(page):
        compile(block, str(page), "exec")


@pytest.mark.parametrize("name", ["ops.md", "adding_a_policy.md"])
def test_docs_examples_run(name: str):
    (block,) = blocks(ROOT / "docs" / name)
    exec(compile(block, name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("name", adakv.policies())
def test_docs_name_every_preset(name: str):
    assert f"`{name}`" in (ROOT / "docs/policies.md").read_text()


def test_docs_name_every_verb():
    tables = (ROOT / "docs/ops.md").read_text()
    verbs = re.findall(r"^void (\w+)\(const", (ROOT / "cpp/include/adakv/ops.h").read_text(), re.M)
    assert len(verbs) == 8
    for verb in verbs:
        assert f"| `{verb}` |" in tables
        assert hasattr(adakv.ops, verb)
