"""What adakv raises besides ``ValueError``, and how it takes numbers: for every floor."""

from __future__ import annotations

import math
import operator
from typing import Any

from adakv._C import Error

__all__ = ["Error", "integer", "number", "short"]


def integer(name: str, value: Any, low: int, high: int = 2**63 - 1) -> int:
    """``value`` as ``int``, from Python's integers or numpy's.

    Raises ``ValueError`` with the argument's ``name`` if it is none, or not in ``[low, high]``.
    """
    try:
        number = operator.index(value)
        if isinstance(value, bool):
            raise TypeError
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be an integer, got {short(value)}") from None
    if not low <= number <= high:
        allowed = f"at least {low}" if number < low else f"at most {high}"
        raise ValueError(f"{name} must be {allowed}, got {short(number)}")
    return number


def number(name: str, value: Any) -> float:
    """``value`` as ``float``, from a number of Python, numpy or torch.

    Raises ``ValueError`` with the argument's ``name`` if it is none, or not finite.
    """
    try:
        converted = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        converted = math.nan
    if not math.isfinite(converted):
        raise ValueError(f"{name} must be a finite number, got {short(value)}")
    return converted


def short(value: Any) -> str:
    """At most 80 characters of what it looks like."""
    is_huge = isinstance(value, int) and abs(value) >= 2**63
    text = "a huge integer" if is_huge else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
