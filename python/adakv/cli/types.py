"""What the words on a command line may be."""

from __future__ import annotations

import os
from typing import Any

import click

from adakv.formats import KV_DTYPES
from adakv.tiers import Tiers


class _File(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since 8.5
    """A path, of a file or folder, that the system can be asked for."""

    name = "file"

    def convert(self, value: Any, param: Any, context: Any) -> str:
        path = str(value)
        try:
            named = os.fsencode(path)
        except UnicodeEncodeError:
            self.fail(f"{path!a} can't be the name of a file", param, context)
        if not named or b"\0" in named:
            self.fail(f"{path!a} can't be the name of a file", param, context)
        return path


class _Text(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Text for a model: whole characters."""

    name = "text"

    def convert(self, value: Any, param: Any, context: Any) -> str:
        text = str(value)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            self.fail(f"character {error.start} is not of UTF-8 text", param, context)
        return text


class _Formats(click.Choice):  # type: ignore[type-arg,unused-ignore]
    """A format of pages, also of mixed keys, or tiers of several."""

    def convert(self, value: Any, param: Any, context: Any) -> str:
        is_one = not set(":=") & set(str(value)) and not str(value).startswith("mixed")
        if is_one:
            return str(super().convert(value, param, context))
        try:
            return str(Tiers.given(str(value)))
        except ValueError as error:
            self.fail(str(error).removeprefix("kv_dtype: "), param, context)


FILE, TEXT, FORMATS = _File(), _Text(), _Formats(KV_DTYPES)
