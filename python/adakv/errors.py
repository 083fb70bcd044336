"""What adakv raises besides ``ValueError``, and how it takes numbers: for every floor."""

from __future__ import annotations

import math
import operator
from typing import Any

from adakv._C import Error

__all__ = ["NOT_A_NUMBER", "Error", "integer", "number", "short", "to_float", "to_int"]


def integer(name: str, value: Any, low: int, high: int = 2**63 - 1) -> int:
    """``value`` as ``int``, from Python's integers or numpy's.

    Raises ``ValueError`` with the argument's ``name`` if it is none, or not in ``[low, high]``.
    """
    try:
        converted = to_int(value)
    except NOT_A_NUMBER:
        raise ValueError(f"{name} must be an integer, got {short(value)}") from None
    if not low <= converted <= high:
        allowed = f"at least {low}" if converted < low else f"at most {high}"
        raise ValueError(f"{name} must be {allowed}, got {short(converted)}")
    return converted


def number(name: str, value: Any) -> float:
    """``value`` as ``float``, from a number of Python, numpy or torch.

    Raises ``ValueError`` with the argument's ``name`` if it is none, or not finite.
    """
    try:
        converted = to_float(value)
    except NOT_A_NUMBER:
        converted = math.nan
    if not math.isfinite(converted):
        raise ValueError(f"{name} must be a finite number, got {short(value)}")
    return converted


#: What :func:`to_int` and :func:`to_float` raise.
NOT_A_NUMBER = (TypeError, ValueError, OverflowError, RuntimeError)


def to_int(value: Any) -> int:
    """An integer of Python, numpy or torch; truth values are none."""
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def to_float(value: Any) -> float:
    """A number of Python, numpy or torch; truth values and texts are none."""
    if isinstance(value, (bool, str)):
        raise TypeError
    return float(value)


def short(value: Any) -> str:
    """At most 80 characters of what it looks like."""
    is_huge = isinstance(value, int) and abs(value) >= 2**63
    text = "a huge integer" if is_huge else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
