"""The verbs as torch functions, and as torch operators for compiled graphs.

    prefill:  score, value_norm -> allocate -> select -> compact
    decode:   plan, append -> attend;  sparse reads: plan, append -> shortlist -> attend

Letters: B sequences, T prompt length (padded at the end), S new tokens, W window, Hq q heads, Hkv
kv heads, G = Hq / Hkv, D head dim (a multiple of 8, at most 256), Dv that of values (or D), E model
width, P page size, N pages in the pool, M most pages of a row, F fresh pages of a row, K kept
entries of the whole batch, L layers. A row is one (sequence, kv head) pair. Queries, keys and
values are float32, float16 or bfloat16, of one dtype and device, with any strides but the last, 1.

Every function here is also ``torch.ops.adakv.<verb>``, with fake implementations and declared
mutation, and takes that way by itself inside ``torch.compile``. None of them waits for the device,
copies to the host or is differentiable. Wrong arguments raise ``ValueError`` naming the argument,
what was expected and what came.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from adakv import _C, _schedules
from adakv._register import operators as operators
from adakv._register import verb
from adakv.fork import fork as fork
from adakv.shortlist import shortlist as shortlist
from adakv.tensors import Kept as Kept
from adakv.tensors import Layer as Layer
from adakv.tensors import Source as Source
from adakv.tensors import Tier as Tier

Reduce = Literal["mean", "max", "sum"]
Pool = Literal["max", "avg", "none"]
Order = Literal["group_first", "pool_first"]
Safeguard = Literal["blend", "hard_floor", "official_round", "none"]
Norm = Literal["l1", "l2_gram"]
Accumulate = Literal["sum", "max", "last"]

#: Fields of a layer that change with a step.
_GROWING = tuple(field for field in Layer._fields if field != "fresh_pages")


def _per_entry(keys: Tensor) -> Tensor:
    """A number for each entry of a prompt, ``[B, Hkv, T]`` float32."""
    try:
        return keys.new_empty(keys.shape[:3], dtype=torch.float32)
    except AttributeError:
        return _schedules.NOTHING


def _scores(
    _queries: Tensor,
    keys: Tensor | None,
    layer: Layer | None = None,
    length: int = 0,
    **_options: Any,
) -> Tensor:
    """Scores of a prompt's entries, or of the first ``length`` of a layer's rows."""
    if layer is None:
        return _per_entry(keys)  # type: ignore[arg-type]
    return layer.lengths.new_empty((*layer.lengths.shape, length), dtype=torch.float32)


@verb(fake=_scores)
def score(
    queries: Tensor,
    keys: Tensor | None,
    layer: Layer | None = None,
    length: int = 0,
    *,
    seq_lens: Tensor | None = None,
    sink_logits: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window_reduce: Reduce = "mean",
    group_reduce: Reduce = "mean",
    order: Order = "group_first",
    pool: Pool = "max",
    pool_width: int = 7,
    window: int | None = None,
    stride: int = 1,
    distance: int = 0,
) -> Tensor:
    """How strongly the last W queries of a prompt attend to each of its entries (SnapKV, arXiv
    2404.14469, section 4); with W = T, all of its queries (H2O, arXiv 2306.14048).

    ``z[q,w,t] = softcap * tanh(queries[q,w] . keys[q // G, t] * scale / softcap)`` (without softcap
    the bare product), ``p = softmax_t(z)`` over all positions up to the query's own, and
    ``scores[h,t] = pool_t(group_reduce_q(window_reduce_w(p[q,w,t])))``, all in float32.

    Parameters
    ----------
    queries : ``[B, Hq, W, D]``
        The queries, after RoPE, of each sequence's last W positions, or of every ``stride``-th one
        up to the last. Queries for positions before the first are not looked at.
    keys : ``[B, Hkv, T, D]``, optional
        Prompt keys, after RoPE.
    layer, length : :class:`Layer` and int, optional
        Instead of ``keys``: the keys that the layer's rows hold, read where they lie; T is
        ``length``, at least that of the longest row. Each row has a window of its own, its last
        entries. Pages of int4 and int2 are refused.
    seq_lens : ``[B]`` int32, optional
        Prompt lengths, 0 to T. Default: all T, or what rows hold.
    sink_logits : ``[Hq]`` float32, optional
        Logits that join each softmax and attend to nothing (gpt-oss).
    lse : ``[B, Hq, W]`` float32, optional
        Log-sum-exp of z (natural log, sinks included), if attention gave it; spares a key pass.
    scale, softcap : float, optional
        Default: ``1 / sqrt(D)``, and no cap.
    window_reduce, group_reduce : "mean", "max" or "sum"
    order : "group_first" or "pool_first"
        Whether the group is reduced before pooling or after.
    pool, pool_width : "max", "avg" or "none", and an odd width
        "max" ignores what is outside of the candidates, "avg" counts it as 0 (as torch does).
    window : int, optional
        How many of the last positions don't compete. Default: W.
    stride : int
        Positions from one query to the next.
    distance : int
        A query counts only for entries at least so many positions before it, in a mean as well.

    Returns
    -------
    scores : ``[B, Hkv, T]`` float32
        ``-inf`` where an entry doesn't compete: in the window and behind ``seq_lens``.
    """
    if layer is None:
        scores = _per_entry(keys)  # type: ignore[arg-type]
    else:
        shape = (*layer.lengths.shape, length)
        scores = layer.lengths.new_empty(shape, dtype=torch.float32)
    _C.score(
        queries, keys, layer, seq_lens, sink_logits, lse,
        0.0 if scale is None else scale, 0.0 if softcap is None else softcap,
        window_reduce, group_reduce, order, pool, pool_width,
        -1 if window is None else window, stride, distance, scores,
    )  # fmt: skip
    return scores


@verb(fake=lambda values, w_o, **_: _per_entry(values))
def value_norm(
    values: Tensor, w_o: Tensor, *, seq_lens: Tensor | None = None, norm: Norm = "l1"
) -> Tensor:
    """How far an entry can move the layer's output (CriticalKV, arXiv 2502.03805, Theorem 3.3).

    Parameters
    ----------
    values : ``[B, Hkv, T, Dv]``
    w_o : ``[E, Hq * Dv]``
        Weight of the output projection, as ``torch.nn.Linear`` stores it.
    seq_lens : ``[B]`` int32, optional
        Prompt lengths, 0 to T. Default: all T.
    norm : "l1" or "l2_gram"
        "l1": the mean over the q heads q of the group of ``||v Wo[q]||_1``, with ``Wo[q] = w_o[:,
        q*Dv:(q+1)*Dv].T``. "l2_gram": ``sqrt(v G v^T)`` with ``G`` the mean of ``Wo[q] Wo[q]^T``;
        much cheaper, nearly the same choice.

    Returns
    -------
    norms : ``[B, Hkv, T]`` float32, ``-inf`` behind ``seq_lens``
    """
    norms = _per_entry(values)
    _C.value_norm(values, w_o, seq_lens, norm, norms)
    return norms


def _per_row(scores: Tensor) -> Tensor:
    """A number for each row, ``[B, Hkv]`` int32."""
    try:
        return scores.new_empty(scores.shape[:2], dtype=torch.int32)
    except AttributeError:
        return _schedules.NOTHING


@verb(fake=lambda scores, budget, **_: _per_row(scores))
def allocate(
    scores: Tensor,
    budget: int,
    *,
    window: int,
    seq_lens: Tensor | None = None,
    floor: float = 0.2,
    safeguard: Safeguard = "blend",
) -> Tensor:
    """How many entries each kv head may keep, from one top-k over all heads (Ada-KV, arXiv
    2407.11550, Algorithms 1 and 2).

    With ``b = budget - window`` and ``f[h]`` the number of the ``Hkv * b`` highest candidate scores
    that lie in head h:

    * blend: ``(1 - floor) * f[h] + floor * b`` by largest remainder; sums to exactly ``Hkv * b``
    * hard_floor: every head takes its own top ``int(floor * b)``, then the layer-wide top-k fills
      up
    * official_round: ``round_half_even((1 - floor) * f[h] + int(floor * b))``, as the authors'
      code; the sum drifts
    * none: ``f[h]``

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
    safeguard : "blend", "hard_floor", "official_round" or "none"
        Which of the formulas above.

    Returns
    -------
    budgets : ``[B, Hkv]`` int32, window included
        Sequences of at most ``budget`` tokens keep everything.
    """
    budgets = _per_row(scores)
    _C.allocate(scores, seq_lens, budget, window, floor, safeguard, budgets)
    return budgets


def _kept(budgets: Tensor, total: int | torch.SymInt) -> Kept:
    return Kept(budgets.new_empty(total), budgets.new_empty(budgets.numel() + 1))


def _checked_total(total: int) -> int:
    try:
        count = operator.index(total)
    except TypeError:
        count = -1
    if not 0 <= count < 2**31:
        raise ValueError(f"select: total must be a number of positions below 2^31, got {total!r}")
    return count


def _total(scores: Tensor, budgets: Tensor, window: int, seq_lens: Tensor | None) -> int:
    """The sum of the budgets, clamped to what rows have."""
    most = seq_lens if seq_lens is not None else torch.full_like(budgets[:, 0], scores.shape[-1])
    return int(budgets.clamp(min=window).minimum(most[:, None]).sum())


def _fake_select(
    scores: Tensor, budgets: Tensor, *, total: int | None = None, **_options: Any
) -> Kept:
    return _kept(budgets, torch.library.get_ctx().new_dynamic_size() if total is None else total)


@verb(fake=_fake_select)
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

    Without ``norms`` a row keeps the best by score. With ``norms`` it takes its ``count = budget -
    window`` candidates in two stages (CriticalKV, arXiv 2502.03805, Algorithm 1): ``int(first *
    count)`` by score, the rest by ``(score + eps) * norm``. A score of ``+inf`` pins an entry.
    Equal values: lower position first. NaN ranks last.

    Parameters
    ----------
    scores : ``[B, Hkv, T]`` float32
    budgets : ``[B, Hkv]`` int32
        Entries to keep per row, window included; clamped to ``min(window, seq_len) .. seq_len``.
    window : int
    seq_lens : ``[B]`` int32, optional
    norms : ``[B, Hkv, T]`` float32, optional
    first : float, 0 to 1
    eps : float
        What is added to scores, so that the norm decides where they are 0.
    total : int, optional
        Size of ``Kept.positions``, at least the sum of the (clamped) budgets. Default: that sum,
        for which a CUDA device has to be waited for.

    Returns
    -------
    kept : :class:`Kept`
    """
    inputs = scores, budgets, norms, seq_lens, window, first, eps
    if total is not None and (type(total) is not int or not 0 <= total < 2**31):
        total = _checked_total(total)
    try:
        kept = _kept(budgets, _total(scores, budgets, window, seq_lens) if total is None else total)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        _C.select(*inputs, None, None)  # says what is wrong with them
        raise
    _C.select(*inputs, *kept)
    return kept


@verb(fake=lambda *_, **_options: None, mutates=Layer._fields)
def compact(
    keys: Tensor | None,
    values: Tensor | None,
    kept: Kept,
    layer: Layer,
    page_ids: Tensor,
    page_indptr: Tensor,
    *,
    places: Tensor | None = None,
    seq_lens: Tensor | None = None,
    biases: Tensor | None = None,
) -> None:
    """Moves the kept entries of a prompt into pages; slot i of a row holds its i-th kept position.

    Parameters
    ----------
    keys, values : ``[B, Hkv, T, D]`` and ``[B, Hkv, T, Dv]``, optional
        Without them the entries are those that the layer's rows hold, positions are slots of the
        rows, and everything that can stays in its place. Pages of int4 and int2 are refused.
    kept : :class:`Kept`
    layer : :class:`Layer`
        Its B sequences; everything in it is written: lengths from ``kept``, ``seen`` from
        ``seq_lens``; in place ``seen`` stays.
    page_ids, page_indptr : ``[Q]`` and ``[B + 1]`` int32
        Sequence b may use the pages ``page_ids[page_indptr[b]:page_indptr[b + 1]]``; they are dealt
        to its rows in order, then one fresh page to each row. In place, pages among them that rows
        hold entries in stay theirs.
    places : ``[K]`` int32, optional
        Where kept entries lie among keys and values; needs ``seq_lens``. Default: ``positions``.
    seq_lens : ``[B]`` int32, optional
    biases : ``[B, Hkv, T]`` float16, optional
        Biases of entries, for a layer with ``page_biases``. Default: 0, or what they have already.
    """
    _C.compact(keys, values, *kept, places, seq_lens, page_ids, page_indptr, biases, layer)


@verb(fake=lambda *_, **_options: None, mutates=_GROWING)
def append(keys: Tensor, values: Tensor, layer: Layer, *, num_new: Tensor | None = None) -> None:
    """Adds S new tokens of each sequence to its rows, for which ``KVCache.grow`` has made room.

    Parameters
    ----------
    keys, values : ``[B, Hkv, S, D]``, after RoPE, and ``[B, Hkv, S, Dv]``
    layer : :class:`Layer`
    num_new : ``[B]`` int32, optional
        How many of the S columns, counted from the right, belong to the sequence; the others are
        padding and not stored.
    """
    _C.append(keys, values, num_new, layer)


@verb(fake=lambda lengths, *_, **_options: _schedules.schedule(lengths))
def plan(
    lengths: Tensor,
    block_table: Tensor,
    fresh_pages: Tensor,
    *,
    new_tokens: int = 1,
    num_new: Tensor | None = None,
    page_size: int = 16,
    share: float | None = None,
    least: int = 8,
    newest: int = 1,
) -> Tensor:
    """Shares the pages of all rows out to workers, for all layers of a step at once; before the
    step's ``append``.

    Parameters
    ----------
    lengths : ``[L, B, Hkv]`` int32
    block_table : ``[L, B, Hkv, M]`` int32
    fresh_pages : ``[L, B, Hkv, F]`` int32
    new_tokens : int
        S of the step; 0 if the step's tokens were appended already.
    num_new : ``[B]`` int32, optional
        As in :func:`append`.
    page_size : int
        P, entries of a page.
    share, least, newest : optional
        With ``share`` the schedules are for the pages that ``shortlist`` will list by them in this
        step, with ``mass=1``: how many these are follows from ``lengths``.

    Returns
    -------
    schedule : ``[L, X]`` int32
        ``schedule[l]`` is what :func:`attend` takes in layer l. Valid for this step.
    """
    schedule = _schedules.schedule(lengths)
    workers = _schedules.num_workers(getattr(lengths, "device", None))
    _C.plan(
        lengths, block_table, fresh_pages, num_new, new_tokens, page_size, workers,
        0.0 if share is None else share, least, newest, schedule,
    )  # fmt: skip
    return schedule


def _attended(queries: Tensor, layer: Layer, others: Sequence[Tier]) -> tuple[Tensor, Tensor]:
    """The output ``[B, Hq, S, O]``, in memory ``[B, S, Hq, O]``, and its lse ``[B, Hq, S]``."""
    try:
        batch, heads, tokens, whole = queries.shape
        dim = whole if layer.value_pages is None else layer.value_dim or whole
        for tier in others:
            asked = whole if tier.queries is None else tier.queries.shape[3]
            dim = max(dim, tier.column + (tier.layer.value_dim or asked))
        out = queries.new_empty((batch, tokens, heads, dim)).transpose(1, 2)
        return out, queries.new_empty((batch, heads, tokens), dtype=torch.float32)
    except (AttributeError, ValueError):
        return _schedules.NOTHING, _schedules.NOTHING


@verb(
    fake=lambda queries, layer, _, others=(), **_options: _attended(queries, layer, others),
    mutates=(*_GROWING, "schedule", "accumulated"),
)
def attend(
    queries: Tensor,
    layer: Layer,
    schedule: Tensor,
    others: Sequence[Tier] = (),
    *,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    num_new: Tensor | None = None,
    sink_logits: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    prefetch: bool = False,
    accumulated: Tensor | None = None,
    accumulate: Accumulate = "sum",
    group_reduce: Reduce = "mean",
    decay: float = 1.0,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention of S new queries over what each row holds, causal among the newest S entries.

    ``z = softcap * tanh(q . k * scale / softcap)``, plus the entry's bias if the layer has
    ``page_biases``; ``out = softmax(z) v`` over the slots ``0 .. length - S + s`` of the row, the
    head's sink logit included. With ``keys`` and ``values`` they are appended first, in the same
    launch.

    Parameters
    ----------
    queries : ``[B, Hq, S, D]``
    layer : :class:`Layer`
    schedule : ``[X]`` int32
        This layer's part of :func:`plan`'s result. On CUDA the launch counts in it, and leaves it
        as it was: two launches must not use one schedule at the same time.
    others : :class:`Tier`, at most 7, optional
        Where else the entries of the rows lie: the softmax is over all of them, and their results
        meet in float32. Every query sees all slots of these.
    keys, values : ``[B, Hkv, S, D]`` and ``[B, Hkv, S, Dv]``, optional
    num_new : ``[B]`` int32, optional
        As in :func:`append`; padding columns give 0.
    sink_logits : ``[Hq]`` float32, optional
        Logits that join each softmax and attend to nothing (gpt-oss).
    scale, softcap : float, optional
        Default: ``1 / sqrt(D)``, and no cap.
    prefetch : bool
        On CUDA: pages and schedule may be read while the kernel before this one still runs, which
        must write neither: not right after ``plan``, ``append`` or ``compact``. With a plan for
        what ``shortlist`` lists, only the schedule is, so that it may be right after ``shortlist``.
    accumulated : ``[B, Hkv, T]`` float32, optional, not with ``others``
        Changed: what each slot of a row was given by the queries since its entry came, T at least
        ``M * P``. A new token's slot begins at 0, and what lies behind a row is left alone.
    accumulate : "sum", "max" or "last"
        How a token's probability ``exp(z - lse)``, one for a group, joins: it is added to the sum
        so far times ``decay``; the largest stays; or the slot has the number of the last token,
        from 1, that gave ``threshold`` or more (0: 1 / its number).
    group_reduce : "mean", "max" or "sum"
        Over the q heads of a group.
    decay, threshold : float
        From 0 to 1, and 0 or more.

    Returns
    -------
    out : ``[B, Hq, S, Dv]``, in memory ``[B, S, Hq, Dv]``
        With ``others`` as many columns as all tiers have.
    lse : ``[B, Hq, S]`` float32
        Natural log of the sum of exponentials, sink logits included; ``-inf`` where nothing was
        attended to.
    """
    out, lse = _attended(queries, layer, others)
    _C.attend(
        queries, layer, schedule, keys, values, num_new, sink_logits, others,
        0.0 if scale is None else scale, 0.0 if softcap is None else softcap,
        _schedules.num_workers(getattr(queries, "device", None)), prefetch,
        accumulate, group_reduce, decay, threshold, out, lse, accumulated,
    )  # fmt: skip
    return out, lse
