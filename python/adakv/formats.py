"""What a cache may be asked for: formats of pages, the page sizes that go with them, devices."""

from __future__ import annotations

import re

import torch

from adakv.errors import integer

#: How pages hold entries: as they are, or quantised (docs/bits.md).
KV_DTYPES = ("auto", "int8", "fp8", "int4")

#: Dimensions of a head that share a scale in quantised pages.
SCALE_GROUP = 64


def page_size_for(kv_dtype: str, page_size: int | None) -> int:
    """``page_size``, or if there is none what is good for a format of pages, or for several tiers
    (:class:`adakv.tiers.Tiers`), which have one in common."""
    tiers = re.split(r"[+|]", kv_dtype)
    if len(tiers) > 1 or format_of(kv_dtype) != kv_dtype:
        return max(page_size_for(format_of(tier), page_size) for tier in tiers)
    if page_size is None:
        return 16 if kv_dtype == "auto" else 32  # on CUDA a tile of codes is 32 entries
    size = check_page_size(page_size)
    if kv_dtype == "int4" and size != 32:
        raise ValueError(f"page_size must be 32 for pages of int4, got {size}")
    return size


def format_of(tier: str) -> str:
    """The format of a tier as "int8:1/4", "int8/rank=1/4:3/4" or "rank=1/4", which is "auto"."""
    name, has_width, _ = tier.partition(":")[0].partition("=")
    return (name.rpartition("/")[0].strip() or "auto") if has_width else name.strip()


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
    if not isinstance(kv_dtype, str) or kv_dtype not in KV_DTYPES:
        names = ", ".join(map(repr, KV_DTYPES))
        raise ValueError(f"kv_dtype must be one of {names}, got {kv_dtype!r}")
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
    if kv_dtype == "int4" and dims is not None and dims[0] != dims[1]:
        raise ValueError(
            f"kv_dtype: pages of int4 take values that are as wide as keys, got {dims[1]} and "
            f"{dims[0]} numbers; take 'auto', 'int8' or 'fp8'"
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
