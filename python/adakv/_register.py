"""A verb becomes a torch operator: all that torch wants to know is in the function's signature."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

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
    know no NamedTuple of tensors: it takes the fields in the tuple's place. In place of a sequence
    ``x`` of NamedTuples it takes their tensors, one tuple after the other, and as ``x_numbers``
    their integers.

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

        kinds = [_kind(p.annotation) for p in _positional(signature)]
        layouts = [None if kind is None else kind.layout for kind in kinds]
        names = [p.name for p in _positional(signature)]
        defaults = [p.default for p in _positional(signature)]

        def in_graph(*args: P.args, **kwargs: P.kwargs) -> R:
            options: dict[str, Any] = dict(kwargs)
            given_args: list[Any] = list(args)
            for name, default in zip(names[len(args) :], defaults[len(args) :], strict=True):
                given_args.append(options.pop(name, default))
            fields: list[Any] = []
            for arg, layout in zip(given_args, layouts, strict=True):
                fields += [arg] if layout is None else _fields_of(arg, layout)
            given = operator(*fields, **options)
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


def _positional(signature: inspect.Signature) -> list[inspect.Parameter]:
    return [p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]


class _Fields:
    """A NamedTuple of tensors, as an operator takes it: field by field."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind
        self.count = len(kind._fields)  #: of parameters
        self.layout = self.count  #: see :func:`_fields_of`

    def parameters(self, given: inspect.Parameter) -> Iterator[inspect.Parameter]:
        """Those of the operator in place of one of the function."""
        for field in self._kind._fields:
            is_given = given.default is not None and field not in self._kind._field_defaults
            tensor = torch.Tensor if is_given else _Optional
            yield given.replace(name=field, annotation=tensor)

    def made_of(self, fields: Sequence[Any]) -> Any:
        """What the function is given; None for a tuple that was left out."""
        return None if all(x is None for x in fields) else self._kind._make(fields)


class _Lists:
    """A sequence of NamedTuples, as an operator takes it: a list of all their tensors, and one of
    their integers."""

    count = 2

    def __init__(self, kind: Any) -> None:
        self._kind, self._hints = kind, [*get_type_hints(kind).values()]
        #: The places of what is in a tuple, and of what is in tuples in it; what are numbers.
        self.layout: list[tuple[list[int], bool]] = []
        for i, hint in enumerate(self._hints):
            if hasattr(hint, "_fields"):
                self.layout += [([i, j], False) for j in range(len(hint._fields))]
            else:
                self.layout.append(([i], hint is int))

    def parameters(self, given: inspect.Parameter) -> Iterator[inspect.Parameter]:
        """As :meth:`_Fields.parameters`."""
        empty = given.empty
        yield given.replace(annotation=Sequence[_Optional], default=empty)
        name = f"{given.name}_numbers"
        yield given.replace(name=name, annotation=Sequence[int], default=empty)

    def made_of(self, fields: Sequence[Any]) -> Any:
        """As :meth:`_Fields.made_of`."""
        tensors, numbers = (iter(x) for x in fields)
        num_tensors = sum(not is_number for _, is_number in self.layout)
        return [
            self._kind(
                *[
                    hint._make([next(tensors) for _ in hint._fields])
                    if hasattr(hint, "_fields")
                    else next(numbers if hint is int else tensors)
                    for hint in self._hints
                ]
            )
            for _ in range(len(fields[0]) // num_tensors)
        ]


def _fields_of(given: Any, layout: int | list[tuple[list[int], bool]]) -> list[Any]:
    """What an operator is given in place of a tuple of so many tensors, or of a sequence."""
    if isinstance(layout, int):
        return [*(given or (None,) * layout)]
    tensors: list[Any] = []
    numbers: list[Any] = []
    for item in given:
        for path, is_number in layout:
            x = item
            for i in path:
                x = x[i]
            (numbers if is_number else tensors).append(x)
    return [tensors, numbers]


def _kind(annotation: Any) -> _Fields | _Lists | None:
    """How a parameter that is no simple one is taken: NamedTuples of tensors, and sequences of
    them."""
    is_sequence = get_origin(annotation) is Sequence
    kinds = [annotation, *get_args(annotation)]
    kind = next((kind for kind in kinds if hasattr(kind, "_fields")), None)
    return None if kind is None else _Lists(kind) if is_sequence else _Fields(kind)


def _schema(signature: inspect.Signature, mutates: Iterable[str]) -> str:
    def flat(parameter: inspect.Parameter) -> Iterator[inspect.Parameter]:
        annotation = parameter.annotation
        if get_origin(annotation) is Literal:
            yield parameter.replace(annotation=str)
        elif (kind := _kind(annotation)) is not None:
            yield from kind.parameters(parameter)
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
    kinds = [_kind(p.annotation) for p in _positional(signature)]
    if not any(kinds):
        return function
    ends = list(accumulate(1 if kind is None else kind.count for kind in kinds))
    parts = list(zip(kinds, [0, *ends], ends, strict=False))

    def call(*fields: Any, **options: Any) -> Any:
        args = [
            fields[start] if kind is None else kind.made_of(fields[start:end])
            for kind, start, end in parts
            if start < len(fields)
        ]
        return function(*args, **options)

    return call
