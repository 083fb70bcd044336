"""``adakv report``: one page that is whole, safe and the same with every theme.

What a browser makes of it is seen in one where there is one: Chromium or Chrome, without a window.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from adakv.cli.main import run_command_line
from adakv.eval.page import Page, Piece, make_page
from small_model import save_model

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "It was the best of times, it was the worst of times. Why? Nobody knew, 🙂 not even Ω. "
VOID = {"meta", "link", "br", "input"}
NASTY = [
    "<script>alert(1)</script>",
    "</script>",
    "\n",
    ' "it\'s" &amp;',
    "<!--",
    "🙂",
    "\n\n",
    "é",
]


def made_page(layers: int = 3, heads: int = 2, tokens: int = 40) -> Page:
    """A page of no model, with a text that is HTML itself; some pieces are two tokens."""
    kept = torch.rand(layers, heads, tokens) < 0.3
    kept[..., -2:] = True
    shares = kept.float().mean((0, 1)).tolist()
    pieces, start = [], 0
    while start < tokens:
        num = 2 if start % 5 == 0 and start + 1 < tokens else 1
        share = sum(shares[start : start + num]) / num
        pieces.append(Piece(NASTY[len(pieces) % len(NASTY)], share, num))
        start += num
    return Page(
        policy="<b>policy</b>",
        num_tokens=tokens,
        pieces=pieces,
        layers=[2 * i + 1 for i in range(layers)],
        kept=kept,
        cache_bytes=3 << 20,
        full_bytes=9 << 20,
        answer="<i>no",
        full_answer="<i>yes",
        kl=0.25,
        agreement=0.5,
        same_start=1,
        question="Who & <why>?",
        about=("<model>",),
    )


class Reader(HTMLParser):
    """A page's elements, in order, and the text of the prompt; fails where they don't nest."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.title = ""
        self.data = ""  # of the script with the numbers
        self.prompt_depth = 0
        self.feed(content)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if dict(attrs).get("id") == "text":
            self.prompt_depth = len(self.open)
        elif self.is_in_prompt:
            self.words.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if len(self.open) == self.prompt_depth:
            self.prompt_depth = 0
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.is_in_prompt and self.open[-1] == "i":
            self.words[-1] += data
        elif self.open[-1:] == ["script"] and self.elements[-1][1].get("id") == "data":
            self.data += data
        elif self.open[-1:] == ["title"] and self.open[1:2] == ["head"]:
            self.title += data

    @property
    def is_in_prompt(self) -> bool:
        return 0 < self.prompt_depth <= len(self.open)

    def styles(self) -> list[float]:
        """How strongly each piece of the prompt is marked, 0 to 1."""
        found = [a.get("style") or "" for tag, a in self.elements if tag == "i"]
        return [float(x.partition(":")[2].strip(" ;") or 0) for x in found if "width" not in x]


def unpacked(data: str) -> Tensor:
    """bool ``[L, Hkv, T]`` of what the page's script reads."""
    found = json.loads(data)
    rows = torch.tensor(list(base64.b64decode(found["kept"])), dtype=torch.uint8)
    bits = (rows[:, None] >> torch.arange(8)) & 1
    return bits.view(len(found["layers"]), found["heads"], -1)[..., : found["tokens"]].bool()


def test_a_page_is_well_formed_and_holds_the_text_as_it_is() -> None:
    page = made_page()
    read = Reader(page.html())
    assert read.words == [piece.text for piece in page.pieces]
    assert torch.equal(unpacked(read.data), page.kept)
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert sum(tag == "rect" for tag, _ in read.elements) == 2 * page.kept[..., 0].numel()
    assert sum(tag == "td" for tag, _ in read.elements) == page.kept[..., 0].numel()


def test_a_page_asks_nobody_for_anything() -> None:
    content = made_page().html()
    read = Reader(content)
    for tag, attributes in read.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "action", "data", "srcset"):
                assert value == "data:,", (tag, name, value)
    assert not re.search(r"url\(|@import|https?:|//[a-z]|fetch\(|import\(", content)
    (policy,) = (a["content"] for _, a in read.elements if a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'; ")
    assert sum(tag == "script" for tag, _ in read.elements) == 3


def test_names_questions_and_answers_are_escaped() -> None:
    content = made_page().html()
    for text in ("<b>policy", "<i>no", "<i>yes", "<why>", "<model>", "alert(1)</script>", "<!--"):
        assert text not in content
    assert "Who &amp; &lt;why&gt;?" in content and "the same for 1 token<" in content
    without = replace(made_page(), question=None, answer="yes", full_answer="yes").html()
    assert "What the model writes after the text" in without and ": the same<" in without


def test_a_page_of_a_long_prompt_is_small() -> None:
    page = made_page(24, 8, 8192)
    assert len(page.html().encode()) < 2 << 20


def test_rows_of_any_length_are_packed() -> None:
    for tokens in (1, 7, 8, 9, 41):
        page = made_page(2, 3, tokens)
        assert torch.equal(unpacked(Reader(page.html()).data), page.kept)


# --- of a model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose attention is far from even."""
    return save_model(tmp_path_factory.mktemp("model"), initializer_range=0.3)


def test_report_shows_one_prompt(folder: str, tmp_path: Path):
    out, path, text = (tmp_path / name for name in ("page.html", "page.json", "text.txt"))
    text.write_text(TEXT * 5)
    command = ["report", folder, str(text), "--ratio", "0.25", "--max-new-tokens", "8"]
    command += ["--dtype", "float32", "--out", str(out), "--json", str(path)]
    assert run_command_line([*command, "--plot", str(tmp_path / "kept.png")]) == 0
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(path.read_text())
    assert "".join(piece["text"] for piece in found["pieces"]) == TEXT * 5
    budget = round(found["num_tokens"] / 4)
    assert sum(sum(heads) for heads in found["lengths"]) == 4 * budget  # of both layers
    assert all(piece["share"] == 1 for piece in found["pieces"][-24:])  # the window
    read = Reader(out.read_text())
    assert "".join(read.words) == TEXT * 5
    assert unpacked(read.data).sum(2).tolist() == found["lengths"]
    assert found["question"] is None and found["about"][0] == Path(folder).name


def test_a_page_goes_to_standard_output_alone(folder: str, tmp_path: Path, capsysbinary: Any):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = ["report", folder, str(text), "--question", "Who <knew>?", "--max-new-tokens", "2"]
    assert run_command_line([*command, "--budget", "40", "--out", "-"]) == 0
    content = capsysbinary.readouterr().out.decode()
    assert content.startswith("<!doctype html>") and content.rstrip().endswith("</html>")
    assert "Who &lt;knew&gt;?" in content


def test_report_keeps_the_text_that_it_reads(tmp_path: Path, capsys: Any):
    text = tmp_path / "report.html"
    text.write_text("It was the best of times.")
    assert run_command_line(["report", "MODEL", str(text), "--out", str(text)]) == 2
    assert "would overwrite" in capsys.readouterr().err
    assert text.read_text() == "It was the best of times."


def test_page_of_everything_kept_agrees(folder: str):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(TEXT * 2, return_tensors="pt")["input_ids"]
    found = make_page(model, tokenizer, prompt, "ada_snapkv", ratio=1.0, max_new_tokens=6)
    assert (found.agreement, found.same_start) == (1, 6)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.answer == found.full_answer
    assert {piece.share for piece in found.pieces} == {1}
    with pytest.raises(ValueError, match="max_new_tokens must be at least 2, got 1"):
        make_page(model, tokenizer, prompt, "ada_snapkv", ratio=1.0, max_new_tokens=1)


# --- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The beginning of a command that has a browser show a page without a window."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    profile = tmp_path_factory.mktemp("profile")
    options = ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking")
    options += ("hide-scrollbars", "enable-logging=stderr", "virtual-time-budget=3000")
    return [found, *(f"--{name}" for name in options), f"--user-data-dir={profile}"]


def shown(browser: list[str], page: Path, *options: str, view: str = "") -> str:
    """What a browser writes to standard output; fails if the page's script complains."""
    done = subprocess.run(
        [*browser, *options, f"{page.as_uri()}{view}"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize(("view", "layers", "heads"), [
    ("", slice(None), slice(None)),
    ("#layer=3", slice(1, 2), slice(None)),
    ("#head=1", slice(None), slice(1, 2)),
    ("#layer=5&head=0", slice(2, 3), slice(0, 1)),
    ("#layer=4&head=9", slice(None), slice(None)),  # which there aren't
])  # fmt: skip
def test_a_browser_marks_what_the_chosen_heads_keep(
    browser: list[str], tmp_path: Path, view: str, layers: slice, heads: slice
) -> None:
    page = made_page()
    path = tmp_path / "page.html"
    path.write_text(page.html())
    read = Reader(shown(browser, path, "--dump-dom", view=view))
    shares = page.kept[layers, heads].float().mean((0, 1))
    counts = [piece.num_tokens for piece in page.pieces]
    expected = [part.mean().sqrt().item() for part in shares.split(counts)]
    assert read.styles() == pytest.approx(expected, abs=1e-3)


PRESSES = """<script>
const text = document.getElementById("text"), cells = document.querySelectorAll("#budgets .n");
for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight", "a"])
  text.dispatchEvent(new KeyboardEvent("keydown", { key }));
cells[3].dispatchEvent(new MouseEvent("click", { bubbles: true }));
document.title = `${location.hash} ${document.getElementById("view").textContent}`;
</script></body>"""


def test_a_browser_follows_keys_and_clicks(browser: list[str], tmp_path: Path) -> None:
    """Arrow keys choose a word and mark the heads that keep it; a cell chooses its head."""
    page = made_page()
    path = tmp_path / "page.html"
    path.write_text(page.html().replace("</body>", PRESSES))
    read = Reader(shown(browser, path, "--dump-dom"))
    token = page.pieces[0].num_tokens  # the second piece, of one token
    assert page.pieces[1].num_tokens == 1
    cells = [a["class"] for tag, a in read.elements if tag == "rect" and a["class"] != "back"]
    assert ["has" in str(names) for names in cells] == page.kept[..., token].flatten().tolist()
    assert ["off" in str(names) for names in cells] == [i != 3 for i in range(6)]
    kept = page.lengths[1][1]
    assert read.title.startswith(f"#layer=3&head=1 Layer 3, kv head 1: {kept} of 40 entries, ")


def test_a_browser_shows_the_page_dark_and_light(browser: list[str], tmp_path: Path) -> None:
    from matplotlib.image import imread

    path = tmp_path / "page.html"
    path.write_text(made_page().html())
    pictures = {}
    for name, scheme in (("dark", 0), ("light", 1)):
        picture = tmp_path / f"{name}.png"
        settings = f"--blink-settings=preferredColorScheme={scheme}"
        shown(browser, path, settings, f"--screenshot={picture}", "--window-size=1200,900")
        pictures[name] = imread(picture)[..., :3]
    assert pictures["dark"].mean() < 0.3 < 0.8 < pictures["light"].mean()
    for picture in pictures.values():
        assert picture.shape[:2] == (900, 1200)
        red, _, blue = picture.reshape(-1, 3).T
        assert (red - blue > 0.4).sum() > 1000  # the marks and the maps


def test_a_page_is_readable_without_scripts(browser: list[str], tmp_path: Path) -> None:
    """The summary, the budgets and the marks of all kv heads together stand in the page itself."""
    page = made_page()
    path = tmp_path / "page.html"
    path.write_text(page.html().replace("script-src 'unsafe-inline'", "script-src 'none'"))
    done = subprocess.run(
        [*browser, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120
    )
    read = Reader(done.stdout)
    assert "js" not in dict(read.elements[0][1]).get("class", "")
    marked = [piece.share**0.5 for piece in page.pieces if piece.share]
    assert [x for x in read.styles() if x] == pytest.approx(marked, rel=1e-2)
