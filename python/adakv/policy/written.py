"""Policies and budgets in a line, and for notebooks: what :mod:`adakv.policy.expression` reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


def brief(part: object) -> str:
    """A part of a policy, with those of its settings that are not the default."""
    if not dataclasses.is_dataclass(part):
        text = repr(part)
        return text if "\n" not in text else f"<{type(part).__name__}>"  # such as a model
    settings = []
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        usual = field.default_factory() if callable(field.default_factory) else field.default
        if value != usual:
            settings.append(f"{field.name}={brief(value)}")
    return f"{type(part).__name__}({', '.join(settings)})"


def expression(parts: Mapping[str, Any]) -> str:
    """``scorer * allocator * selector``, of those parts that there are."""
    return " * ".join(brief(part) for part in parts.values() if part is not None)


def rows(parts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The name of each part, the part, and what it does."""
    return [(name, brief(part), _does(part)) for name, part in parts.items() if part is not None]


def _does(part: object) -> str:
    """The first sentence of a part's description; nothing if that was made by the machine."""
    told = " ".join((type(part).__doc__ or "").partition("\n\n")[0].split())
    return "" if told.startswith(f"{type(part).__name__}(") else told.partition(". ")[0]
