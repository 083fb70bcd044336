"""The tables of docs/families.md are true."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import adakv
from adakv.hf import families
from adakv.hf.attachment import CACHE
from hf.all_families import REFUSED, REFUSED_AS_PUBLISHED, UNTIL_5_23, VOCAB, WORKS, rows, tiny
from hf.families import V4

pytestmark = pytest.mark.model

PAGE = Path(__file__).resolve().parents[2] / "docs/families.md"
newest = pytest.mark.skipif(V4, reason="4.57 lacks many of these families")


@newest
def test_the_page_has_these_tables() -> None:
    assert "\n".join(rows()) in PAGE.read_text(), "run tests/hf/all_families.py"


def test_what_is_refused_by_name_is_on_the_page() -> None:
    names = {name for *_, names in (*REFUSED, *REFUSED_AS_PUBLISHED) for name in names.split()}
    assert {*families.UNLIKE_ITS_CACHE} - {"mllama_text_model"} <= names


@newest
@pytest.mark.slow
@pytest.mark.parametrize("model_type", WORKS)
def test_it_works(model_type: str) -> None:
    model, ids = tiny(model_type), torch.randint(3, VOCAB, (2, 40))
    mask = (torch.arange(40) >= torch.tensor([9, 0])[:, None]).long()
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, eos_token_id=None, **settings)
    with adakv.attach(model):
        cache = adakv.Cache(model, budget=40)
        actual = model.generate(ids, eos_token_id=None, **{CACHE: cache}, **settings)
        assert torch.equal(actual, expected)
        small = adakv.Cache(model, budget=36, page_size=8)
        model.generate(torch.cat([ids, ids, ids], 1), max_new_tokens=2, **{CACHE: small})
    stats = small.stats()
    assert 0 < stats["bytes"] < stats["full_bytes"]


@newest
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "message"),
    [(name, message) for message, _, names in REFUSED for name in names.split()],
)
def test_it_is_refused(model_type: str, message: str) -> None:
    if model_type in UNTIL_5_23.split() and CACHE == "cache":
        pytest.skip("works since 5.24")
    model = tiny(model_type)
    with pytest.raises(ValueError, match=message):
        adakv.attach(model).detach()
        adakv.Cache(model, budget=40)
