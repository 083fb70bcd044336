"""How things are shown: a line, a table or a map for notebooks, a picture."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import chain
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import adakv
from adakv import shown
from adakv.eval.comparison import Comparison, Row
from adakv.ops import Kept

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("one_thread")]


class Nesting(HTMLParser):
    """Fails where elements don't nest."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(content)
        self.close()
        assert not self.open, content

    def handle_starttag(self, tag: str, attrs: list[Any]) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def kept(*rows: list[int]) -> Kept:
    ends = torch.tensor([0, *map(len, rows)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Kept(torch.tensor([*chain(*rows), -1, -1], dtype=torch.int32), ends)


def test_tables_and_maps_escape_and_nest() -> None:
    content = shown.table([("<b>", "&"), ("x", "y")], ("<i>", "h"))
    assert "<b>" not in content and "<i>" not in content and "&lt;b&gt;" in content
    Nesting(content)
    drawn = shown.heat_map([[0, 2], [1, 4]], label="<a>", rows="layer", columns="kv head")
    Nesting(drawn)
    assert "<a>" not in drawn and drawn.count("<rect") == 4
    assert "layer 1, kv head 1: 4" in drawn and 'fill-opacity="1.00"' in drawn
    Nesting(shown.heat_map([], label="nothing", rows="", columns=""))
    assert len(shown.heat_map([[1] * 100] * 100, label="", rows="", columns="")) < 2 << 20


@pytest.mark.parametrize("name", adakv.policies())
def test_a_policy_is_one_line_that_can_be_read_back(name: str) -> None:
    policy = adakv.policy.get(name)
    assert repr(policy) == f"Policy({policy})" and "\n" not in repr(policy)
    assert adakv.policy.get(str(policy)) == policy
    assert adakv.policy.get(adakv.policy.presets.name_of(policy)) == policy
    content = policy._repr_html_()
    Nesting(content)
    assert "scorer" in content and type(policy.allocator).__name__ in content


def test_kept_says_how_many_entries_each_row_has() -> None:
    some = kept([0, 5, 9], [], [9])
    assert repr(some) == "Kept(4 entries of 3 rows, 0 to 3 each)"
    Nesting(some._repr_html_())
    assert some._repr_html_().count("<rect") == 3 * 10
    assert "row 0, part 5: 1" in some._repr_html_()
    assert repr(kept()) == "Kept(no rows)" and repr(kept([], [])).startswith("Kept(0 entries of 2")
    for empty in (kept(), kept([], [])):
        Nesting(empty._repr_html_())
    Nesting(kept(*[[7 * i] for i in range(100)])._repr_html_())
    with torch.device("meta"):  # has no numbers
        assert "positions" in repr(Kept(torch.empty(4), torch.empty(3)))
    assert repr(Kept(None, None)) == "Kept(positions=None, indptr=None)"  # type: ignore[arg-type]


@pytest.fixture
def small(model: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def filled(model: Any, batch: int = 1, **settings: Any) -> adakv.Cache:
    tokens = torch.randint(0, 200, (batch, 200))
    with adakv.attach(model), torch.no_grad():
        cache = adakv.Cache(model, max_new_tokens=8, **settings)
        model(tokens, past_key_values=cache)
    return cache


def test_a_cache_says_what_it_holds(small: Any) -> None:
    cache = filled(small, policy="ada_snapkv", ratio=0.25)
    before = cache.stats()
    sizes = shown.mebibytes(before["bytes"]), shown.mebibytes(before["full_bytes"])
    share = before["bytes"] / before["full_bytes"]
    expected = f"200 tokens, {sizes[0]} instead of {sizes[1]} ({share:.1%})"
    assert repr(cache) == f"Cache(ada_snapkv, ratio=0.25: {expected})"
    content = cache._repr_html_()
    Nesting(content)
    assert content.count("<rect") == 4 and "ada_snapkv" in content
    assert str(int(before["lengths"].max())) in content
    assert torch.equal(cache.stats()["lengths"], before["lengths"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": 64}, "Cache(model_rank_fusion, budget=64: 600 tokens in 3 sequences, "),
        ({"budget_bytes": "50%"}, "Cache(model_rank_fusion, budget_bytes=50%: 600 tokens"),
        ({"budget_bytes": 200_000}, "Cache(model_rank_fusion, budget_bytes=200000: 600 tokens"),
        ({"policy": "full"}, "Cache(full, ratio=1: 600 tokens"),
        (
            {"policy": "KeyDiff(window=8) * Uniform() * TopScore()", "budget": 20},
            "Cache(KeyDiff(window=8) * Uniform() * TopScore(), budget=20: 600 tokens",
        ),
        ({"ratio": 0.5, "chunked_prefill": True}, "600 tokens in 3 sequences, being read)"),
    ],
)
def test_a_cache_says_how_it_was_made(small: Any, settings: dict[str, Any], words: str) -> None:
    cache = filled(small, batch=3, **settings)
    assert words in repr(cache) and "\n" not in repr(cache)
    Nesting(cache._repr_html_())


def test_an_empty_cache_is_shown_too(small: Any) -> None:
    cache = adakv.Cache(small, ratio=0.5)
    assert repr(cache) == "Cache(model_rank_fusion, ratio=0.5: empty)"
    assert "<svg" not in cache._repr_html_()
    with pytest.raises(ValueError, match="sequence must be below the number of sequences, 0"):
        cache.plot()


def test_caches_and_comparisons_are_drawn(small: Any) -> None:
    cache = filled(small, batch=2, policy="ada_snapkv", ratio=0.25)
    assert cache.plot(1)._repr_png_().startswith(b"\x89PNG")
    (title,) = {axis.get_title() for axis in cache.plot().axes if axis.get_title()}
    assert title == "ada_snapkv: entries of 200 tokens"
    for wrong in (2, -1, "0"):
        with pytest.raises(ValueError, match="sequence must be"):
            cache.plot(wrong)  # type: ignore[arg-type]
    rows = Row("full", 4 << 20, 4 << 20, 0.0, 1.0, "yes"), Row("a", 1 << 20, 4 << 20, 0.5, 0.5, "")
    picture = Comparison(rows).plot()
    assert [len(axis.patches) for axis in picture.axes] == [2, 2, 2]
    assert picture._repr_png_().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.figure'] = None\n"
        "import adakv; from adakv import shown\n"
        "try: shown.figure()\n"
        "except adakv.Error as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"pictures need matplotlib; pip install 'adakv\[cli\]'\n", done.stdout)
