"""adakv.compare: one question, several policies, one table."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import adakv

TEXT = "The harbour was quiet. A bell rang <twice>, and nobody came! " * 8

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def both(model: str) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)


def test_a_table_has_the_full_cache_and_every_policy(both: tuple[Any, Any]) -> None:
    policies = ["snapkv", adakv.policy.get("ada_snapkv"), "full"]
    table = adakv.compare(*both, TEXT, "Who came?", policies=policies, ratio=0.2, max_new_tokens=6)
    full, snapkv, _, whole = table.rows
    assert (full.policy, full.kl, full.agreement) == ("full", 0, 1)
    assert 0 < snapkv.cache_bytes < 0.5 * snapkv.full_bytes == 0.5 * full.cache_bytes
    assert whole.answer == full.answer and whole.agreement == 1 and whole.kl < 1e-6
    lines = repr(table).splitlines()
    assert lines[3].startswith("WindowAttention * Adaptive * TopScore ")
    assert len(lines) == 5 and lines[0].split()[0] == "policy" and "snapkv" in lines[2]


def test_a_row_holds_what_a_cache_holds_and_says(both: tuple[Any, Any]) -> None:
    model, tokenizer = both
    given = tokenizer(f"{TEXT}\n\nQuestion: Who came?\nAnswer:", return_tensors="pt")
    with adakv.attach(model):
        cache = adakv.Cache(model, "ada_snapkv", budget=64, max_new_tokens=6)
        tokens = model.generate(
            given["input_ids"], past_key_values=cache, max_new_tokens=6, do_sample=False
        )
    answer = tokenizer.decode(tokens[0, given["input_ids"].shape[1] :]).strip()
    table = adakv.compare(
        model, tokenizer, TEXT, "Who came?", policies=["ada_snapkv"], budget=64, max_new_tokens=6
    )
    assert table.rows[1].answer == answer


def test_a_notebook_gets_a_table_whatever_is_in_an_answer(both: tuple[Any, Any]) -> None:
    from adakv.eval.comparison import Comparison, Row

    shown = Comparison((Row("full", 4, 4, 0.0, 1.0, "<b>"),))._repr_html_()
    assert shown.startswith("<table>") and "&lt;b&gt;" in shown and "<b>" not in shown


def test_what_makes_no_sense_is_refused_by_name(both: tuple[Any, Any]) -> None:
    for wrong, name in (
        ({"policies": "snapkv", "ratio": 0.1}, "policies"),
        ({"policies": [], "ratio": 0.1}, "policies"),
        ({"policies": ["nobody"], "ratio": 0.1}, "nobody"),
        ({"ratio": 0.1, "max_new_tokens": 1}, "max_new_tokens"),
        ({}, "budget"),
    ):
        with pytest.raises(ValueError, match=name):
            adakv.compare(*both, TEXT, "Who came?", **wrong)
