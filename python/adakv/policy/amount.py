"""Amounts of memory as people write them: ``"512MiB"``, ``"10%"``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from adakv.errors import integer, short

_UNITS = {
    "b": 1,
    **{f"{letter}ib": 2 ** (10 * i) for i, letter in enumerate("kmgt", 1)},
    **{f"{letter}b": 10 ** (3 * i) for i, letter in enumerate("kmgt", 1)},
}
_WRITTEN = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(%|[kmgt]?i?b)?", re.IGNORECASE | re.ASCII)

_FORM = "bytes, as an integer or a text such as '512MiB', '1.5GB' or '10%' (of the full cache's)"


@dataclass(frozen=True)
class Amount:
    """Bytes for one sequence: a number, or a share of what its full cache would take."""

    count: int | None = None
    share: Fraction | None = None

    @classmethod
    def given(cls, name: str, value: Any) -> Amount:
        """From what users give: an integer, or a text with a unit (KiB, MiB, GiB, TiB of 1024; kB,
        MB, GB, TB of 1000; B or none) or a percent sign.

        Raises ``ValueError`` with the argument's ``name`` for anything else, for less than one byte
        and for 0 % or more than 100 %.
        """
        if not isinstance(value, str):
            try:
                return cls(count=integer(name, value, 1))
            except ValueError as error:
                if "integer" not in str(error):
                    raise
                raise ValueError(f"{name} must be {_FORM}, got {short(value)}") from None
        match = _WRITTEN.fullmatch(value.strip())
        if match is None:
            raise ValueError(f"{name} must be {_FORM}, got {short(value)}")
        number, unit = Fraction(match[1]), (match[2] or "B").lower()
        if unit == "%":
            if not 0 < number <= 100:
                raise ValueError(f"{name} must be above 0% and at most 100%, got {short(value)}")
            return cls(share=number / 100)
        return cls(count=integer(name, int(number * _UNITS[unit]), 1))

    @property
    def brief(self) -> str:
        """For people."""
        if self.share is None:
            return str(self.count)
        return f"{float(100 * self.share):g}%"

    def of(self, full_bytes: int) -> int:
        """Bytes, for a sequence whose full cache takes ``full_bytes``."""
        if self.share is None:
            assert self.count is not None
            return self.count
        return int(self.share * full_bytes)
