"""The verbs as torch operators: each one's schema, body and fake implementation.

A body allocates its outputs and calls the core. ``torch.ops.adakv.<verb>`` is for compiled graphs;
outside of them a body is called directly, which saves the dispatcher's share of a call
(benchmarks/bench_overhead.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adakv import _C


def _score(
    queries: Tensor,
    keys: Tensor,
    seq_lens: Tensor | None,
    sink_logits: Tensor | None,
    lse: Tensor | None,
    scale: float,
    softcap: float,
    window_reduce: str,
    group_reduce: str,
    order: str,
    pool: str,
    pool_width: int,
    window: int = -1,
    stride: int = 1,
    distance: int = 0,
) -> Tensor:
    scores = keys.new_empty(keys.shape[:3], dtype=torch.float32)
    _C.score(
        queries,
        keys,
        seq_lens,
        sink_logits,
        lse,
        scale,
        softcap,
        window_reduce,
        group_reduce,
        order,
        pool,
        pool_width,
        window,
        stride,
        distance,
        scores,
    )
    return scores


def _value_norm(values: Tensor, w_o: Tensor, seq_lens: Tensor | None, norm: str) -> Tensor:
    norms = values.new_empty(values.shape[:3], dtype=torch.float32)
    _C.value_norm(values, w_o, seq_lens, norm, norms)
    return norms


def _allocate(
    scores: Tensor, budget: int, window: int, seq_lens: Tensor | None, floor: float, safeguard: str
) -> Tensor:
    budgets = scores.new_empty(scores.shape[:2], dtype=torch.int32)
    _C.allocate(scores, budget, window, seq_lens, floor, safeguard, budgets)
    return budgets


def _select(
    scores: Tensor,
    budgets: Tensor,
    window: int,
    seq_lens: Tensor | None,
    norms: Tensor | None,
    first: float,
    eps: float,
    total: int,
) -> tuple[Tensor, Tensor]:
    positions, indptr = _kept_outputs(budgets, total)
    _C.select(scores, budgets, window, seq_lens, norms, first, eps, positions, indptr)
    return positions, indptr


def _kept_outputs(budgets: Tensor, total: int) -> tuple[Tensor, Tensor]:
    return budgets.new_empty(total), budgets.new_empty(budgets.numel() + 1)


def _plan(
    lengths: Tensor,
    block_table: Tensor,
    fresh_pages: Tensor,
    new_tokens: int,
    num_new: Tensor | None,
    page_size: int,
) -> Tensor:
    schedule = _schedule(lengths)
    workers = _num_workers(lengths.device)
    _C.plan(lengths, block_table, fresh_pages, new_tokens, num_new, page_size, workers, schedule)
    return schedule


def _schedule(lengths: Tensor) -> Tensor:
    layers, batch, heads = lengths.shape
    size = _C.schedule_size(batch * heads, _num_workers(lengths.device))
    return lengths.new_empty((layers, size))


def _attend(
    queries: Tensor,
    pages: Tensor,
    page_positions: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    seen: Tensor,
    fresh_pages: Tensor,
    schedule: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    num_new: Tensor | None,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
    prefetch: bool,
) -> tuple[Tensor, Tensor]:
    out, lse = _attend_outputs(queries)
    workers = _num_workers(queries.device)
    _C.attend(
        queries, pages, page_positions, block_table, lengths, seen, fresh_pages, schedule,
        keys, values, num_new, sink_logits, scale, softcap, workers, prefetch, out, lse,
    )  # fmt: skip
    return out, lse


def _attend_outputs(queries: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = queries.shape
    out = queries.new_empty((batch, tokens, heads, dim)).transpose(1, 2)
    return out, queries.new_empty((batch, heads, tokens), dtype=torch.float32)


@functools.cache
def _num_workers(device: torch.device) -> int:
    index = (
        torch.cuda.current_device()
        if device.type == "cuda" and device.index is None
        else device.index
    )
    return int(_C.default_num_workers(device.type, index or 0))


_LAYER = (
    "Tensor(a!) pages, Tensor(b!) page_positions, Tensor(c!) block_table, Tensor(d!) lengths, "
    "Tensor(e!) seen, Tensor{} fresh_pages"
)

#: verb -> (schema, body, fake)
_OPS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "score": (
        "(Tensor queries, Tensor keys, Tensor? seq_lens, Tensor? sink_logits, Tensor? lse, "
        "float scale, float softcap, str window_reduce, str group_reduce, str order, str pool, "
        "int pool_width, int window=-1, int stride=1, int distance=0) -> Tensor",
        _score,
        lambda queries, keys, *_: keys.new_empty(keys.shape[:3], dtype=torch.float32),
    ),
    "value_norm": (
        "(Tensor values, Tensor w_o, Tensor? seq_lens, str norm) -> Tensor",
        _value_norm,
        lambda values, *_: values.new_empty(values.shape[:3], dtype=torch.float32),
    ),
    "allocate": (
        "(Tensor scores, int budget, int window, Tensor? seq_lens, float floor, str safeguard) "
        "-> Tensor",
        _allocate,
        lambda scores, *_: scores.new_empty(scores.shape[:2], dtype=torch.int32),
    ),
    "select": (
        "(Tensor scores, Tensor budgets, int window, Tensor? seq_lens, Tensor? norms, float first, "
        "float eps, SymInt total) -> (Tensor, Tensor)",
        _select,
        lambda scores, budgets, *rest: _kept_outputs(budgets, rest[-1]),
    ),
    "compact": (
        "(Tensor keys, Tensor values, Tensor positions, Tensor indptr, "
        f"{_LAYER.format('(f!)')}, Tensor page_ids, Tensor page_indptr, Tensor? seq_lens) -> ()",
        _C.compact,
        lambda *_: None,
    ),
    "append": (
        f"(Tensor keys, Tensor values, {_LAYER.format('')}, Tensor? num_new) -> ()",
        _C.append,
        lambda *_: None,
    ),
    "plan": (
        "(Tensor lengths, Tensor block_table, Tensor fresh_pages, int new_tokens, "
        "Tensor? num_new, int page_size) -> Tensor",
        _plan,
        lambda lengths, *_: _schedule(lengths),
    ),
    "attend": (
        f"(Tensor queries, {_LAYER.format('')}, Tensor schedule, Tensor? keys, Tensor? values, "
        "Tensor? num_new, Tensor? sink_logits, float scale, float softcap, bool prefetch) "
        "-> (Tensor, Tensor)",
        _attend,
        lambda queries, *_: _attend_outputs(queries),
    ),
}

_library: Any = torch.library.Library("adakv", "DEF")  # type: ignore[no-untyped-call]
for _name, (_schema, _body, _fake) in _OPS.items():
    _library.define(_name + _schema)
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _body, _key)
    torch.library.register_fake(f"adakv::{_name}", _fake, lib=_library)


def verb(name: str) -> Callable[..., Any]:
    """What runs a verb: its operator while torch compiles, else its body."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.adakv, name)  # type: ignore[no-any-return]
    return _OPS[name][1]
