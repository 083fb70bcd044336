"""Many prompts from a file of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adakv.cli.inputs import (
    InputError,
    check_prompt_length,
    read_text,
    refusals,
)
from adakv.cli.protect import system_spans
from adakv.eval.chat import encode_messages
from adakv.eval.files import parse_json

BYTE_ORDER_MARK = "\ufeff"  # also where files were joined


@dataclass(frozen=True)
class Line:
    """A prompt, as its line of the file has it."""

    place: str  #: FILE:LINE
    field: str  #: which of KINDS
    prompt: Any
    max_new_tokens: int | None

    def encode(
        self, model: Any, tokenizer: Any, max_new_tokens: int, prefix: Tensor | None = None
    ) -> Tensor:
        """``[T]`` tokens, to which the model can add ``max_new_tokens``; behind a prefix ``[T]``,
        if there is one."""
        from adakv.hf.prompts import token_ids

        name, prompt = f"{self.place}: {self.field}", self.prompt
        if self.field == "messages":
            if prefix is not None:
                raise InputError(
                    f"{name} don't go with --prefix: they have a beginning of their own"
                )
            if not tokenizer.chat_template:
                raise InputError(f"{name} need a chat template, which this tokenizer doesn't have")
            try:
                prompt = encode_messages(tokenizer, prompt)[0]
            except Exception as error:  # templates are programs, with errors of their own
                raise InputError(f"{name} don't fit the chat template: {error}") from error
        with refusals():
            ids = token_ids(model, tokenizer, name, prompt, goes_on=prefix is not None)
        length = len(ids) + (0 if prefix is None else len(prefix))
        check_prompt_length(model, length, max_new_tokens, name=name)
        return ids

    def system(self, tokenizer: Any) -> list[tuple[int, int]]:
        """Tokens before the user's first one."""
        if self.field != "messages":
            raise InputError(f"{self.place}: --protect-system needs messages, got {self.field}")
        return system_spans(tokenizer, self.prompt)


def read_prompts(path: str) -> list[Line]:
    """One prompt per line; empty lines are skipped."""
    lines = enumerate(read_text(path).split("\n"), start=1)
    return [
        _parse(f"{path}:{number}", line)
        for number, line in lines
        if line.strip(BYTE_ORDER_MARK).strip()
    ]


def _is_text(x: Any) -> bool:
    return isinstance(x, str) and x != ""


def _is_count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def _is_message(x: Any) -> bool:
    return isinstance(x, dict) and _is_text(x.get("role")) and "content" in x


def _is_list_of(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, list) and x != [] and all(map(is_one, x))


KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prompt": (_is_text, "a string that isn't empty"),
    "messages": (_is_list_of(_is_message), "a list of objects with role and content"),
    "input_ids": (_is_list_of(_is_count), "a list of token ids"),
}
FIELDS = {**KINDS, "max_new_tokens": (lambda x: _is_count(x) and x > 0, "an integer above 0")}


def _parse(place: str, line: str) -> Line:
    try:
        fields = parse_json(line.removeprefix(BYTE_ORDER_MARK))
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not JSON at column {error.colno}: {error.msg}") from error
    except ValueError as error:
        raise InputError(f"{place}: {error}") from error
    if not isinstance(fields, dict):
        raise InputError(f"{place}: must be an object, got {line.strip():.40}")
    for name, value in fields.items():
        if name not in FIELDS:
            raise InputError(f"{place}: unknown field {name!r}; known are {', '.join(FIELDS)}")
        is_right, expected = FIELDS[name]
        if not is_right(value):
            raise InputError(f"{place}: {name} must be {expected}, got {json.dumps(value):.40}")
    kinds = [name for name in KINDS if name in fields]
    if len(kinds) != 1:
        got = " and ".join(kinds) or "none"
        raise InputError(f"{place}: give one of {', '.join(KINDS)}, got {got}")
    return Line(place, kinds[0], fields[kinds[0]], fields.get("max_new_tokens"))
