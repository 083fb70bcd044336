"""A cache full of random entries, for benchmarks of what reads it."""

from __future__ import annotations

from typing import Protocol

import torch

from adakv import ops
from adakv.cache import KVCache


class Sizes(Protocol):
    """What a case says of its rows: ``held`` entries in each, of every layer."""

    @property
    def layers(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def held(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def kv_dtype(self) -> str: ...
    @property
    def dtype(self) -> str: ...


def filled(case: Sizes, device: str) -> KVCache:
    """Rows of one length in all layers, with room for two pages more in each. Values are as wide as
    keys, unless the case has ``dims`` of both, and pages as large as usual, unless it has a
    ``page_size``."""
    rows, dtype = case.batch * case.kv_heads, getattr(torch, case.dtype)
    key, value = getattr(case, "dims", None) or (case.head_dim, case.head_dim)
    page_size = getattr(case, "page_size", None)
    row_pages = -(-case.held // (page_size or 16)) + 2
    kv = KVCache(
        num_layers=case.layers,
        num_sequences=case.batch,
        num_kv_heads=case.kv_heads,
        head_dim=key,
        value_dim=value,
        num_pages=case.layers * rows * row_pages,
        max_row_pages=row_pages,
        page_size=page_size,
        dtype=dtype,
        kv_dtype=case.kv_dtype,
        device=device,
    )
    shape = case.batch, case.kv_heads, case.held
    keys, values = (torch.randn(*shape, dim, device=device).to(dtype) for dim in (key, value))
    every = torch.arange(case.held, dtype=torch.int32, device=device).repeat(rows)
    ends = torch.arange(rows + 1, dtype=torch.int32, device=device) * case.held
    for layer in range(case.layers):
        totals = [case.kv_heads * case.held] * case.batch
        pages = kv.begin(layer, totals, [case.held] * case.batch)
        ops.compact(keys, values, ops.Kept(every, ends), kv.layer(layer), *pages)
    return kv
