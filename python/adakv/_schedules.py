"""Schedules of steps, before they are filled, and how many workers they are for."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from adakv import _C


@functools.cache
def num_workers(device: Any) -> int:
    """0 for what can't be worked on: the core says why."""
    if not isinstance(device, torch.device) or device.type not in ("cpu", "cuda"):
        return 0
    is_current = device.type == "cuda" and device.index is None
    index = torch.cuda.current_device() if is_current else device.index or 0
    return _C.default_num_workers(device.type, index)


#: The output for inputs that are no tensors, or not of the dimensions they should be: what is wrong
#: with them, the core says.
NOTHING = torch.empty(0)


def schedule(lengths: Tensor) -> Tensor:
    """The schedules ``[L, X]`` int32 of a step."""
    try:
        layers, batch, heads = lengths.shape
        size = _C.schedule_size(batch * heads, num_workers(lengths.device))
        return lengths.new_empty((layers, size))
    except (AttributeError, ValueError):
        return NOTHING
