"""Text and JSON from files that anybody may have written."""

from __future__ import annotations

import codecs
import difflib
import json
import os
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO


def read_text(path: str) -> str:
    """The text of a UTF-8 file, or of standard input for ``-``, without a byte order mark.

    Raises ``ValueError`` if it can't be read.
    """
    if path == "-" and sys.stdin is None:
        raise ValueError("standard input is closed")
    try:
        with sys.stdin.buffer if path == "-" else open(path, "rb") as file:
            if path != "-" and _is_endless(file):
                raise ValueError(f"{path} can't be read: it is a device")
            data = file.read()
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}{nearest(Path(path))}") from error
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} can't be read") from error


def nearest(path: Path) -> str:
    """``: did you mean 'this'?`` if ``path`` isn't there, and a file or folder beside it has nearly
    its name."""
    with suppress(OSError):
        near = (
            ()
            if path.exists()
            else difflib.get_close_matches(path.name, os.listdir(path.parent), 1)
        )
        for name in near:
            return f": did you mean {str(path.parent / name)!a}?"
    return ""


def _is_endless(file: BinaryIO) -> bool:
    """Whether a file is a device like /dev/zero."""
    return stat.S_ISCHR(os.fstat(file.fileno()).st_mode) and not file.isatty()


def parse_json(text: str) -> Any:
    """What a JSON text holds.

    Raises ``json.JSONDecodeError`` if it is none, and another ``ValueError`` if it is nested too
    deeply, or holds a number of thousands of digits or half a character (a lone surrogate).
    """
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise ValueError("JSON is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("JSON holds half a character, a lone surrogate") from error
    except ValueError as error:  # from Python's limit on digits
        raise ValueError("JSON holds a number of too many digits") from error
    return value
