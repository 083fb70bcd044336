"""A verb becomes a torch operator: all that torch wants to know is in the function's signature."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin

import torch

P = ParamSpec("P")
R = TypeVar("R")
_Optional: Any = torch.Tensor | None

#: What stands for verbs in graphs.
_in_graph: dict[Callable[..., Any], Callable[..., Any]] = {}

_library: Any = torch.library.Library("adakv", "DEF")  # type: ignore[no-untyped-call]


def verb(
    *, fake: Callable[..., Any], mutates: Iterable[str] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Registers a function as ``torch.ops.adakv.<name>``, which stands for it in compiled graphs.

    The function itself stays as it is, so that a call costs nothing more
    (benchmarks/bench_overhead.py). The operator takes what the function takes, but that schemas
    know no NamedTuple of tensors: it takes the fields in the tuple's place.

    Parameters
    ----------
    fake : callable
        Takes what the function takes and gives outputs of the right shape, dtype and strides.
    mutates : names of arguments or fields
        The tensors whose memory is written to.
    """

    def register(body: Callable[P, R]) -> Callable[P, R]:
        name = body.__name__
        signature = inspect.signature(body, eval_str=True)
        _library.define(name + _schema(signature, mutates))
        for key in ("CPU", "CUDA"):
            _library.impl(name, _taking_fields(body, signature), key)
        taking_fields = _taking_fields(fake, signature)
        torch.library.register_fake(f"adakv::{name}", taking_fields, lib=_library)
        operator = getattr(torch.ops.adakv, name).default
        result: Any = signature.return_annotation
        is_named = hasattr(result, "_fields")

        kinds = [_tuple_kind(p.annotation) for p in signature.parameters.values()]

        def in_graph(*args: P.args, **kwargs: P.kwargs) -> R:
            fields: list[Any] = []
            given_args: tuple[Any, ...] = args
            for arg, kind in zip(given_args, kinds, strict=False):
                fields += [arg] if kind is None else [*(arg or (None,) * len(kind._fields))]
            given = operator(*fields, **kwargs)
            return result(*given) if is_named else given  # type: ignore[no-any-return]

        torch.compiler.substitute_in_graph(body, skip_signature_check=True)(in_graph)
        _in_graph[body] = in_graph
        return body

    return register


@contextmanager
def operators() -> Iterator[None]:
    """Has ``adakv.ops.<verb>`` be the operators, for what traces calls without torch's compiler.

    That is with fake tensors, ``make_fx`` and ``torch.export.export(strict=False)``. It holds for
    all threads.
    """
    try:
        for body, in_graph in _in_graph.items():
            _put(body, in_graph)
        yield
    finally:
        for body in _in_graph:
            _put(body, body)


def _put(body: Callable[..., Any], function: Callable[..., Any]) -> None:
    """Has a function stand where a verb is: in its own module, and among the others."""
    for module in (body.__module__, "adakv.ops"):
        setattr(sys.modules[module], body.__name__, function)


def _tuple_kind(annotation: Any) -> Any:
    """The NamedTuple of tensors that an annotation asks for, or is optional; None for others."""
    kinds = [annotation, *get_args(annotation)]
    return next((kind for kind in kinds if hasattr(kind, "_fields")), None)


def _schema(signature: inspect.Signature, mutates: Iterable[str]) -> str:
    def flat(parameter: inspect.Parameter) -> Iterator[inspect.Parameter]:
        annotation = parameter.annotation
        if get_origin(annotation) is Literal:
            yield parameter.replace(annotation=str)
        elif (kind := _tuple_kind(annotation)) is not None:
            is_optional = parameter.default is None
            for field in kind._fields:
                is_given = not is_optional and field not in kind._field_defaults
                tensor = torch.Tensor if is_given else _Optional
                yield parameter.replace(name=field, annotation=tensor)
        else:
            yield parameter

    def prototype() -> None: ...

    result = signature.return_annotation
    if hasattr(result, "_fields"):
        result = tuple[(torch.Tensor,) * len(result._fields)]  # type: ignore[misc]
    prototype.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[x for p in signature.parameters.values() for x in flat(p)],
        return_annotation=result,
    )
    return torch.library.infer_schema(prototype, mutates_args=tuple(mutates))


def _taking_fields(
    function: Callable[..., Any], signature: inspect.Signature
) -> Callable[..., Any]:
    """The function as the dispatcher calls it: fields one by one, options by name."""
    kinds: list[Any] = [
        _tuple_kind(p.annotation)
        for p in signature.parameters.values()
        if p.kind is not p.KEYWORD_ONLY
    ]
    if not any(kinds):
        return function
    ends = list(accumulate(len(getattr(kind, "_fields", "-")) for kind in kinds))
    parts = list(zip(kinds, [0, *ends], ends, strict=False))

    def call(*fields: Any, **options: Any) -> Any:
        args = [
            fields[start] if kind is None else kind._make(fields[start:end])
            for kind, start, end in parts
            if start < len(fields)
        ]
        args = [None if _is_nothing(arg) else arg for arg in args]
        return function(*args, **options)

    return call


def _is_nothing(arg: Any) -> bool:
    """Whether it is a tuple of tensors that was left out."""
    return isinstance(arg, tuple) and all(x is None for x in arg)
