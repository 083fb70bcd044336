"""What a cache may be asked for: formats of pages, the page sizes that go with them, devices."""

from __future__ import annotations

import re
from typing import Any

import torch

from adakv.errors import integer

#: How pages hold entries: as they are, or quantised (docs/bits.md). Beside these there are pages as
#: those of int4 whose keys are mixed, "mixed3": numbers of 16, 4 and 2 bits, of 3 on average.
KV_DTYPES = ("auto", "int8", "fp8", "int4", "int2")

_MIXED = re.compile(r"mixed(\d(?:\.\d{1,2})?)")

#: Dimensions of a head that share a scale in quantised pages, but for values in int2.
SCALE_GROUP = 64

#: Those of a value in pages with tails, by the bits of its codes.
VALUE_GROUPS = {4: SCALE_GROUP, 2: 32}


def page_size_for(kv_dtype: str, page_size: int | None) -> int:
    """``page_size``, or if there is none what is good for a format of pages, or for several tiers
    (:class:`adakv.tiers.Tiers`), which have one in common."""
    tiers = re.split(r"[+|]", kv_dtype)
    if len(tiers) > 1 or format_of(kv_dtype) != kv_dtype:
        return max(page_size_for(format_of(tier), page_size) for tier in tiers)
    if page_size is None:
        return 16 if kv_dtype == "auto" else 32  # on CUDA a tile of codes is 32 entries
    size = check_page_size(page_size)
    if has_tails(kv_dtype) and size != 32:
        raise ValueError(f"page_size must be 32 for pages of {kv_dtype}, got {size}")
    return size


def format_of(tier: str) -> str:
    """The format of a tier as "int8:1/4", "int8/rank=1/4:3/4" or "rank=1/4", which is "auto"."""
    name, has_width, _ = tier.partition(":")[0].partition("=")
    return (name.rpartition("/")[0].strip() or "auto") if has_width else name.strip()


def bits_of_keys(kv_dtype: str) -> float | None:
    """How many bits the numbers of keys have on average, in a format whose keys are mixed; None for
    other formats. Raises ``ValueError`` unless they are 2 to 8."""
    found = _MIXED.fullmatch(kv_dtype)
    if found is None:
        return None
    bits = float(found[1])
    if not 2 <= bits <= 8:
        raise ValueError(f"kv_dtype: mixed keys must have 2 to 8 bits, got {kv_dtype!r}")
    return bits


def has_tails(kv_dtype: str) -> bool:
    """Whether the keys of a page share scales, so that a row's newest entries wait in 16 bits."""
    return kv_dtype in ("int4", "int2") or bits_of_keys(kv_dtype) is not None


def key_dims(bits: float, head_dim: int) -> tuple[int, int]:
    """How many dimensions of mixed keys have 16 bits, and how many 2; the others have 4.

    Up to 4 bits on average none has 16, from there on none has 2: that is where the bits are worth
    most (docs/bits.md). Pages hold a multiple of 4 dimensions in 16 bits and one of 8 in 2, so that
    there may be a little less than was asked for.
    """
    hundredths = round(100 * bits)
    if bits > 4:
        return 4 * ((hundredths - 400) * head_dim // 4800), 0
    return 0, head_dim - 8 * ((hundredths - 200) * head_dim // 1600)


def core_format(kv_dtype: str, head_dim: int) -> dict[str, Any]:
    """A format as the C++ core has it: that of mixed keys is int4 with so many dimensions."""
    bits = bits_of_keys(kv_dtype)
    in_16, in_2 = (0, 0) if bits is None else key_dims(bits, head_dim)
    name = kv_dtype if bits is None else "int4"
    return {"kv_dtype": name, "key_dims_16": in_16, "key_dims_2": in_2}


def check_page_size(page_size: int) -> int:
    """The same, as ``int``; raises ``ValueError`` unless it is a power of two from 8 to 256."""
    size = integer("page_size", page_size, 0)
    if not 8 <= size <= 256 or size & (size - 1):
        raise ValueError(f"page_size must be a power of two from 8 to 256, got {size}")
    return size


def check_kv_dtype(
    kv_dtype: str,
    dtype: torch.dtype | None = None,
    *,
    has_biases: bool = False,
    dims: tuple[int, int] | None = None,
) -> str:
    """The same; raises ``ValueError`` unless it is a format of pages, takes ``dtype``, keys and
    values of so many ``dims``, and has biases of entries if they are asked for."""
    is_one = isinstance(kv_dtype, str) and (kv_dtype in KV_DTYPES or has_tails(kv_dtype))
    if not is_one:
        names = ", ".join(map(repr, KV_DTYPES))
        raise ValueError(f"kv_dtype must be one of {names} or as 'mixed3', got {kv_dtype!r}")
    if has_biases and kv_dtype != "auto":
        raise ValueError(
            f"kv_dtype: pages of {kv_dtype} have no biases of entries, which Folded() and "
            "from_entries(bias=...) need; take kv_dtype='auto'"
        )
    if kv_dtype != "auto" and dtype is torch.float32:
        raise ValueError(
            f"kv_dtype: pages of {kv_dtype} take float16 and bfloat16, got keys and values in "
            "float32; load the model in one of them, or take kv_dtype='auto'"
        )
    if has_tails(kv_dtype) and dims is not None and dims[0] != dims[1]:
        raise ValueError(
            f"kv_dtype: pages of {kv_dtype} take values that are as wide as keys, got {dims[1]} "
            f"and {dims[0]} numbers; take 'auto', 'int8' or 'fp8'"
        )
    return kv_dtype


def device_of(given: torch.device | str) -> torch.device:
    """A device that caches can lie on, a GPU with its number."""
    try:
        device = torch.device(given)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"device must be cpu or cuda, got {given!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device}")
    return with_number(device)


def with_number(device: torch.device) -> torch.device:
    """The same device, a GPU with its number."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
