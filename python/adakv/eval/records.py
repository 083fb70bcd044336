"""What was measured: records, one JSON line each, so that a stopped run goes on later."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from adakv.eval.metrics import Quality


class Key(NamedTuple):
    """What a record is about."""

    task: str
    item: str
    policy: str
    share: float


@dataclass(frozen=True)
class Record:
    """Quality of one item under one policy and share, and the bytes it was had for.

    Parameters
    ----------
    key : :class:`Key`
    group : str
        Of the item.
    quality : :class:`Quality`
    tokens : int
        Of the prompt.
    bytes, full_bytes : int
        Of the compressed prompt, whole pages counted, and of a full cache's.
    depth : float, optional
        Of the item.
    """

    key: Key
    group: str
    quality: Quality
    tokens: int
    bytes: int
    full_bytes: int
    depth: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Flat, for JSON."""
        values = asdict(self)
        del values["key"], values["quality"]
        return self.key._asdict() | asdict(self.quality) | values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """The inverse of :meth:`as_dict`."""
        key = Key(*(values[name] for name in Key._fields))
        quality = Quality(**{name: values[name] for name in Quality.__dataclass_fields__})
        names = ("group", "tokens", "bytes", "full_bytes", "depth")
        return cls(key=key, quality=quality, **{name: values[name] for name in names})


class RecordFile:
    """Records in a file of JSON lines; the first line says what they belong to.

    Without a path they are only kept in memory.

    Raises
    ------
    ValueError
        If the file is something else, or was begun with another ``about``. It is left as it was.
    """

    def __init__(self, path: str | None, about: Mapping[str, Any]) -> None:
        self.records: list[Record] = []
        self._path = Path(path) if path else None
        if self._path is None:
            return
        header = json.dumps(about)
        lines = _complete_lines(self._path, header)
        if lines:
            self.records = _read(self._path, lines, json.loads(header))
        if self._path.is_file():
            os.truncate(self._path, sum(len(line.encode()) + 1 for line in lines))
        if not lines:
            _append(self._path, header)

    def add(self, record: Record) -> None:
        """Appends a record."""
        if self._path is not None:
            _append(self._path, json.dumps(record.as_dict()))
        self.records.append(record)


def _complete_lines(path: Path, header: str) -> list[str]:
    """All lines but what a killed run left behind the last newline; none of a pipe or device."""
    try:
        data = path.read_bytes() if path.is_file() else b""
        text = data[: data.rfind(b"\n") + 1].decode()  # half a character may be left behind
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} holds no records of adakv eval") from error
    if not text and not header.encode().startswith(data):
        raise ValueError(f"{path} holds no records of adakv eval")
    return text.split("\n")[:-1]


def _read(path: Path, lines: list[str], about: dict[str, Any]) -> list[Record]:
    try:
        begun = dict(json.loads(lines[0]))
        records = [Record.from_dict(json.loads(line)) for line in lines[1:]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} holds no records of adakv eval") from error
    changed = sorted(n for n in {**begun, **about} if begun.get(n) != about.get(n))
    if changed:
        changes = ", ".join(f"{n} {begun.get(n)}, now {about.get(n)}" for n in changed)
        raise ValueError(f"{path} was begun with {changes}; give another file for the records")
    return records


def _append(path: Path, line: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
    except OSError as error:
        raise ValueError(f"{path} can't be written: {error.strerror}") from error
