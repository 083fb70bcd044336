"""What the documents say is there is there, and their examples run."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

import adakv
from adakv.policy import base
from small_model import save_model

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_docs_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def sections(page: Path) -> set[str]:
    """What links to its headings are called, by GitHub and by mkdocs."""
    plain = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", plain, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", x.lower()).strip().replace(" ", "-") for x in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_docs_links_lead_to_headings(page: Path):
    for target, heading in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            there = page.parent / target if target else page
            assert heading in sections(there), f"{page.name} links to {target}#{heading}"


@pytest.mark.parametrize("picture", sorted(ROOT.glob("docs/images/*.png")), ids=lambda p: p.name)
def test_docs_pictures_have_palettes(picture: Path):
    """Charts need a quarter of the bytes so: Pillow's ``image.convert("RGB").quantize(256)``."""
    color_type = picture.read_bytes()[25]  # PNG specification, IHDR
    assert color_type == 3, f"{picture.name} has no palette"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_docs_examples_compile(page: Path):
    for block in blocks(page):
        compile(block, str(page), "exec")


@pytest.mark.parametrize("name", ["ops.md", "adding_a_policy.md"])
def test_docs_examples_run(name: str):
    (block,) = blocks(ROOT / "docs" / name)
    exec(compile(block, name, "exec"), {"__name__": "__main__"})


REAL_MODEL = ROOT / "demo/model/SmolLM2-135M-Instruct"

#: Pages that teach; their snippets go on from those of the first one.
QUICKSTART, *GUIDES = [ROOT / "docs/quickstart.md", *sorted(ROOT.glob("docs/howto/*.md"))]
#: Pages to look things up in, whose snippets go on from the quickstart's, too.
REFERENCE = [
    ROOT / f"docs/{name}.md"
    for name in ("batch", "bits", "cache", "folding", "policies", "reads", "texts")
]
IMAGES = ROOT / "docs/howto/images.md"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder to load in the place of a page's model."""
    folder = save_model(tmp_path_factory.mktemp("model"))
    (Path(folder) / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def image_model(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model that reads images, 16 pixels wide, its processor, and a photo."""
    folder = tmp_path_factory.mktemp("images")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for x in messages[0].content %}{{ x.text or '<image>' }}{% endfor %}",
    )
    processor.save_pretrained(folder)
    text = AutoConfig.from_pretrained(tiny_model, vocab_size=len(tokenizer))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 2, "image_size": 16, "patch_size": 4, "projection_dim": 32}
    config = LlavaConfig(
        text_config=text,
        vision_config={"model_type": "clip_vision_model", **sizes},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    Image.new("RGB", (40, 30)).save(folder / "photo.png")
    return str(folder)


def run_blocks(page: Path, names: dict[str, Any], model: str, letters: int = 10**6) -> None:
    """With another model, and with so much of the quickstart's text; but for what needs kvpress
    where that is missing. What is about images goes on from the page of images."""
    for block in blocks(page):
        if "from kvpress" in block and importlib.util.find_spec("kvpress") is None:
            continue
        scope = names
        if page != IMAGES and ("adakv.classes_of(" in block or "processor(" in block):
            scope = dict(names)
            run_blocks(IMAGES, scope, model)
        block = block.replace(".read_text()", f".read_text()[:{letters}]")
        block = re.sub(r'^name = ".*"$', f"name = {model!r}", block, flags=re.MULTILINE)
        exec(compile(block, page.name, "exec"), scope)


@pytest.fixture(scope="module")
def quickstart(tiny_model: str) -> dict[str, Any]:
    """What the quickstart's snippets leave."""
    names: dict[str, Any] = {}
    run_blocks(QUICKSTART, names, tiny_model, 900)
    return names


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", [QUICKSTART, *GUIDES], ids=lambda p: p.stem)
def test_docs_guides_run(
    page: Path, quickstart: dict[str, Any], image_model: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(image_model)
    if page != QUICKSTART:
        run_blocks(page, dict(quickstart), image_model)
    cache = quickstart["cache"]
    assert cache.stats()["bytes"] < 0.5 * cache.stats()["full_bytes"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", REFERENCE, ids=lambda p: p.stem)
def test_docs_reference_runs(
    page: Path, quickstart: dict[str, Any], image_model: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(image_model)
    own_model = copy.deepcopy(quickstart["model"])
    run_blocks(page, {**quickstart, "model": own_model}, image_model)


def test_docs_snippets_run_everywhere_but_where_vllm_is_needed():
    run = {QUICKSTART, *GUIDES, *REFERENCE, ROOT / "README.md"}
    run |= {ROOT / "docs/ops.md", ROOT / "docs/adding_a_policy.md"}
    assert {page for page in PAGES if blocks(page)} - run == {ROOT / "docs/vllm.md"}


@pytest.mark.skipif(not REAL_MODEL.exists(), reason="`make model` gets the model")
def test_docs_quickstart_prints_what_it_says(capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    run_blocks(QUICKSTART, {}, str(REAL_MODEL))
    *printed, second = capsys.readouterr().out.splitlines()
    told = "".join(re.findall(r"^```\n\n((?:    .*\n)+)", QUICKSTART.read_text(), re.MULTILINE))
    answer, *sizes = [line.strip() for line in told.splitlines()[:-1]]
    assert printed[0] == answer
    assert "Golden Anchor" in second  # words around it may differ from machine to machine
    for ours, theirs in zip(printed[1:], sizes, strict=True):
        pairs = zip(*(re.findall(r"[\d.]+", line) for line in (ours, theirs)), strict=True)
        assert all(float(x) == pytest.approx(float(y), rel=0.05) for x, y in pairs)


@pytest.mark.parametrize(
    "page", [QUICKSTART, ROOT / "docs/concepts.md", *GUIDES], ids=lambda p: p.stem
)
def test_docs_guides_are_short(page: Path):
    assert len(page.read_text().splitlines()) <= 80


@pytest.mark.parametrize("name", adakv.policies())
def test_docs_name_every_preset(name: str):
    assert f"`{name}`" in (ROOT / "docs/policies.md").read_text()


def test_docs_name_every_verb():
    tables = (ROOT / "docs/ops.md").read_text()
    verbs = re.findall(r"^void (\w+)\(const", (ROOT / "cpp/include/adakv/ops.h").read_text(), re.M)
    assert len(verbs) == 10
    for verb in verbs:
        assert f"| `{verb}` |" in tables
        assert hasattr(adakv.ops, verb)


#: What can't be imported without something that nothing here installs.
NEEDS = {
    "lm_eval": ("eval.lm",),
    "vllm.v1": tuple(
        f"vllm.{x}"
        for x in ("spec", "prefix", "hooks", "admission", "metrics", "backend_cpu", "backend_cuda")
    ),
}


def modules() -> list[ModuleType]:
    names = [module.name for module in pkgutil.walk_packages(adakv.__path__, "adakv.")]
    for needed, users in NEEDS.items():
        if importlib.util.find_spec(needed) is None:
            names = [name for name in names if name.removeprefix("adakv.") not in users]
    return [adakv, *(importlib.import_module(name) for name in names if "._" not in name)]


def public(holder: Any) -> Iterator[tuple[str, Any]]:
    """What a module or class defines itself, under names without an underscore."""
    module = holder.__name__ if inspect.ismodule(holder) else holder.__module__
    for name, value in vars(holder).items():
        value = inspect.unwrap(getattr(value, "__func__", value))  # of class and static methods
        if isinstance(value, property):
            value = value.fget
        known = inspect.isfunction(value) or inspect.isclass(value)
        if known and not name.startswith("_") and value.__module__ == module:
            yield name, value


#: What policy parts do is said once, at their protocols.
PROTOCOLS = (base.Scorer, base.LayerSchedule, base.Allocator, base.Selector)


@pytest.mark.parametrize("module", modules(), ids=lambda m: m.__name__)
def test_docs_of_all_that_is_public(module: ModuleType):
    assert module.__doc__, f"{module.__name__} says nothing about itself"
    for name, value in public(module):
        assert inspect.getdoc(value), f"{module.__name__}.{name} has no docstring"
        if not inspect.isclass(value):
            continue
        for method, function in public(value):
            others = (*value.__mro__[1:], *PROTOCOLS)
            inherited = (getattr(other, method, None) for other in others)
            assert function.__doc__ or any(inspect.getdoc(f) for f in inherited if f), (
                f"{module.__name__}.{name}.{method} has no docstring"
            )


@pytest.mark.parametrize(
    "function",
    [
        *(value for _, value in public(adakv.ops) if inspect.isfunction(value)),
        *(value for _, value in public(adakv.cache.KVCache)),
        adakv.attach,
        adakv.Cache,
        adakv.generate_batch,
    ],
    ids=lambda function: function.__qualname__,
)
def test_docs_name_every_parameter(function: Any):
    words = re.findall(r"\w+", inspect.getdoc(function) or "")
    assert set(inspect.signature(function).parameters) - {"self", "cls"} <= set(words)


@pytest.mark.skipif(not REAL_MODEL.exists(), reason="`make model` gets the model")
def test_docs_readme_prints_what_it_says(capsys: pytest.CaptureFixture[str]):
    """The first block, as it stands but for where the model is."""
    page = (ROOT / "README.md").read_text()
    block, *_ = blocks(ROOT / "README.md")
    name = '"HuggingFaceTB/SmolLM2-135M-Instruct"'
    assert block.count(name) == 1
    capsys.readouterr()
    exec(compile(block.replace(name, repr(str(REAL_MODEL))), "README.md", "exec"), {})
    answer, memory = capsys.readouterr().out.splitlines()
    ((told, told_memory),) = re.findall(r"^    (The ferry.*)\n    (.* instead of .*)$", page, re.M)
    assert answer == told
    pairs = zip(
        memory.split(" MiB instead of "), told_memory.split(" MiB instead of "), strict=True
    )
    assert all(float(ours) == pytest.approx(float(theirs), rel=0.02) for ours, theirs in pairs)


def test_docs_agree_on_the_version_that_a_tag_releases():
    """.github/workflows/release.yml compares the tag with the first two. What is unreleased may
    stand before the newest version."""
    (version,) = re.findall(
        r"project\(adakv VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text()
    )
    heading, *_ = re.findall(r"^## (\d.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading.split()[0] == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_docs_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_docs_picture_is_drawn_from_what_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("gain", ROOT / "benchmarks/plot_gain.py")
    assert spec is not None and spec.loader is not None
    gain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gain)
    gain.draw(str(tmp_path / "gain.png"))
    assert (tmp_path / "gain.png").read_bytes()[25] == 3  # a palette
    page = (ROOT / "README.md").read_text()
    (memory, less), (slow, fast) = gain.on_cpu()
    assert f"{memory:.1f} MB | {slow:.0f} ms" in page
    assert f"{less:.1f} MB | {fast:.0f} ms" in page
    (few, before), (many, after) = gain.on_gpu()
    assert f"| {few} |" in page and f"| {before:.0f} |" in page
    assert f"| {many} |" in page and f"| {after:.0f} |" in page
    for policy in gain.CURVES:
        (row,) = re.findall(rf"^\| `{policy}`.*%.*%.*%.*%.*$", page, re.M)
        for task in ("qa_aware", "qa", "needles_aware", "text"):
            same = dict((round(s, 2), x) for s, x in gain.agreement(policy, task))[0.15]
            assert f" {100 * same:.0f} % " in row
