"""Numbers of the device that the host will want to know, but not wait for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Later:
    """Integers on their way to the host.

    On CUDA they are copied behind what the device has been told to do so far. Whoever asks a step
    later hardly ever waits.

    Parameters
    ----------
    values : ``[n]``
    """

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = values.clone()

    @property
    def is_here(self) -> bool:
        """Whether nobody would have to wait."""
        return self._event is None or self._event.query()

    def tolist(self) -> list[Any]:
        """The integers."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._values.tolist()
