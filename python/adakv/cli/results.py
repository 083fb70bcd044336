"""Results as JSON lines: those of a stopped run stay, new ones are added as they are done.

Each says what it was made of, so that a run goes on only with results that it would have had.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adakv.cli.inputs import STANDARD_OUTPUT, InputError
from adakv.eval.files import parse_json

FIELDS = ("index", "prompt_tokens", "tokens", "text", "end", "prompt_sha256", "settings")
_FIRST = b'{"index": '  # what every line begins with
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d{1,9})")


class ResultFile:
    """The results of many prompts in a file, or on their way into a pipe.

    A file that is there holds the results of a run that was stopped, and what is done is not done
    again; half a line at its end is. Nothing is changed before :meth:`begin`.

    Parameters
    ----------
    path : str
        ``-`` and ``/dev/stdout`` are standard output.
    overwrite : bool
        Whether to throw away what a file holds.

    Attributes
    ----------
    done : dict
        The results that are there, by the index of their prompt.
    """

    def __init__(self, path: str, *, overwrite: bool) -> None:
        self.path = path
        self.done: dict[int, dict[str, Any]] = {}
        self._prompts: list[str] = []
        self._settings: Mapping[str, Any] = {}
        self._lines: dict[int, bytes] = {}
        self._size = 0  # of the lines that stay
        try:
            self._file = _open(path)
            self._is_file = _is_regular(path, self._file)
            data = Path(path).read_bytes() if self._is_file and not overwrite else b""
        except OSError as error:
            raise InputError(f"{path} can't be written: {error.strerror}") from error
        self._read(data)

    def _read(self, data: bytes) -> None:
        *lines, torn = data.split(b"\n")
        self._size = len(data) - len(torn)
        strange = not (torn.startswith(_FIRST) or _FIRST.startswith(torn))
        for line in lines:
            result = _parse(line)
            strange = strange or result is None or result["index"] in self.done
            if result is None or strange:
                break
            self.done[result["index"]] = result
            self._lines[result["index"]] = line + b"\n"
        if strange:
            raise InputError(
                f"{self.path} holds something else than results: give another file or --overwrite"
            )

    def check(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        settings: Mapping[str, Any],
    ) -> None:
        """Refuses results that aren't those of these prompts and settings.

        Parameters
        ----------
        prompts : token ids of each
        max_new_tokens : int of each
        settings : dict for JSON
            What else the texts depend on.
        """
        self._prompts, self._settings = [prompt_digest(prompt) for prompt in prompts], settings
        for index, result in self.done.items():
            self._check_settings(index, result["settings"])
            read, most, digest, written = 0, 0, "", len(result["tokens"])
            if index < len(prompts):
                read, most, digest = (
                    len(prompts[index]),
                    max_new_tokens[index],
                    self._prompts[index],
                )
            is_whole = written == most or (written < most and result["end"] != "length")
            if read != result["prompt_tokens"] or not is_whole:
                raise InputError(
                    f"{self.path} holds the results of other prompts: {written} tokens after one "
                    f"with {result['prompt_tokens']} at index {index}, where there are {read} and "
                    f"{most} may be written: give another file or --overwrite"
                )
            if digest != result["prompt_sha256"]:
                raise InputError(
                    f"{self.path} holds the results of other prompts: the one at index {index} was "
                    "another text: give another file or --overwrite"
                )

    def _check_settings(self, index: int, before: Mapping[str, Any]) -> None:
        now = self._settings
        changed = [name for name in {**now, **before} if now.get(name) != before.get(name)]
        if changed:
            changes = ", ".join(f"{n} {before.get(n)}, now {now.get(n)}" for n in changed)
            raise InputError(
                f"{self.path} holds results of other settings ({changes}, at index {index}): give "
                "another file or --overwrite"
            )

    def begin(self) -> None:
        """Cuts off what doesn't stay."""
        if self._is_file:
            os.truncate(self._file, self._size)

    def write(self, result: Any) -> None:
        """Adds a result of the prompts and settings of :meth:`check`."""
        made_of = {"prompt_sha256": self._prompts[result.index], "settings": self._settings}
        line = json.dumps(asdict(result) | made_of, ensure_ascii=False).encode() + b"\n"
        self._lines[result.index] = line
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            raise InputError(f"{self.path} can't be written: {error.strerror}") from error

    def finish(self) -> None:
        """Brings the lines of a file into the order of the prompts."""
        if not self._is_file or list(self._lines) == sorted(self._lines):
            return
        target = os.path.realpath(self.path)
        temporary = None
        try:
            with tempfile.NamedTemporaryFile(dir=os.path.dirname(target), delete=False) as file:
                temporary = file.name
                file.writelines(self._lines[index] for index in sorted(self._lines))
            shutil.copymode(target, temporary)
            os.replace(temporary, target)
        except OSError as error:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            raise InputError(
                f"{self.path} holds all results, but can't be brought into the order of the "
                f"prompts: {error.strerror}"
            ) from error

    def close(self) -> None:
        """Ends the writing."""
        os.close(self._file)


def _open(path: str) -> int:
    """A descriptor to append to; one that is open already, if the path says so."""
    descriptor = _DESCRIPTOR.fullmatch(path)
    if path in STANDARD_OUTPUT or descriptor:
        return os.dup(int(descriptor[1]) if descriptor else 1)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)


def _is_regular(path: str, file: int) -> bool:
    is_open_already = path in STANDARD_OUTPUT or _DESCRIPTOR.fullmatch(path)
    return not is_open_already and stat.S_ISREG(os.fstat(file).st_mode)


def _parse(line: bytes) -> dict[str, Any] | None:
    """A result, or None if the line is something else."""
    try:
        result = parse_json(line.decode())
    except ValueError:
        return None
    if not isinstance(result, dict) or tuple(result) != FIELDS:
        return None
    counts = (result["index"], result["prompt_tokens"])
    if any(type(x) is not int or x < 0 for x in counts) or not isinstance(result["tokens"], list):
        return None
    return result if isinstance(result["settings"], dict) else None


def prompt_digest(prompt: Sequence[int]) -> str:
    """The first digits of the SHA-256 of its token ids, written in JSON."""
    return hashlib.sha256(json.dumps(list(prompt)).encode()).hexdigest()[:12]
