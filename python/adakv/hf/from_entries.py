"""Caches of entries that were made elsewhere: see :meth:`adakv.Cache.from_entries`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adakv.cache import KVCache
from adakv.entries import compact_rows
from adakv.errors import integer
from adakv.formats import check_kv_dtype
from adakv.hf import families
from adakv.ops import Kept
from adakv.policy.presets import get
from adakv.shape import Shape

_MOST_TOKENS = 2**31 - 1


class _Given(NamedTuple):
    """The entries of a layer, row by row."""

    keys: Tensor  # [E, D]
    values: Tensor  # [E, D]
    positions: Tensor  # [E] int32
    lengths: Tensor  # [B, Hkv] int32
    biases: Tensor | None  # [E] float16


def from_entries(
    kind: Any,
    model: Any,
    entries: tuple[Any, Any, Any],
    seen: int | Sequence[int],
    bias: Any,
    settings: dict[str, Any],
) -> Any:
    """:meth:`adakv.Cache.from_entries`, of keys, values and positions."""
    cache = kind(model, get("full"), **settings)
    if len(cache._full) < len(cache.layers):
        raise ValueError(
            f"model: {type(cache.model).__name__} has layers without full attention, whose windows "
            "or states entries don't tell"
        )
    counts = [
        integer(f"seen[{b}]", n, 1, _MOST_TOKENS)
        for b, n in enumerate(seen if isinstance(seen, Sequence) else [seen])
    ]
    heads = families.num_kv_heads(cache.model_config)
    sizes = {"layers": len(cache._full), "sequences": len(counts), "kv heads": heads}
    given = {**dict(zip(("keys", "values", "positions"), entries, strict=True)), "bias": bias}
    rows = [_rows(name, x, sizes) for name, x in given.items() if name != "bias" or x is not None]
    shape = replace(_shape_of(cache, rows[0]), has_biases=bias is not None)
    check_kv_dtype(settings.get("kv_dtype") or "auto", has_biases=shape.has_biases)
    if cache._allocation.has_tiers:
        raise ValueError(
            "kv_dtype: mixed keys are ordered by a prompt's queries, which entries don't tell, got "
            f"{cache._allocation.kv_dtype!r}"
        )
    parts = [
        _layer(index, [x[index] for x in rows], counts, shape) for index in range(len(rows[0]))
    ]
    kv = cache.pages_for_rows(shape, torch.stack([part.lengths for part in parts]))
    _fill(kv, parts, counts)
    columns = max(counts)
    cache.go_on_from(kv, counts, list(counts), columns)
    if min(counts) < columns:
        padding = columns - torch.tensor(counts)[:, None]
        cache.padding.shown = (torch.arange(columns) >= padding).to(shape.device)
    return cache


def _rows(name: str, given: Any, sizes: dict[str, int]) -> Any:
    """Tensors, as lists of lists."""
    if not sizes:
        if not isinstance(given, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(given).__name__}")
        return given.detach()
    (what, size), *others = sizes.items()
    if not isinstance(given, (Sequence, Tensor)) or len(given) != size:
        got = f"{len(given)}" if isinstance(given, (Sequence, Tensor)) else type(given).__name__
        raise ValueError(f"{name} must be given for {size} {what}, got {got}")
    return [_rows(f"{name}[{i}]", x, dict(others)) for i, x in enumerate(given)]


def _shape_of(cache: Any, keys: list[list[list[Tensor]]]) -> Shape:
    """The shape of a cache whose entries are as the model has them."""
    modules = families.attention_modules(cache.model, range(len(cache.layers)))
    given = keys[0][0][0].shape[-1]
    dim, value_dim = next(filter(None, map(families.head_dims, modules)), (given, given))
    device = next(cache.model.parameters()).device
    cache._allocation.check_keys(cache.model.dtype, (dim, value_dim))
    shape = Shape(len(keys), len(keys[0][0]), dim, cache.model.dtype, device)
    return replace(shape, value_dim=value_dim)


def _layer(index: int, rows: Sequence[Any], seen: list[int], shape: Shape) -> _Given:
    """What is given of a layer, checked."""
    lengths = torch.zeros(len(seen), shape.num_kv_heads, dtype=torch.int32)
    for b, count in enumerate(seen):
        for h in range(shape.num_kv_heads):
            keys, values, positions, *bias = (x[b][h] for x in rows)
            length = lengths[b, h] = keys.shape[0] if keys.dim() else 0
            row = f"[{index}][{b}][{h}]"
            _check_numbers(f"keys{row}", keys, [int(length), shape.dims[0]], shape.dtype)
            _check_numbers(f"values{row}", values, [int(length), shape.dims[1]], shape.dtype)
            _check_positions(f"positions{row}", positions, int(length), count)
            for x in bias:
                _check_bias(f"bias{row}", x, int(length))
    keys, values, positions, *bias = (
        torch.cat([x.to(shape.device) for of_sequence in of_layer for x in of_sequence])
        for of_layer in rows
    )
    biases = bias[0].half() if bias else None
    return _Given(keys, values, positions.int(), lengths, biases)


def _check_numbers(name: str, x: Tensor, expected: list[int], dtype: torch.dtype) -> None:
    if list(x.shape) != expected or x.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} {expected}, got {x.dtype} {list(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} must be finite")


def _check_positions(name: str, x: Tensor, length: int, seen: int) -> None:
    if list(x.shape) != [length] or x.is_floating_point() or x.dtype is torch.bool:
        raise ValueError(f"{name} must be integers [{length}], got {x.dtype} {list(x.shape)}")
    is_inside = length == 0 or (int(x.min()) >= 0 and int(x.max()) < seen)
    if not is_inside or not bool((x.diff() > 0).all()):
        raise ValueError(f"{name} must ascend within 0 .. {seen - 1}, the tokens seen")


def _check_bias(name: str, x: Tensor, length: int) -> None:
    if list(x.shape) != [length] or not x.is_floating_point():
        raise ValueError(f"{name} must be floats [{length}], got {x.dtype} {list(x.shape)}")
    if not bool(x.half().isfinite().all()):
        raise ValueError(f"{name} must be finite in float16, in which it is held")


def _fill(kv: KVCache, parts: Sequence[_Given], seen: Sequence[int]) -> None:
    """Puts entries into pages."""
    lengths = torch.stack([part.lengths for part in parts])  # [L, B, Hkv]
    longest = [int(n) for n in lengths.amax((0, 2)).tolist()]
    for index, part in enumerate(parts):
        view = kv.layer(index)
        pages = kv.begin(index, part.lengths.sum(1).tolist(), longest)
        ends = F.pad(part.lengths.flatten().cumsum(0), (1, 0)).int()
        kept = Kept(part.positions, ends.to(view.seen.device))
        places = torch.arange(len(part.keys), dtype=torch.int32, device=view.seen.device)
        tokens = torch.tensor(seen, dtype=torch.int32, device=view.seen.device)
        entries = part.keys, part.values, places, kept
        compact_rows(*entries, view, *pages, seen=tokens, biases=part.biases)
