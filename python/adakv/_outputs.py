"""What verbs give, before it is filled, and how many workers fill it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from adakv import _C
from adakv.tensors import Layer


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


def per_entry(keys: Tensor) -> Tensor:
    """A number for each entry of a prompt, ``[B, Hkv, T]`` float32."""
    try:
        return keys.new_empty(keys.shape[:3], dtype=torch.float32)
    except AttributeError:
        return NOTHING


def scores(
    _queries: Tensor,
    keys: Tensor | None,
    layer: Layer | None = None,
    length: int = 0,
    **_options: Any,
) -> Tensor:
    """Scores of a prompt's entries, or of the first ``length`` of a layer's rows."""
    if layer is None:
        return per_entry(keys)  # type: ignore[arg-type]
    return layer.lengths.new_empty((*layer.lengths.shape, length), dtype=torch.float32)


def per_row(scores: Tensor) -> Tensor:
    """A number for each row, ``[B, Hkv]`` int32."""
    try:
        return scores.new_empty(scores.shape[:2], dtype=torch.int32)
    except AttributeError:
        return NOTHING


def schedule(lengths: Tensor) -> Tensor:
    """The schedules ``[L, X]`` int32 of a step."""
    try:
        layers, batch, heads = lengths.shape
        size = _C.schedule_size(batch * heads, num_workers(lengths.device))
        return lengths.new_empty((layers, size))
    except (AttributeError, ValueError):
        return NOTHING


def attended(queries: Tensor) -> tuple[Tensor, Tensor]:
    """The output ``[B, Hq, S, D]``, in memory ``[B, S, Hq, D]``, and its lse ``[B, Hq, S]``."""
    try:
        batch, heads, tokens, dim = queries.shape
        out = queries.new_empty((batch, tokens, heads, dim)).transpose(1, 2)
        return out, queries.new_empty((batch, heads, tokens), dtype=torch.float32)
    except (AttributeError, ValueError):
        return NOTHING, NOTHING
