"""What the rows of a layer hold, whatever its pages look like: a part of ``reference.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from codes import dequantise, dequantise_mixed_page, dequantise_page


def kv_dtype_of(layer: Any) -> str:
    if layer.tails is not None:
        is_int2 = layer.value_pages is None and 4 * layer.pages.shape[3] == layer.tails.shape[3]
        return "int2" if is_int2 else "int4"
    return {torch.uint8: "int8", torch.float8_e4m3fn: "fp8"}.get(layer.pages.dtype, "auto")


def whole_parts(layer: Any) -> tuple[Tensor, ...]:
    """What the pages of a layer with tails get at once: codes and scales."""
    if layer.value_pages is None:
        return layer.pages, layer.key_scales, layer.value_scales
    return layer.pages[:, 0], layer.value_pages[:, 0], layer.key_scales, layer.value_scales


def entries_of(
    layer: Any, pages: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Keys ``[n, D]`` and values ``[n, Dv]`` in the slots of some pages, as attend reads them."""
    if layer.tails is not None:
        parts, read = whole_parts(layer), dequantise_page
        if layer.value_pages is not None:
            read = dequantise_mixed_page
        each = [read(*(x.cpu()[page] for x in parts), dtype) for page in pages.tolist()]
        both = torch.cat([torch.empty(2, 0, layer.tails.shape[3], dtype=dtype), *each], 1)
        return both[0], both[1]

    def numbers(held: Tensor, scales: Tensor | None) -> Tensor:
        x = held.cpu()[pages.cpu()]  # [pages, P, D]
        x = x if scales is None else dequantise(x, scales.cpu()[pages.cpu()], dtype)
        return x.flatten(0, 1).to(dtype)

    keys = numbers(layer.pages[:, 0], layer.key_scales)
    return keys, numbers(layer.values, layer.value_scales)


def row_of(
    layer: Any, b: int, h: int, dtype: torch.dtype = torch.float64, *, just_filled: bool = False
) -> tuple[Tensor, Tensor]:
    """Keys ``[length, D]`` and values ``[length, Dv]`` of a row; a last page with a tail that was
    ``just_filled`` as its tail has it."""
    length, page_size = int(layer.lengths[b, h]), layer.pages.shape[2]
    pages = layer.block_table[b, h, : -(-length // page_size)].long()
    if layer.tails is None:
        keys, values = entries_of(layer, pages, dtype)
        return keys[:length], values[:length]
    whole = (length - 1 if just_filled and length else length) // page_size
    tail = layer.tails[b, h].cpu().to(dtype).unflatten(0, (2, page_size))
    rest = tail[:, : length - whole * page_size]
    keys, values = entries_of(layer, pages[:whole], dtype)
    return torch.cat([keys, rest[0]]), torch.cat([values, rest[1]])
