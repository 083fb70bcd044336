"""The eight verbs as torch functions, and as torch operators for compiled graphs.

    prefill:  score, value_norm -> allocate -> select -> compact        decode:  plan, append -> attend

Letters: B sequences, T prompt length (padded at the end), S new tokens, W window, Hq q heads, Hkv kv heads, G = Hq / Hkv,
D head dim (a multiple of 8, at most 256), E model width, P page size, N pages in the pool, M most pages of a row, F fresh pages
of a row, K kept entries of the whole batch, L layers. A row is one (sequence, kv head) pair. Queries, keys and values are
float32, float16 or bfloat16, all of one dtype and device, with a contiguous last dimension; other strides are free.

Every function here is also ``torch.ops.adakv.<verb>``, with fake implementations and declared mutation, and takes that way by
itself inside ``torch.compile``. None of them waits for the device, copies to the host or is differentiable.

Wrong arguments raise ``ValueError`` naming the argument, what was expected and what came.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from adakv import _C

Reduce = Literal["mean", "max", "sum"]
Pool = Literal["max", "avg", "none"]
Order = Literal["group_first", "pool_first"]
Safeguard = Literal["blend", "hard_floor", "official_round", "none"]
Norm = Literal["l1", "l2_gram"]


class Kept(NamedTuple):
    """Positions that each row keeps: row r = b * Hkv + h keeps ``positions[indptr[r]:indptr[r + 1]]``, ascending.

    ``positions`` is ``[K]`` int32 and may be longer than ``indptr[-1]``; what is behind holds -1. ``indptr`` is ``[B * Hkv + 1]`` int32.
    """

    positions: Tensor
    indptr: Tensor


class Layer(NamedTuple):
    """The tensors of one layer of a :class:`adakv.cache.KVCache` (or of some of its sequences)."""

    pages: Tensor  #: ``[N, 2, P, D]`` keys, then values; each page belongs to one row; shared by all layers
    page_positions: Tensor  #: ``[N, P]`` int32, where the entry of each slot stood in its sequence; shared by all layers
    block_table: Tensor  #: ``[B, Hkv, M]`` int32, pages of each row in slot order, -1 behind the last
    lengths: Tensor  #: ``[B, Hkv]`` int32, entries that each row holds
    seen: Tensor  #: ``[B]`` int32, tokens that went by, kept or not
    fresh_pages: Tensor  #: ``[B, Hkv, F]`` int32, the pages that rows take when they outgrow their last one


def score(
    queries: Tensor,
    keys: Tensor,
    *,
    seq_lens: Tensor | None = None,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window_reduce: Reduce = "mean",
    group_reduce: Reduce = "mean",
    order: Order = "group_first",
    pool: Pool = "max",
    pool_width: int = 7,
) -> Tensor:
    """How strongly the last W queries of a prompt attend to each of its entries (SnapKV, arXiv 2404.14469, section 4).

    ``z[q,w,t] = softcap * tanh(queries[q,w] . keys[q // G, t] * scale / softcap)`` (without softcap the bare product),
    ``p = softmax_t(z)`` over all positions up to the query's own, and
    ``scores[h,t] = pool_t(group_reduce_q(window_reduce_w(p[q,w,t])))``, all in float32.

    Parameters
    ----------
    queries : ``[B, Hq, W, D]``
        Queries of the last W positions of each sequence, after RoPE.
    keys : ``[B, Hkv, T, D]``
        Prompt keys, after RoPE.
    seq_lens : ``[B]`` int32, optional
        Prompt lengths, 0 to T. Default: all T.
    sinks : ``[Hq]`` float32, optional
        Logits that join each softmax and attend to nothing (gpt-oss).
    lse : ``[B, Hq, W]`` float32, optional
        Log-sum-exp of z (natural log, sinks included), if the attention handed it over; saves a pass over the keys.
    scale, softcap : float, optional
        Default: ``1 / sqrt(D)``, and no cap.
    window_reduce, group_reduce : "mean", "max" or "sum"
    order : "group_first" or "pool_first"
        Whether the group is reduced before pooling or after.
    pool, pool_width : "max", "avg" or "none", and an odd width
        Max-pooling ignores what is outside of the candidates; average pooling counts it as zero (as torch and kvpress do).

    Returns
    -------
    scores : ``[B, Hkv, T]`` float32
        ``-inf`` where an entry doesn't compete: in the window (the last W positions) and behind ``seq_lens``.
    """
    return _verb("score")(
        queries, keys, seq_lens, sinks, lse, scale or 0.0, softcap or 0.0, window_reduce, group_reduce, order, pool, pool_width
    )


def value_norm(
    values: Tensor, w_o: Tensor, *, seq_lens: Tensor | None = None, norm: Norm = "l1"
) -> Tensor:
    """How far an entry can move the layer's output (CriticalKV, arXiv 2502.03805, Theorem 3.3 and Algorithm 1).

    Parameters
    ----------
    values : ``[B, Hkv, T, D]``
    w_o : ``[E, Hq * D]``
        Weight of the output projection, as ``torch.nn.Linear`` stores it.
    seq_lens : ``[B]`` int32, optional
        Prompt lengths, 0 to T. Default: all T.
    norm : "l1" or "l2_gram"
        "l1": the mean over the q heads q of the group of ``||v Wo[q]||_1``, with ``Wo[q] = w_o[:, q*D:(q+1)*D].T``.
        "l2_gram": ``sqrt(v G v^T)`` with ``G`` the mean of ``Wo[q] Wo[q]^T``; much cheaper, nearly the same choice.

    Returns
    -------
    norms : ``[B, Hkv, T]`` float32, ``-inf`` behind ``seq_lens``
    """
    return _verb("value_norm")(values, w_o, seq_lens, norm)


def allocate(
    scores: Tensor,
    budget: int,
    *,
    window: int,
    seq_lens: Tensor | None = None,
    floor: float = 0.2,
    safeguard: Safeguard = "blend",
) -> Tensor:
    """How many entries each kv head may keep, from one top-k over all heads (Ada-KV, arXiv 2407.11550, Algorithms 1 and 2).

    With ``b = budget - window`` and ``f[h]`` the number of the ``Hkv * b`` highest candidate scores that lie in head h:

    ================  ==========================================================================================
    blend             ``(1 - floor) * f[h] + floor * b`` by largest remainder; sums to exactly ``Hkv * b``
    hard_floor        every head first takes its own top ``int(floor * b)``, then the layer-wide top-k fills up
    official_round    ``round_half_even((1 - floor) * f[h] + int(floor * b))``, the authors' code; its sum drifts
    none              ``f[h]``
    ================  ==========================================================================================

    Equal scores: lower position first, then lower head. NaN counts as ``-inf`` and ranks last.

    Parameters
    ----------
    scores : ``[B, Hkv, T]`` float32
    budget : int
        Entries per kv head on average, window included; at least ``window``.
    window : int
        The last ``window`` positions of a sequence are no candidates and are always kept.
    seq_lens : ``[B]`` int32, optional
        Prompt lengths, 0 to T. Default: all T.
    floor : float, 0 to 1
        Share of the budget that is given evenly (the papers' alpha).

    Returns
    -------
    budgets : ``[B, Hkv]`` int32, window included
        Sequences of at most ``budget`` tokens keep everything.
    """
    return _verb("allocate")(scores, budget, window, seq_lens, floor, safeguard)


def select(
    scores: Tensor,
    budgets: Tensor,
    *,
    window: int,
    seq_lens: Tensor | None = None,
    norms: Tensor | None = None,
    first: float = 0.5,
    eps: float = 1e-4,
    total: int | None = None,
) -> Kept:
    """Which positions each row keeps: its window and its best candidates.

    Without ``norms`` the best by score. With ``norms`` in two stages (CriticalKV, arXiv 2502.03805, Algorithm 1): of a row's
    ``count = budget - window`` candidates the first ``int(first * count)`` by score, the rest by ``(score + eps) * norm``.
    A score of ``+inf`` pins an entry. Equal values: lower position first. NaN ranks last.

    Parameters
    ----------
    scores : ``[B, Hkv, T]`` float32
    budgets : ``[B, Hkv]`` int32
        Entries to keep per row, window included; clamped to what the row has (``min(window, seq_len)`` to ``seq_len``).
    window : int
    seq_lens : ``[B]`` int32, optional
    norms : ``[B, Hkv, T]`` float32, optional
    first : float, 0 to 1
    eps : float
        Against scores of zero; the scores are means, so that 1e-4 means something.
    total : int, optional
        Size of ``Kept.positions``, at least the sum of the (clamped) budgets. Default: that sum, for which a CUDA device
        has to be waited for; pass it where it is known.

    Returns
    -------
    kept : :class:`Kept`
    """
    if total is None:
        most = seq_lens if seq_lens is not None else torch.full_like(budgets[:, 0], scores.shape[-1])
        total = int(budgets.clamp(min=window).minimum(most[:, None]).sum())
    return Kept(*_verb("select")(scores, budgets, window, seq_lens, norms, first, eps, total))


def compact(
    keys: Tensor,
    values: Tensor,
    kept: Kept,
    layer: Layer,
    page_ids: Tensor,
    page_indptr: Tensor,
    *,
    seq_lens: Tensor | None = None,
) -> None:
    """Moves the kept entries of a prompt into pages; slot i of a row holds its i-th kept position.

    Parameters
    ----------
    keys, values : ``[B, Hkv, T, D]``
    kept : :class:`Kept`
    layer : :class:`Layer`
        Its B sequences; everything in it is written: lengths from ``kept``, ``seen`` from ``seq_lens``.
    page_ids, page_indptr : ``[Q]`` and ``[B + 1]`` int32
        Sequence b may use the pages ``page_ids[page_indptr[b]:page_indptr[b + 1]]``; they are dealt to its rows in order, then one
        fresh page to each row.
    seq_lens : ``[B]`` int32, optional
    """
    _verb("compact")(keys, values, *kept, *layer, page_ids, page_indptr, seq_lens)


def append(keys: Tensor, values: Tensor, layer: Layer, *, num_new: Tensor | None = None) -> None:
    """Adds S new tokens of each sequence to all of its rows, after :meth:`adakv.cache.KVCache.grow` made room.

    Parameters
    ----------
    keys, values : ``[B, Hkv, S, D]``, keys after RoPE
    layer : :class:`Layer`
    num_new : ``[B]`` int32, optional
        How many of the S columns, counted from the right, belong to the sequence; the others are padding and not stored.
    """
    _verb("append")(keys, values, *layer, num_new)


def plan(
    lengths: Tensor,
    block_table: Tensor,
    fresh_pages: Tensor,
    *,
    new_tokens: int = 1,
    num_new: Tensor | None = None,
    page_size: int = 16,
) -> Tensor:
    """Shares the pages of all rows out to workers, for all layers of a step at once; before the step's ``append``.

    Parameters
    ----------
    lengths : ``[L, B, Hkv]`` int32
    block_table : ``[L, B, Hkv, M]`` int32
    fresh_pages : ``[L, B, Hkv, F]`` int32
    new_tokens : int
        S of the step; 0 if the step's tokens were appended already.
    num_new : ``[B]`` int32, optional
        As in :func:`append`.

    Returns
    -------
    schedule : ``[L, X]`` int32
        ``schedule[l]`` is what :func:`attend` takes in layer l. Valid for this step.
    """
    return _verb("plan")(lengths, block_table, fresh_pages, new_tokens, num_new, page_size)


def attend(
    queries: Tensor,
    layer: Layer,
    schedule: Tensor,
    *,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    num_new: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of S new queries over what each row holds, causal among the newest S entries.

    ``z = softcap * tanh(q . k * scale / softcap)``, ``out = softmax(z) v`` over the slots ``0 .. length - S + s`` of the row, the
    head's sink logit included. With ``keys`` and ``values`` they are appended first, in the same launch.

    Parameters
    ----------
    queries : ``[B, Hq, S, D]``
    layer : :class:`Layer`
    schedule : ``[X]`` int32
        This layer's part of :func:`plan`'s result.
    keys, values : ``[B, Hkv, S, D]``, optional
    num_new : ``[B]`` int32, optional
        As in :func:`append`; padding columns give 0.
    sinks : ``[Hq]`` float32, optional
        Logits that join each softmax and attend to nothing (gpt-oss).
    scale, softcap : float, optional
        Default: ``1 / sqrt(D)``, and no cap.

    Returns
    -------
    out : ``[B, Hq, S, D]``, in memory ``[B, S, Hq, D]``
    lse : ``[B, Hq, S]`` float32
        Natural log of the sum of exponentials, sinks included; ``-inf`` where nothing was attended to.
    """
    out, lse = _verb("attend")(
        queries, *layer, schedule, keys, values, num_new, sinks, scale or 0.0, softcap or 0.0
    )
    return out, lse


# --- The operators --------------------------------------------------------------------------------------------------------------
# Each verb's body allocates its outputs and calls the core. It is registered as torch.ops.adakv.<verb> for compiled graphs, and
# called directly otherwise: that saves the dispatcher's 3 us (benchmarks/bench_overhead.py).


def _score(
    queries: Tensor,
    keys: Tensor,
    seq_lens: Tensor | None,
    sinks: Tensor | None,
    lse: Tensor | None,
    scale: float,
    softcap: float,
    window_reduce: str,
    group_reduce: str,
    order: str,
    pool: str,
    pool_width: int,
) -> Tensor:
    scores = keys.new_empty(keys.shape[:3], dtype=torch.float32)
    _C.score(
        queries, keys, seq_lens, sinks, lse, scale, softcap, window_reduce, group_reduce, order, pool, pool_width, scores
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
    positions = budgets.new_empty(total)
    indptr = budgets.new_empty(budgets.numel() + 1)
    _C.select(scores, budgets, window, seq_lens, norms, first, eps, positions, indptr)
    return positions, indptr


def _plan(
    lengths: Tensor,
    block_table: Tensor,
    fresh_pages: Tensor,
    new_tokens: int,
    num_new: Tensor | None,
    page_size: int,
) -> Tensor:
    workers = _num_workers(lengths.device)
    schedule = lengths.new_empty((lengths.shape[0], _C.schedule_size(lengths[0].numel(), workers)))
    _C.plan(lengths, block_table, fresh_pages, new_tokens, num_new, page_size, workers, schedule)
    return schedule


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
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    out, lse = _attend_outputs(queries)
    workers = _num_workers(queries.device)
    _C.attend(
        queries, pages, page_positions, block_table, lengths, seen, fresh_pages, schedule,
        keys, values, num_new, sinks, scale, softcap, workers, out, lse,
    )  # fmt: skip
    return out, lse


def _attend_outputs(queries: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = queries.shape
    out = queries.new_empty((batch, tokens, heads, dim)).transpose(1, 2)
    return out, queries.new_empty((batch, heads, tokens), dtype=torch.float32)


@functools.cache
def _num_workers(device: torch.device) -> int:
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    return int(_C.default_num_workers(device.type, index or 0))


_LAYER = "Tensor(a!) pages, Tensor(b!) page_positions, Tensor(c!) block_table, Tensor(d!) lengths, Tensor(e!) seen, "

#: verb -> (schema, body, fake)
_OPS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "score": (
        "(Tensor queries, Tensor keys, Tensor? seq_lens, Tensor? sinks, Tensor? lse, float scale, float softcap, "
        "str window_reduce, str group_reduce, str order, str pool, int pool_width) -> Tensor",
        _score,
        lambda queries, keys, *_: keys.new_empty(keys.shape[:3], dtype=torch.float32),
    ),
    "value_norm": (
        "(Tensor values, Tensor w_o, Tensor? seq_lens, str norm) -> Tensor",
        _value_norm,
        lambda values, *_: values.new_empty(values.shape[:3], dtype=torch.float32),
    ),
    "allocate": (
        "(Tensor scores, int budget, int window, Tensor? seq_lens, float floor, str safeguard) -> Tensor",
        _allocate,
        lambda scores, *_: scores.new_empty(scores.shape[:2], dtype=torch.int32),
    ),
    "select": (
        "(Tensor scores, Tensor budgets, int window, Tensor? seq_lens, Tensor? norms, float first, float eps, SymInt total)"
        " -> (Tensor, Tensor)",
        _select,
        lambda scores, budgets, *rest: (budgets.new_empty(rest[-1]), budgets.new_empty(budgets.numel() + 1)),
    ),
    "compact": (
        "(Tensor keys, Tensor values, Tensor positions, Tensor indptr, "
        + _LAYER
        + "Tensor(f!) fresh_pages, Tensor page_ids, Tensor page_indptr, Tensor? seq_lens) -> ()",
        _C.compact,
        lambda *_: None,
    ),
    "append": (
        "(Tensor keys, Tensor values, " + _LAYER + "Tensor fresh_pages, Tensor? num_new) -> ()",
        _C.append,
        lambda *_: None,
    ),
    "plan": (
        "(Tensor lengths, Tensor block_table, Tensor fresh_pages, int new_tokens, Tensor? num_new, int page_size) -> Tensor",
        _plan,
        lambda lengths, *_: lengths.new_empty(
            (lengths.shape[0], _C.schedule_size(lengths.shape[1] * lengths.shape[2], _num_workers(lengths.device)))
        ),
    ),
    "attend": (
        "(Tensor queries, " + _LAYER + "Tensor fresh_pages, Tensor schedule, Tensor? keys, Tensor? values, Tensor? num_new, "
        "Tensor? sinks, float scale, float softcap) -> (Tensor, Tensor)",
        _attend,
        lambda queries, *_: _attend_outputs(queries),
    ),
}

_library = torch.library.Library("adakv", "DEF")
for _name, (_schema, _body, _fake) in _OPS.items():
    _library.define(_name + _schema)
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _body, _key)
    torch.library.register_fake(f"adakv::{_name}", _fake, lib=_library)


def _verb(verb: str) -> Callable[..., Any]:
    """The verb's operator while torch compiles, else its body."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.adakv, verb)  # type: ignore[no-any-return]
    return _OPS[verb][1]
