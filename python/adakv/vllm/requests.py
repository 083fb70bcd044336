"""What a single request asks for: ``SamplingParams(extra_args={"adakv": {...}})``.

OpenAI's clients send the same as a JSON string, ``extra_body={"vllm_xargs": {"adakv": "{...}"}}``:
vLLM takes no deeper values there.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, NamedTuple

from adakv.policy.inputs import CLASSES

#: Spans of tokens that a request may protect, besides its first tokens; and that it may have of
#: classes.
MAX_SPANS = 16

_FORM = "a list of up to 16 pairs [begin, end] with 0 <= begin < end"


class Limits(NamedTuple):
    """The bounds of what requests may ask an engine for."""

    budget: int  #: the engine's
    least: int = 1  #: entries that its policy keeps in any case
    protects: bool = True  #: whether its layers all keep equally much, so that each has room
    reads_classes: bool = False  #: whether its policy asks which tokens are of an image


@dataclass(frozen=True)
class Wishes:
    """One request's settings.

    Parameters
    ----------
    budget : int, optional
        Mean entries per kv head, at most the engine's.
    policy : "off", optional
        The request is not compressed.
    protect : pairs of int
        Spans ``[begin, end]`` of tokens, those before ``end``, that every head keeps.
    protect_prefix : int
        The same for the first tokens.
    classes : dict
        Such spans by ``"image"``, ``"audio"`` or ``"instruction"``; other tokens are text.

    Raises
    ------
    ValueError
        Names the setting, what is expected and what came.
    """

    budget: int | None = None
    policy: str | None = None
    protect: Sequence[Sequence[int]] = ()
    protect_prefix: int = 0
    classes: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check("policy", self.policy, '"off"', self.policy in (None, "off"))
        _check("budget", self.budget, "an integer", self.budget is None or _is_count(self.budget))
        first = self.protect_prefix
        _check("protect_prefix", first, "a number of tokens", _is_count(first))
        _check("protect", self.protect, _FORM, _are_spans(self.protect))
        names, given = ", ".join(CLASSES[1:]), self.classes
        form = f"a dict of spans by class ({names}), of up to 16 pairs in all that don't overlap"
        _check("classes", given, form, _are_classes(given))

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None) -> Wishes:
        """Reads a request's ``extra_args``."""
        given = (extra_args or {}).get("adakv", {})
        if isinstance(given, str):
            with contextlib.suppress(json.JSONDecodeError):
                given = json.loads(given)
        names = [x.name for x in fields(cls)]
        if not isinstance(given, Mapping) or set(given) - set(names):
            raise ValueError(
                f'extra_args["adakv"] must be a dict of {", ".join(names)}, or one in JSON, '
                f"got {given!r}"
            )
        return cls(**given)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Protected ones, in order, apart from each other."""
        spans = [(begin, end) for begin, end in self.protect]
        spans += [(0, self.protect_prefix)] * bool(self.protect_prefix)
        joined: list[tuple[int, int]] = []
        for begin, end in sorted(spans):
            if joined and begin <= joined[-1][1]:
                begin, end = joined[-1][0], max(end, joined.pop()[1])
            joined.append((begin, end))
        return tuple(joined)

    @property
    def class_spans(self) -> tuple[tuple[int, int, int], ...]:
        """Begin, end and number of the class of each span of a class, in order."""
        return tuple(
            sorted(
                (begin, end, CLASSES.index(name))
                for name, spans in self.classes.items()
                for begin, end in spans
            )
        )

    def check(self, limits: Limits) -> None:
        """Raises ``ValueError`` if an engine can't do it."""
        budget = limits.budget if self.budget is None else self.budget
        protected = sum(end - begin for begin, end in self.spans)
        least = limits.least + protected
        _check("budget", budget, f"at most the engine's {limits.budget}", budget <= limits.budget)
        of_them = f" and the {protected} protected tokens" if protected else ""
        _check(
            "budget",
            budget,
            f"at least {least} entries, for the policy's window{of_them}",
            self.policy == "off" or least <= budget,
        )
        _check(
            "protect",
            self.protect or self.protect_prefix,
            "empty: layers of the engine's policy keep unequally much, whatever is protected",
            limits.protects or not protected,
        )
        _check(
            "classes",
            self.classes,
            "empty: the engine's policy doesn't read them",
            limits.reads_classes or not self.classes,
        )


def _check(name: str, given: Any, expected: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"adakv: a request's {name} must be {expected}, got {given!r}")


def _is_count(given: Any) -> bool:
    return isinstance(given, int) and not isinstance(given, bool) and given >= 0


def _are_spans(given: Any) -> bool:
    return (
        isinstance(given, Sequence)
        and len(given) <= MAX_SPANS
        and all(
            isinstance(span, Sequence)
            and len(span) == 2
            and all(map(_is_count, span))
            and span[0] < span[1] < 2**31
            for span in given
        )
    )


def _are_classes(given: Any) -> bool:
    if not isinstance(given, Mapping) or not set(given) <= set(CLASSES[1:]):
        return False
    if not all(map(_are_spans, given.values())):
        return False
    spans = sorted(tuple(span) for of_class in given.values() for span in of_class)
    is_apart = all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    return is_apart and len(spans) <= MAX_SPANS
