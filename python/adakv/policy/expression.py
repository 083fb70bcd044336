"""Policies written down: ``"Defensive(pinned=8) * ModelWide(floor=0.1) * TopScore()"``."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any, cast

from adakv.policy import (
    allocators,
    beside,
    class_scorers,
    fusion,
    gates,
    layer_shares,
    learned,
    mass_share,
    outliers,
    predictor,
    profile,
    prompt_scorers,
    reads,
    scorers,
    selectors,
    text_scorers,
)
from adakv.policy.base import EveryTokens, Policy, TopScore
from adakv.policy.folded import Folded
from adakv.policy.inputs import did_you_mean
from adakv.policy.more_tokens import MoreTokens

_PARTS = {
    name: part
    for module in (
        allocators,
        class_scorers,
        fusion,
        gates,
        layer_shares,
        learned,
        mass_share,
        outliers,
        profile,
        prompt_scorers,
        reads,
        predictor,
        beside,
        scorers,
        selectors,
        text_scorers,
    )
    for name, part in vars(module).items()
    if isinstance(part, type) and part.__module__ == module.__name__ and not name.startswith("_")
    if part is not reads.PageRead  # what reads have in common
}
_PARTS |= {part.__name__: part for part in (TopScore, EveryTokens, MoreTokens, Folded)}

#: What may follow scorer, allocator and selector, in any order, and what tells it from other parts;
#: as :class:`Policy` has them.
_BEHIND = {"EveryTokens": "every", "MoreTokens": "kv_dtype", "Folded": "fold"}

_MOST_SHOWN = 200  # characters of a text in a message


def parse(text: str) -> Policy:
    """``scorer * allocator * selector``, each a part of the library with settings by name; behind
    them ``* EveryTokens(every=128)`` if texts are chosen from, too, ``* MoreTokens()`` if the
    budget is one of bytes, and ``* Folded()`` if what leaves is folded into what stays.

    Settings are numbers, strings, truth values or parts, as in ``Adaptive(layers=Pyramid())``.
    Raises ``ValueError`` with the reason if the text is anything else, or a setting is refused.
    """
    return cast(Policy, _parsed("policy", text, _policy))


def parse_read(text: str) -> reads.Read:
    """What steps read, written down, as :func:`parse` takes a part."""
    return cast(reads.Read, _parsed("read", text, lambda body: _part(body, "reads")))


def _parsed(what: str, text: str, made: Callable[[ast.expr], Any]) -> Any:
    shown = repr(text) if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]!r}..."
    try:
        with warnings.catch_warnings():  # the parser warns of texts that are refused anyway
            warnings.simplefilter("ignore")
            body = ast.parse(text, mode="eval").body
        return made(body)
    except (RecursionError, MemoryError) as error:  # what Python's parser says of a deep text
        raise ValueError(f"{what} {shown}: too many parts within each other") from error
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"{what} {shown}: {error}") from error


def _policy(body: ast.expr) -> Policy:
    behind: dict[str, Any] = {}
    while True:
        match body:
            case ast.BinOp(parts, ast.Mult(), ast.Call(ast.Name(name)) as part) if (
                name in _BEHIND and name not in behind
            ):
                body, behind[name] = parts, _part(part, _BEHIND[name])
            case ast.BinOp(ast.BinOp(scorer, ast.Mult(), allocator), ast.Mult(), selector):
                return Policy(
                    _part(scorer, "score"),
                    _part(allocator, "allocate"),
                    _part(selector, "select"),
                    *(behind.get(name) for name in _BEHIND),
                )
            case _:
                raise ValueError("not of the form scorer * allocator * selector")


def _part(node: ast.expr, does: str) -> Any:
    known = [name for name, part in _PARTS.items() if hasattr(part, does)]
    match node:
        case ast.Call(ast.Name(name), [], keywords) if name in known:
            settings: dict[str, Any] = {}
            for keyword in keywords:
                setting = str(keyword.arg)
                possible = [field.name for field in fields(_PARTS[name])]
                if setting not in possible:
                    hint = did_you_mean(setting, possible)
                    raise ValueError(f"{name}: unexpected keyword argument {setting!r}{hint}")
                if setting in settings:
                    raise ValueError(f"{name}: {setting} is given twice")
                settings[setting] = _setting(keyword.value)
            return _PARTS[name](**settings)
    got = ast.unparse(node)
    got = got if len(got) <= _MOST_SHOWN else f"{got[:_MOST_SHOWN]}..."
    hint = did_you_mean(got.partition("(")[0], known)
    raise ValueError(f"{got} must be one of {', '.join(known)}, with settings by name{hint}")


def _setting(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        return _part(node, "budget")  # a layer schedule
    return ast.literal_eval(node)
