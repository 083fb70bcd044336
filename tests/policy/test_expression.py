"""Policies written down."""

from __future__ import annotations

import pytest

from adakv import policy
from adakv.policy import (
    ColumnMax,
    ModelWide,
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
    ],
)
def test_a_text_is_a_policy(text: str, expected: Policy) -> None:
    assert policy.get(text) == expected


@pytest.mark.parametrize("name", [x for x in policy.names() if x != "full"])
def test_every_preset_can_be_written(name: str) -> None:
    preset = policy.get(name)
    parts = preset.scorer, preset.allocator, preset.selector
    assert policy.get(" * ".join(map(repr, parts))) == preset


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("KeyDiff()", "not of the form scorer"),
        ("KeyDiff() * Adaptive() *", "invalid syntax"),
        ("Adaptive() * Adaptive() * TopScore()", r"Adaptive\(\) must be one of .*KeyDiff"),
        ("KeyDiff(4) * Adaptive() * TopScore()", r"KeyDiff\(4\) must be one of"),
        ("KeyDiff(**{}) * Adaptive() * TopScore()", "unexpected keyword"),
        ("KeyDiff(depth=4) * Adaptive() * TopScore()", "unexpected keyword argument 'depth'"),
        ("KeyDiff(pinned=-1) * Adaptive() * TopScore()", "pinned must be at least 0, got -1"),
        ("KeyDiff(pinned=open('x')) * Adaptive() * TopScore()", r"open\('x'\) must be one of"),
        ("exit() * Adaptive() * TopScore()", r"exit\(\) must be one of"),
    ],
)
def test_what_is_no_policy_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy.get(text)
