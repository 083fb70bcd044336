"""Policies written down: ``"Defensive(pinned=8) * ModelWide(floor=0.1) * TopScore()"``."""

from __future__ import annotations

import ast
from typing import Any

from adakv.policy import allocators, prompt_scorers, scorers, selectors
from adakv.policy.base import Policy

_PARTS = {
    name: part
    for module in (allocators, prompt_scorers, scorers, selectors)
    for name, part in vars(module).items()
    if isinstance(part, type) and part.__module__ == module.__name__ and not name.startswith("_")
}


def parse(text: str) -> Policy:
    """``scorer * allocator * selector``, each a part of the library with settings by name.

    Settings are numbers, strings, truth values or parts, as in ``Adaptive(layers=Pyramid())``.
    Raises ``ValueError`` with the reason if the text is anything else, or a setting is refused.
    """
    try:
        match ast.parse(text, mode="eval").body:
            case ast.BinOp(ast.BinOp(scorer, ast.Mult(), allocator), ast.Mult(), selector):
                return Policy(
                    _part(scorer, "score"),
                    _part(allocator, "allocate"),
                    _part(selector, "select"),
                )
        raise ValueError("not of the form scorer * allocator * selector")
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"policy {text!r}: {error}") from error


def _part(node: ast.expr, does: str) -> Any:
    known = [name for name, part in _PARTS.items() if hasattr(part, does)]
    match node:
        case ast.Call(ast.Name(name), [], keywords) if name in known:
            return _PARTS[name](**{str(k.arg): _setting(k.value) for k in keywords})
    raise ValueError(
        f"{ast.unparse(node)} must be one of {', '.join(known)}, with settings by name"
    )


def _setting(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        return _part(node, "budget")  # a layer schedule
    return ast.literal_eval(node)
