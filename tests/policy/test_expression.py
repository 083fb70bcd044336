"""Policies written down."""

from __future__ import annotations

import pytest

from adakv import policy
from adakv.policy import (
    ColumnMax,
    EveryTokens,
    ModelWide,
    MoreTokens,
    Policy,
    Pyramid,
    TopScore,
    TwoStage,
    Uniform,
    WindowAttention,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Defensive() * Adaptive() * TopScore()", policy.get("defensive")),
        (
            "ColumnMax(stride=4, weigh_by='all')*ModelWide(floor=0.1)*TwoStage()",
            Policy(ColumnMax(stride=4, weigh_by="all"), ModelWide(floor=0.1), TwoStage()),
        ),
        (
            "WindowAttention(pinned=4) * Uniform(layers=Pyramid(beta=5)) * TopScore()",
            Policy(WindowAttention(pinned=4), Uniform(Pyramid(beta=5)), TopScore()),
        ),
        (
            "WindowAttention() * Uniform() * TopScore() * EveryTokens(every=9) * "
            "MoreTokens(kv_dtype='int4')",
            Policy(WindowAttention(), Uniform(), TopScore(), EveryTokens(9), MoreTokens("int4")),
        ),
    ],
)
def test_a_text_is_a_policy(text: str, expected: Policy) -> None:
    assert policy.get(text) == expected


@pytest.mark.parametrize("name", [x for x in policy.names() if x != "full"])
def test_every_preset_can_be_written(name: str) -> None:
    preset = policy.get(name)
    parts = preset.scorer, preset.allocator, preset.selector, *filter(None, [preset.bits])
    assert policy.get(" * ".join(map(repr, parts))) == preset


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("KeyDiff()", "not of the form scorer"),
        ("KeyDiff() * Adaptive() *", "invalid syntax"),
        ("Adaptive() * Adaptive() * TopScore()", r"Adaptive\(\) must be one of .*KeyDiff"),
        (
            "KeyDiff() * Adaptive() * TopScore() * MoreTokens(kv_dtype='int3')",
            "'int4', 'int2' or as 'mixed3', got 'int3'",
        ),
        ("KeyDiff() * MoreTokens() * TopScore()", r"MoreTokens\(\) must be one of"),
        ("KeyDiff(4) * Adaptive() * TopScore()", r"KeyDiff\(4\) must be one of"),
        ("KeyDiff(**{}) * Adaptive() * TopScore()", "unexpected keyword"),
        ("KeyDiff(depth=4) * Adaptive() * TopScore()", "unexpected keyword argument 'depth'"),
        ("KeyDiff(pinned=-1) * Adaptive() * TopScore()", "pinned must be at least 0, got -1"),
        ("KeyDiff(pinned=open('x')) * Adaptive() * TopScore()", r"open\('x'\) must be one of"),
        ("exit() * Adaptive() * TopScore()", r"exit\(\) must be one of"),
        ("KeyDif() * Adaptive() * TopScore()", "did you mean 'KeyDiff'"),
        ("KeyDiff(pinnd=1) * Adaptive() * TopScore()", "'pinnd': did you mean 'pinned'"),
        ("KeyDiff(pinned=1, pinned=2) * Adaptive() * TopScore()", "pinned is given twice"),
        ("KeyDiff(pinned=1.5) * Adaptive() * TopScore()", "pinned must be an integer .*got 1.5"),
        ("KeyDiff() * Adaptive(layers=5) * TopScore()", "layers must be a LayerSchedule.* got 5"),
        ("KeyDiff() * Adaptive() * TwoStage(eps=1e999)", "eps must be .* and finite, got inf"),
        ("KeyDiff(pinned='\0') * Adaptive() * TopScore()", "null byte"),
        ("KeyDiff(pinned='\ud800') * Adaptive() * TopScore()", "surrogates"),
        ("adasnapkv", "did you mean 'ada_snapkv'"),
    ],
)
def test_what_is_no_policy_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy.get(text)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "text",
    [
        " * ".join(["KeyDiff()"] * 20000),
        f"KeyDiff(pinned={'-' * 50000}1) * Adaptive() * TopScore()",
        f"KeyDiff(pinned={'[' * 50000}) * Adaptive() * TopScore()",
        f"KeyDiff(pinned={'9' * 5000}) * Adaptive() * TopScore()",
        f"{'Adaptive(layers=' * 90}5{')' * 90} * Adaptive() * TopScore()",
        "KeyDiff(pinned='\\d') * Adaptive() * TopScore()",
    ],
)
def test_monstrous_texts_are_refused_in_short(text: str) -> None:
    with pytest.raises(ValueError, match="policy ") as caught:
        policy.get(text)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("value", [None, 5, ["snapkv"], b"snapkv"])
def test_what_is_no_text_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="policy must be one of"):
        policy.get(value)
