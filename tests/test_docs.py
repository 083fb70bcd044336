"""What is written about the library is there, and what is there is written about."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from adakv import policy

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {"build", "dist", "demo", "__pycache__"}
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part in SKIPPED or part.startswith(".") for part in path.relative_to(ROOT).parts)
)
MODULES = sorted((ROOT / "python" / "adakv").rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(page: Path) -> str:
    """The text without blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Names of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_docs_links_lead_somewhere(page: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{relative(page)}: {link} does not exist"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{relative(page)}: {link} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_docs_python_compiles(page: Path):
    """Blocks marked ``python``; those that are not whole programs are marked otherwise."""
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        compile(block, relative(page), "exec")


def undocumented(tree: ast.Module) -> Iterator[str]:
    if not ast.get_docstring(tree):
        yield "the module"
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if not node.name.startswith("_") and not ast.get_docstring(node):
            yield node.name


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_docs_public_names_have_docstrings(module: Path):
    missing = list(undocumented(ast.parse(module.read_text())))
    assert not missing, f"{relative(module)}: no docstring: {', '.join(missing)}"


def test_docs_show_the_custom_policy_as_it_is():
    example = (ROOT / "examples" / "custom_policy.py").read_text()
    assert example in (ROOT / "docs" / "adding_a_policy.md").read_text()


def test_docs_list_every_preset():
    table = (ROOT / "docs" / "policies.md").read_text()
    missing = [name for name in policy.names() if f"`{name}`" not in table]
    assert not missing
