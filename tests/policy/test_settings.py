"""What the settings of a policy's parts may be: every one of every part."""

from __future__ import annotations

import math
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file

from adakv import policy
from adakv.policy import (
    Adaptive,
    AttentionPredictor,
    Defensive,
    ExpectedAttention,
    Gate,
    HiddenOutlier,
    KeyDiff,
    LearnedScorer,
    ModelWide,
    Policy,
    PromptAttention,
    SmallKV,
    SpecAttn,
    TopScore,
    Uniform,
    WholePages,
)
from predictor_file import predictor_file

NO_PARTS = {
    "Budget",
    "ByteBudget",
    "LayerInputs",
    "PageRead",
    "PressScorer",
    "Profile",
    "Policy",
    "Protection",
    "TokenClasses",
    "WholePages",
}
PARTS = [
    part
    for part in map(vars(policy).get, policy.__all__)
    if isinstance(part, type) and hasattr(part, "__dataclass_fields__")
    if part.__name__ not in NO_PARTS
]
SETTINGS = [(part, setting) for part in PARTS for setting in fields(part)]
WRONG: dict[str, list[Any]] = {
    "int": [1.5, 4.0, True, None, "4", math.nan, [4], 2**31, -(2**70), torch.ones(2), torch.eye(1)],
    "float": [math.nan, math.inf, -math.inf, True, None, "0.5", [0.5], 1j, torch.ones(2)],
    "float | None": [math.nan, math.inf, True, "2", [2], 0, -1],
    "bool": [0, 1, None, "yes", [True]],
    "str | None": [5, "no such word", ["mean"], torch.ones(2), b"mean", math.nan],
    "Any": [None, 5, ["mean"], torch.ones(2), b"mean", math.nan],  # for a model or its name
    "LayerSchedule": [5, None, "Pyramid", [1, 2], TopScore()],
}
OTHERS = [None, 5, "no such word", ["mean"], torch.ones(2), b"mean", math.nan]  # for a word


@pytest.fixture
def needed(tmp_path: Path) -> dict[type, dict[str, Any]]:
    """The settings that parts have to be given: most often the files of those that were trained."""
    shapes = {
        Gate: {"weight": (1, 2), "bias": (1,)},
        LearnedScorer: {"fc1.weight": (1, 9, 2), "fc1.bias": (1, 2),
                        "fc2.weight": (1, 2, 1), "fc2.bias": (1, 1)},
    }  # fmt: skip
    for part, of_layer in shapes.items():
        tensors = {f"layers.0.{name}": torch.ones(shape) for name, shape in of_layer.items()}
        save_file(tensors, tmp_path / part.__name__)
    files = {part: {"file": str(tmp_path / part.__name__)} for part in shapes}
    files |= {AttentionPredictor: {"file": predictor_file(tmp_path)[0]}}
    beside = {part: {"small": "a/model"} for part in (SmallKV, SpecAttn)}
    return files | beside | {HiddenOutlier: {"channel": 3}}


@pytest.mark.parametrize(("part", "setting"), SETTINGS, ids=lambda x: getattr(x, "name", None))
def test_every_setting_is_checked_by_name(part: type, setting: Any, needed: Any):
    given = needed.get(part, {})
    for wrong in WRONG.get(setting.type, OTHERS):
        with pytest.raises(ValueError, match=rf"^{setting.name} must be "):
            part(**given | {setting.name: wrong})


@pytest.mark.parametrize(("part", "setting"), SETTINGS, ids=lambda x: getattr(x, "name", None))
def test_numbers_of_numpy_are_numbers(part: type, setting: Any, needed: Any):
    given = needed.get(part, {})
    usual = given.get(setting.name, setting.default)
    kind = {"int": numpy.int64, "float": numpy.float32, "bool": numpy.bool_}.get(setting.type)
    if kind is None:
        return
    made = part(**given | {setting.name: kind(usual)})
    assert type(getattr(made, setting.name)) is type(usual)
    if kind is not numpy.float32:
        assert made == part(**given)


def test_a_float_may_be_written_as_an_integer():
    assert Adaptive(floor=1) == Adaptive(floor=1.0)
    assert type(ModelWide(reserve=2).reserve) is float


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Policy(5, Uniform(), TopScore()), "scorer must be a Scorer, with a method score"),
        (lambda: Policy(KeyDiff(), TopScore(), TopScore()), "allocator must be an? Allocator"),
        (lambda: Policy(KeyDiff(), Uniform(), Uniform()), "selector must be a Selector"),
        (lambda: WholePages(5), "allocator must be an? Allocator, with a method allocate, got 5"),
        (lambda: WholePages(Uniform(), 1.5), "page_size must be an integer"),
        (lambda: ModelWide(reserve=0), "reserve must be at least 1, got 0"),
        (lambda: ExpectedAttention(num_future=10**6), "num_future must be at most 65536, got 10"),
        (lambda: PromptAttention(stride=10**6), "stride must be at most 1024, got 1000000"),
        (lambda: Defensive(pool_width=10**6 + 1), r"pool_width must be in \[1, 63\], got 1000001"),
        (lambda: Adaptive(safeguard="blond"), "got 'blond': did you mean 'blend'"),
    ],
)
def test_absurd_parts_are_refused(make: typing.Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        make()
