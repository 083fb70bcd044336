"""How many pages a step reads: what is given is checked, and written down."""

from __future__ import annotations

import pytest

from adakv.policy import Quest, get_read


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0}, "share must be above 0 and at most 1, got 0"),
        ({"share": 1.1}, "share must be above 0"),
        ({"mass": 0.0}, "mass must be above 0 and at most 1"),
        ({"mass": 2}, "mass must be above 0"),
        ({"newest": 0}, "newest must be at least 1"),
        ({"least": -1}, "least must be at least 0"),
        ({"full_layers": -1}, "full_layers must be at least 0"),
        ({"share": "half"}, "share must be a number"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quest(**settings)  # type: ignore[arg-type]


def test_reads_are_written_down() -> None:
    quest = Quest(share=0.25, mass=0.9)
    assert str(quest) == "Quest(share=0.25, mass=0.9)" and get_read(str(quest)) == quest
    assert get_read(quest) is quest and get_read("Quest()") == Quest()
    for wrong in ("quest", "Quest(0.5)", "Adaptive()", "Quest() * Quest()", 5, None):
        with pytest.raises(ValueError, match=r"^read "):
            get_read(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unexpected keyword argument 'shar': did you mean 'share"):
        get_read("Quest(shar=0.5)")
