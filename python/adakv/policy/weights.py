"""What trained parts of policies know: the tensors of a file, which is read once."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from adakv.errors import short

Made = TypeVar("Made")


class Weights(NamedTuple):
    """The tensors of a file, in float32."""

    path: str
    tensors: Mapping[str, Tensor]

    def of(self, name: str) -> Tensor:
        """A tensor; raises ``ValueError`` if it isn't there."""
        if name not in self.tensors:
            raise ValueError(f"file must hold {name}, and {self.path!r} doesn't")
        return self.tensors[name]

    def num_layers(self) -> int:
        """How many layers there are; raises ``ValueError`` unless they are numbered from 0 on."""
        names = (re.match(r"layers\.(\d+)\.", name) for name in self.tensors)
        numbers = {int(name[1]) for name in names if name}
        if numbers != set(range(len(numbers))) or not numbers:
            raise ValueError(
                f"file must hold layers.0, layers.1 and so on, and {self.path!r} holds layers "
                f"{sorted(numbers)}"
            )
        return len(numbers)


def set_file(part: Any) -> None:
    """Makes a part's setting ``file`` a string; raises ``ValueError`` if it is no path."""
    if not isinstance(part.file, (str, Path)):
        raise ValueError(f"file must be a path, got {short(part.file)}")
    object.__setattr__(part, "file", str(part.file))


def read(path: str, device: torch.device, made: Callable[[Weights], Made]) -> Made:
    """What is ``made`` of a safetensors file whose tensors are on a device. It is made once, and
    again when the file has changed.

    Raises ``ValueError`` if the file isn't there, or is no safetensors file.
    """
    try:
        stat = Path(path).stat()
    except (OSError, ValueError) as error:
        raise ValueError(f"file must be there, got {path!r}: {error}") from None
    return _read(path, stat.st_mtime_ns, stat.st_size, device, made)  # type: ignore[return-value]


@functools.lru_cache(maxsize=16)
def _read(
    path: str, changed: int, size: int, device: torch.device, made: Callable[[Weights], object]
) -> object:
    """``changed`` and ``size`` tell a file from an older one of the same name."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"file must be a safetensors file, got {path!r}: {error}") from None
    return made(Weights(path, {name: x.float().to(device) for name, x in tensors.items()}))
