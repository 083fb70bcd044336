"""Amounts of memory as people write them."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from adakv.policy.amount import Amount


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (1, 1),
        (np.int64(4096), 4096),
        ("4096", 4096),
        ("4096B", 4096),
        ("512MiB", 512 * 2**20),
        ("512mib", 512 * 2**20),
        (" 1.5 GiB ", 3 * 2**29),
        ("2kB", 2000),
        (".5TB", 5 * 10**11),
        ("1.1B", 1),
    ],
)
def test_bytes_are_read(given: object, count: int) -> None:
    assert Amount.given("budget_bytes", given) == Amount(count=count)


def test_shares_are_read() -> None:
    tenth = Amount.given("budget_bytes", "10%")
    assert tenth == Amount(share=Fraction(1, 10)) and tenth.of(1999) == 199
    assert Amount.given("budget_bytes", "12.5 %").of(8) == 1
    assert Amount.given("budget_bytes", 7).of(1999) == 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0.1, r"must be bytes, .* '512MiB', .* or '10%' .*, got 0\.1"),
        (True, "got True"),
        (None, "got None"),
        ("", "got ''"),
        ("lots", "got 'lots'"),
        ("5 MM", "got '5 MM'"),
        ("-5", "got '-5'"),
        ("1e3", "got '1e3'"),
        ("٣MiB", "got '٣MiB'"),
        (0, "at least 1, got 0"),
        ("0.5", "at least 1, got 0"),
        ("9" * 30, "at most"),
        ("0%", "above 0% and at most 100%, got '0%'"),
        ("101%", "above 0% and at most 100%"),
    ],
)
def test_others_are_refused(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^budget_bytes .*{message}"):
        Amount.given("budget_bytes", given)
