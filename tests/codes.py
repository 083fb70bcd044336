"""Quantised pages in plain torch: which codes and scales entries get, and what they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

INF = float("inf")
#: The largest code of a format that has zeros; float8 has none.
MOST = {"int8": 255, "int4": 15, "int2": 3}
#: Dimensions that share a scale, if they are not 64.
GROUP = {"int2": 32}


def _up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The least numbers of a 16-bit dtype that are not below ``x``, float32 and 0 or more."""
    nearest = x.to(dtype)
    above = (nearest.view(torch.int16) + 1).view(dtype)
    return torch.where(nearest.float() < x, above, nearest)


def quantise(x: Tensor, kv_dtype: str) -> tuple[Tensor, Tensor]:
    """Codes ``[..., D]`` and scales ``[..., 2 Z]`` (int8, and values in int4 and int2, with zeros)
    or ``[..., Z]`` (fp8) of 16-bit entries ``[..., D]``; each group of 64 dimensions (int2: 32) by
    itself, in float32."""
    codes, scales = [], []
    most = MOST.get(kv_dtype, 0)
    for group in x.float().split(GROUP.get(kv_dtype, 64), -1):
        if most:
            zero = group.amin(-1, keepdim=True)
            spread, steps = group.amax(-1, keepdim=True) - zero, most
        else:
            zero = torch.zeros_like(group[..., :1])
            spread, steps = group.abs().amax(-1, keepdim=True), 448
        is_finite = spread.isfinite()
        # By a tensor: CUDA multiplies by the reciprocal of a number, which rounds otherwise.
        share = spread / torch.full_like(spread, steps)
        scale = torch.where(is_finite, _up(share, x.dtype), torch.nan)
        zero = torch.where(is_finite, zero, 0).to(x.dtype)
        code = torch.where(scale > 0, (group - zero.float()) / scale.float(), 0)
        codes.append(
            code.round().clamp(0, most).to(torch.uint8)
            if most
            else code.clamp(-448, 448).to(torch.float8_e4m3fn)
        )
        scales += [scale.to(x.dtype), zero] if most else [scale.to(x.dtype)]
    return torch.cat(codes, -1), torch.cat(scales, -1)


def quantise_page(
    keys: Tensor, values: Tensor, kv_dtype: str = "int4"
) -> tuple[Tensor, Tensor, Tensor]:
    """What a page of int4 or int2 gets of its entries ``[P, D]``, of 16 bits: codes ``[2, P, C]``,
    where C is ``D / 2`` or ``D / 4``, scales and zeros of the keys' dimensions ``[2, D]``, and of
    the values' groups ``[P, 2 Z]``."""
    key_codes, key_scales = _quantise_dims(keys, torch.full(keys.shape[1:], float(MOST[kv_dtype])))
    value_codes, value_scales = _quantise_values(keys, values, kv_dtype)
    bits = MOST[kv_dtype].bit_length()
    return packed(torch.stack([key_codes, value_codes]), bits), key_scales, value_scales


def quantise_mixed_page(
    keys: Tensor, values: Tensor, in_16: int, in_2: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a page gets of its entries ``[P, D]`` whose keys have their first dimensions in 16 bits
    and their last ones in 2: bytes of keys ``[P, C]``, codes of values ``[P, D / 2]``, scales and
    zeros of the dimensions of keys that have codes ``[2, D - in_16]``, and of values."""
    in_4_end = keys.shape[1] - in_2
    most = torch.full(keys.shape[1:], 15.0)
    most[in_4_end:] = 3
    finite = keys.isfinite().all(-1, keepdim=True)
    codes, scales = _quantise_dims(keys, most)
    as_they_are = keys[:, :in_16].where(finite, 0).contiguous().view(torch.uint8)
    parts = as_they_are, packed(codes[:, in_16:in_4_end], 4), packed(codes[:, in_4_end:], 2)
    value_codes, value_scales = _quantise_values(keys, values)
    return torch.cat(parts, 1), packed(value_codes, 4), scales[:, in_16:], value_scales


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[..., n]`` as bytes, the first of each byte in its lowest bits."""
    count = 8 // bits
    parts = codes.unflatten(-1, (-1, count)).unbind(-1)
    return sum((part << i * bits for i, part in enumerate(parts)), torch.zeros_like(parts[0]))


def unpacked(held: Tensor, bits: int) -> Tensor:
    """The codes of bytes that :func:`packed` gave."""
    parts = [held >> i * bits & (1 << bits) - 1 for i in range(8 // bits)]
    return torch.stack(parts, -1).flatten(-2)


def _quantise_dims(keys: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[P, D]``, of each dimension from 0 to ``most`` ``[D]``, and scales and zeros
    ``[2, D]``."""
    finite = keys.isfinite().all(-1, keepdim=True)  # the others take no part
    k = keys.float()
    low, high = k.where(finite, INF).amin(0), k.where(finite, -INF).amax(0)
    if not finite.any():
        low = high = torch.zeros_like(low)
    # Halves, as all may be too much.
    scale = _up((high / 2 - low / 2) / (most / 2), keys.dtype).float()
    codes = ((k / 2 - low / 2) / (scale / 2)).where(finite & (scale > 0), 0)
    codes = codes.round().clamp(min=0).minimum(most).to(torch.uint8)
    return codes, torch.stack([scale, low]).to(keys.dtype)


def _quantise_values(keys: Tensor, values: Tensor, kv_dtype: str = "int4") -> tuple[Tensor, Tensor]:
    """Codes ``[P, D]`` and scales of an int4 or int2 page's values."""
    finite = keys.isfinite().all(-1, keepdim=True)
    codes, scales = quantise(values, kv_dtype)
    nothing = torch.tensor([torch.nan, 0], dtype=values.dtype).repeat(scales.shape[1] // 2)
    return codes.where(finite, 0), scales.where(finite, nothing)


def dequantise_page(
    codes: Tensor, key_scales: Tensor, value_scales: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Keys and values ``[2, P, D]`` that an int4 or int2 page stands for."""
    bits = 8 * codes.shape[-1] // key_scales.shape[-1]
    key_codes, value_codes = unpacked(codes, bits)
    scale, zero = key_scales.to(dtype)
    keys = key_codes.to(dtype) * scale + zero
    group = GROUP["int2"] if bits == 2 else 64
    return torch.stack([keys, dequantise(value_codes, value_scales, dtype, group)])


def dequantise_mixed_page(
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor,
    value_scales: Tensor,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Keys and values ``[2, P, D]`` that a page with mixed keys stands for."""
    value_codes = unpacked(values, 4)
    in_16 = value_codes.shape[1] - key_scales.shape[1]
    coded = keys[:, 2 * in_16 :]
    in_4 = 4 * coded.shape[1] - key_scales.shape[1]  # in half a byte each, the others in a quarter
    codes = torch.cat([unpacked(coded[:, : in_4 // 2], 4), unpacked(coded[:, in_4 // 2 :], 2)], 1)
    scale, zero = key_scales.to(dtype)
    as_they_are = keys[:, : 2 * in_16].contiguous().view(key_scales.dtype).to(dtype)
    both = torch.cat([as_they_are, codes.to(dtype) * scale + zero], 1)
    return torch.stack([both, dequantise(value_codes, value_scales, dtype)])


def dequantise(
    codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float64, group: int = 64
) -> Tensor:
    """``scale * code + zero`` (int8) or ``scale * code`` (fp8), ``[..., D]``."""
    has_zero = codes.dtype == torch.uint8
    groups = codes.to(dtype).split(group, -1)
    columns = scales.to(dtype).split(2 if has_zero else 1, -1)
    return torch.cat(
        [
            code * column[..., :1] + (column[..., 1:] if has_zero else 0)
            for code, column in zip(groups, columns, strict=True)
        ],
        -1,
    )
