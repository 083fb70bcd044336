"""Quantised pages in plain torch: which codes and scales entries get, and what they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

INF = float("inf")


def _up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The least numbers of a 16-bit dtype that are not below ``x``, float32 and 0 or more."""
    nearest = x.to(dtype)
    above = (nearest.view(torch.int16) + 1).view(dtype)
    return torch.where(nearest.float() < x, above, nearest)


def quantise(x: Tensor, kv_dtype: str) -> tuple[Tensor, Tensor]:
    """Codes ``[..., D]`` and scales ``[..., 2 Z]`` (int8, and values in int4, with zeros) or
    ``[..., Z]`` (fp8) of 16-bit entries ``[..., D]``; each group of 64 dimensions by itself, in
    float32."""
    codes, scales = [], []
    most = {"int8": 255, "int4": 15}.get(kv_dtype, 0)
    for group in x.float().split(64, -1):
        if most:
            zero = group.amin(-1, keepdim=True)
            spread, steps = group.amax(-1, keepdim=True) - zero, most
        else:
            zero = torch.zeros_like(group[..., :1])
            spread, steps = group.abs().amax(-1, keepdim=True), 448
        is_finite = spread.isfinite()
        scale = torch.where(is_finite, _up(spread / steps, x.dtype), torch.nan)
        zero = torch.where(is_finite, zero, 0).to(x.dtype)
        code = torch.where(scale > 0, (group - zero.float()) / scale.float(), 0)
        codes.append(
            code.round().clamp(0, most).to(torch.uint8)
            if most
            else code.clamp(-448, 448).to(torch.float8_e4m3fn)
        )
        scales += [scale.to(x.dtype), zero] if most else [scale.to(x.dtype)]
    return torch.cat(codes, -1), torch.cat(scales, -1)


def quantise_page(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What an int4 page gets of its entries ``[P, D]``, of 16 bits: codes ``[2, P, D / 2]``, scales
    and zeros of the keys' dimensions ``[2, D]``, and of the values' groups ``[P, 2 Z]``."""
    finite = keys.isfinite().all(-1, keepdim=True)  # the others take no part
    k = keys.float()
    low, high = k.where(finite, INF).amin(0), k.where(finite, -INF).amax(0)
    if not finite.any():
        low = high = torch.zeros_like(low)
    scale = _up((high / 2 - low / 2) / 7.5, keys.dtype).float()  # halves, as all may be too much
    key_codes = ((k / 2 - low / 2) / (scale / 2)).where(finite & (scale > 0), 0)
    value_codes, value_scales = quantise(values, "int4")
    nothing = torch.tensor([torch.nan, 0], dtype=values.dtype).repeat(value_scales.shape[1] // 2)
    codes = torch.stack(
        [key_codes.round().clamp(0, 15).to(torch.uint8), value_codes.where(finite, 0)]
    )
    return (
        codes[..., 0::2] | codes[..., 1::2] << 4,
        torch.stack([scale, low]).to(keys.dtype),
        value_scales.where(finite, nothing),
    )


def dequantise_page(
    codes: Tensor, key_scales: Tensor, value_scales: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Keys and values ``[2, P, D]`` that an int4 page stands for."""
    key_codes, value_codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    scale, zero = key_scales.to(dtype)
    keys = key_codes.to(dtype) * scale + zero
    return torch.stack([keys, dequantise(value_codes, value_scales, dtype)])


def dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """``scale * code + zero`` (int8) or ``scale * code`` (fp8), ``[..., D]``."""
    has_zero = codes.dtype == torch.uint8
    groups = codes.to(dtype).split(64, -1)
    columns = scales.to(dtype).split(2 if has_zero else 1, -1)
    return torch.cat(
        [
            code * column[..., :1] + (column[..., 1:] if has_zero else 0)
            for code, column in zip(groups, columns, strict=True)
        ],
        -1,
    )
