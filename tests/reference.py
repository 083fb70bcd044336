"""The verbs in plain torch: the specification that both backends are tested against.

Loops and float64, no cleverness. Shapes and options are those of ``adakv.ops``; nothing here uses
a kernel of ours. The three verbs that give floats take a ``dtype``: with the inputs' own dtype they
are what a user of plain torch would get, which is the yardstick of ``tolerance.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codes import quantise, quantise_mixed_page, quantise_page
from folded import biases_of as biases_of
from forked import fork as fork
from in_place import compact_in_place
from planned import plan as plan
from planned import plan_borders as plan_borders
from ranked import largest_remainder as largest_remainder
from ranked import ranked
from rows import entries_of as entries_of
from rows import kv_dtype_of, whole_parts
from rows import row_of as row_of

INF = float("inf")


def _lengths(seq_lens: Tensor | None, batch: int, length: int) -> list[int]:
    return [length] * batch if seq_lens is None else seq_lens.tolist()


def _reduce(x: Tensor, how: str, dim: int) -> Tensor:
    return {"mean": x.mean, "sum": x.sum, "max": x.amax}[how](dim)


def _pool(x: Tensor, pool: str, width: int) -> Tensor:
    """``[..., n]`` pooled with stride 1; outside counts as -inf for "max" and as 0 for "avg"."""
    if pool == "none" or x.shape[-1] == 0:
        return x
    side = width // 2
    windows = F.pad(x, (side, side), value=-INF if pool == "max" else 0.0).unfold(-1, width, 1)
    return windows.amax(-1) if pool == "max" else windows.mean(-1)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if not softcap else softcap * torch.tanh(logits / softcap)


def window_logits(
    queries: Tensor,
    keys: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    stride: int = 1,
) -> Tensor:
    """Causal logits ``[Hq, W, T]`` of the last W positions of one sequence, ``stride`` apart.

    Queries are ``[Hq, W, D]``, keys ``[Hkv, T, D]``.
    """
    num_heads, window, head_dim = queries.shape
    length = keys.shape[1]
    keys = keys.repeat_interleave(num_heads // keys.shape[0], 0)
    z = _capped(queries @ keys.mT * (scale or head_dim**-0.5), softcap)
    position = _window_positions(length, window, stride)[:, None]
    return z.masked_fill(torch.arange(length) > position, -INF)


def _window_positions(length: int, window: int, stride: int) -> Tensor:
    return length - 1 - stride * torch.arange(window - 1, -1, -1)


def score(
    queries: Tensor,
    keys: Tensor | None,
    layer: Any = None,
    length: int = 0,
    *,
    seq_lens: Tensor | None = None,
    sink_logits: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window_reduce: str = "mean",
    group_reduce: str = "mean",
    order: str = "group_first",
    pool: str = "max",
    pool_width: int = 7,
    window: int | None = None,
    stride: int = 1,
    distance: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """SnapKV, arXiv 2404.14469: ``pool_t(group_reduce_q(window_reduce_w(softmax_t(z))))``.

    With a layer each row is a sequence of its own, T is ``length``.
    """
    if keys is None:
        options = {
            "scale": scale, "softcap": softcap, "window_reduce": window_reduce,
            "group_reduce": group_reduce, "order": order, "pool": pool, "pool_width": pool_width,
            "window": window, "stride": stride, "distance": distance, "dtype": dtype,
        }  # fmt: skip
        return _score_rows(queries, layer, length, sink_logits, options)
    batch, _, num_queries, _ = queries.shape
    _, num_kv_heads, length, _ = keys.shape
    scores = torch.full((batch, num_kv_heads, length), -INF, dtype=dtype)
    for b, seq_len in enumerate(_lengths(seq_lens, batch, length)):
        n = seq_len - (num_queries if window is None else window)
        if n <= 0:
            continue
        q, k = queries[b].cpu().to(dtype), keys[b, :, :seq_len].cpu().to(dtype)
        z = window_logits(q, k, scale, softcap, stride)
        if sink_logits is not None:
            z = torch.cat(
                [z, sink_logits.cpu().to(dtype)[:, None, None].expand(-1, num_queries, 1)], -1
            )
        position = _window_positions(seq_len, num_queries, stride)[:, None]
        counts = position - distance >= torch.arange(n)  # [W, n]
        p = z.softmax(-1)[..., :n].where(counts, 0)
        if window_reduce == "mean":
            a = p.sum(1) / counts.sum(0).clamp(min=1)  # [Hq, n]
        else:
            a = _reduce(p, window_reduce, 1)
        if order == "pool_first":
            a = _pool(a, pool, pool_width)
        g = _reduce(a.view(num_kv_heads, -1, n), group_reduce, 1)  # [Hkv, n]
        scores[b, :, :n] = _pool(g, pool, pool_width) if order == "group_first" else g
    return scores


def _score_rows(
    queries: Tensor, layer: Any, length: int, sinks: Tensor | None, options: dict[str, Any]
) -> Tensor:
    batch, heads = layer.lengths.shape
    group = queries.shape[1] // heads
    scores = torch.full((batch, heads, length), -INF, dtype=options["dtype"])
    for b in range(batch):
        for h in range(heads):
            keys = row_of(layer, b, h, options["dtype"])[0]  # [n, D]
            if len(keys) == 0:
                continue
            of_row = slice(h * group, (h + 1) * group)
            scores[b, h, : len(keys)] = score(
                queries[b : b + 1, of_row],
                keys[None, None],
                sink_logits=None if sinks is None else sinks[of_row],
                **options,
            )
    return scores


def value_norm(
    values: Tensor,
    w_o: Tensor,
    *,
    seq_lens: Tensor | None = None,
    norm: str = "l1",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """CriticalKV, arXiv 2502.03805: group mean of ``||v Wo[q]||_1``, or ``sqrt(v G v^T)``."""
    batch, num_kv_heads, length, head_dim = values.shape
    wo = w_o.cpu().to(dtype).T.reshape(num_kv_heads, -1, head_dim, w_o.shape[0])  # [Hkv, G, D, E]
    norms = torch.full((batch, num_kv_heads, length), -INF, dtype=dtype)
    for b, seq_len in enumerate(_lengths(seq_lens, batch, length)):
        for h in range(num_kv_heads):
            v = values[b, h, :seq_len].cpu().to(dtype)
            if norm == "l1":
                norms[b, h, :seq_len] = (v @ wo[h]).abs().sum(-1).mean(0)
            else:
                gram = (wo[h] @ wo[h].mT).mean(0)
                norms[b, h, :seq_len] = ((v @ gram) * v).sum(-1).clamp(min=0).sqrt()
    return norms


def gate(hidden: Tensor, weights: dict[str, Tensor], layer: int) -> Tensor:
    """What a gate's file says of a layer's hidden states ``[B, T, E]``: ``[B, Hkv, T]``, the
    logarithms of scores. A linear map, or two with ``x * Phi(x)`` between (KVzap, section 3)."""
    named = {name: x.to(hidden.dtype) for name, x in weights.items()}
    place = f"layers.{layer}"
    if f"{place}.weight" not in named:
        z = hidden @ named[f"{place}.0.weight"].mT + named[f"{place}.0.bias"]
        hidden = z * (1 + torch.erf(z / 2**0.5)) / 2
        place += ".2"
    return (hidden @ named[f"{place}.weight"].mT + named[f"{place}.bias"]).mT


def allocate(
    scores: Tensor,
    budget: int,
    *,
    window: int,
    seq_lens: Tensor | None = None,
    floor: float = 0.2,
    safeguard: str = "blend",
) -> Tensor:
    """Ada-KV, arXiv 2407.11550, Algorithms 1 and 2 (the latter as its text has it)."""
    batch, num_heads, length = scores.shape
    budgets = np.zeros((batch, num_heads), np.int32)
    b = budget - window
    for i, seq_len in enumerate(_lengths(seq_lens, batch, length)):
        n = seq_len - window
        if n <= b or n <= 0:
            budgets[i] = seq_len
            continue
        order = ranked(scores[i, :, :n].cpu().numpy())
        heads = order // n
        f = np.bincount(heads[: num_heads * b], minlength=num_heads)
        if safeguard == "blend":
            f = largest_remainder([(1 - floor) * x + floor * b for x in f.tolist()], num_heads * b)
        elif safeguard == "official_round":
            f = [round(round((1 - floor) * x + int(floor * b), 9)) for x in f.tolist()]
        elif safeguard == "hard_floor":
            rank_in_head = np.zeros(len(order), int)
            for h in range(num_heads):
                rank_in_head[heads == h] = np.arange(n)
            own = rank_in_head < int(floor * b)
            chosen = np.concatenate([heads[own], heads[~own][: num_heads * b - own.sum()]])
            f = np.bincount(chosen, minlength=num_heads)
        budgets[i] = np.asarray(f) + window
    return torch.from_numpy(budgets)


def select(
    scores: Tensor,
    budgets: Tensor,
    *,
    window: int,
    seq_lens: Tensor | None = None,
    norms: Tensor | None = None,
    first: float = 0.5,
    eps: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """Top-k of each row, or CriticalKV's two stages (arXiv 2502.03805, Algorithm 1).

    Returns the positions, ascending within a row, and their indptr.
    """
    batch, num_heads, length = scores.shape
    positions: list[int] = []
    indptr = [0]
    for b, seq_len in enumerate(_lengths(seq_lens, batch, length)):
        n = max(seq_len - window, 0)
        for h in range(num_heads):
            count = min(max(int(budgets[b, h]) - window, 0), n)
            value = scores[b, h, :n].cpu().float().numpy()
            if norms is None:
                kept = ranked(value[None])[:count].tolist()
            else:
                kept = ranked(value[None])[: int(first * count)].tolist()
                with np.errstate(all="ignore"):  # float32 throughout, as the backends
                    product = (value + np.float32(eps)) * norms[b, h, :n].cpu().float().numpy()
                product = np.where(value == INF, INF, product)
                rest = ranked(product[None])
                kept += rest[~np.isin(rest, kept)][: count - len(kept)].tolist()
            positions += sorted(kept) + list(range(n, seq_len))
            indptr.append(len(positions))
    return torch.tensor(positions, dtype=torch.int32), torch.tensor(indptr, dtype=torch.int32)


def compact(
    keys: Tensor | None,
    values: Tensor | None,
    kept: tuple[Tensor, Tensor],
    layer: Any,
    page_ids: Tensor,
    page_indptr: Tensor,
    *,
    seq_lens: Tensor | None = None,
    biases: Tensor | None = None,
) -> None:
    """Deals pages to rows in order, then one fresh page to each; slot i: the i-th kept position."""
    if keys is None or values is None:
        compact_in_place(kept, layer, page_ids, page_indptr)
        return
    batch, num_heads, length, _ = keys.shape
    page_size = layer.pages.shape[2]
    positions, indptr = kept[0].tolist(), kept[1].tolist()
    layer.block_table.fill_(-1)
    layer.fresh_pages.fill_(-1)
    for b, seq_len in enumerate(_lengths(seq_lens, batch, length)):
        pages = iter(page_ids[int(page_indptr[b]) : int(page_indptr[b + 1])].tolist())
        layer.seen[b] = seq_len
        for h in range(num_heads):
            row = positions[indptr[b * num_heads + h] : indptr[b * num_heads + h + 1]]
            layer.lengths[b, h] = len(row)
            for slot, position in enumerate(row):
                if slot % page_size == 0:
                    layer.block_table[b, h, slot // page_size] = next(pages)
                _store(layer, b, h, slot, keys[b, h, position], values[b, h, position], position)
                if biases is not None:
                    page = int(layer.block_table[b, h, slot // page_size])
                    layer.page_biases[page, slot % page_size] = biases[b, h, position]
        for h in range(num_heads):
            layer.fresh_pages[b, h, 0] = next(pages)


def _store(
    layer: Any, b: int, h: int, slot: int, key: Tensor, value: Tensor, position: int
) -> None:
    page_size = layer.pages.shape[2]
    page = int(layer.block_table[b, h, slot // page_size])
    kv_dtype = kv_dtype_of(layer)
    layer.page_positions[page, slot % page_size] = position
    if layer.page_biases is not None:
        layer.page_biases[page, slot % page_size] = 0
    if layer.tails is not None:
        tail = layer.tails[b, h].unflatten(0, (2, page_size))
        tail[0, slot % page_size], tail[1, slot % page_size] = key, value
        if slot % page_size == page_size - 1:
            parts = whole_parts(layer)
            is_mixed = layer.value_pages is not None
            made = _mixed_page(layer, *tail) if is_mixed else quantise_page(*tail, kv_dtype)
            for part, x in zip(parts, made, strict=True):
                part[page] = x
        return
    keys, values = (layer.pages[:, 0], layer.key_scales), (layer.values, layer.value_scales)
    for x, (held, scales) in ((key, keys), (value, values)):
        if scales is not None:
            x, scales[page, slot % page_size] = quantise(x, kv_dtype)
        held[page, slot % page_size] = x


def _mixed_page(layer: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    in_16 = keys.shape[1] - layer.key_scales.shape[2]
    in_2 = next(
        n for n in range(keys.shape[1] + 1)
        if 2 * in_16 + (keys.shape[1] - in_16 - n) / 2 + n / 4 == layer.pages.shape[3]
    )  # fmt: skip
    return quantise_mixed_page(keys, values, in_16, in_2)


def append(keys: Tensor, values: Tensor, layer: Any, *, num_new: Tensor | None = None) -> None:
    """Stores the last ``num_new[b]`` of the S columns of each sequence in all of its rows.

    A row that outgrows its last page takes its next fresh one.
    """
    batch, num_heads, num_columns, _ = keys.shape
    page_size = layer.pages.shape[2]
    for b, count in enumerate(_lengths(num_new, batch, num_columns)):
        for h in range(num_heads):
            fresh = iter(layer.fresh_pages[b, h].tolist())
            for i in range(count):
                slot = int(layer.lengths[b, h])
                column = num_columns - count + i
                if slot % page_size == 0:
                    layer.block_table[b, h, slot // page_size] = next(fresh)
                position = int(layer.seen[b]) + i
                _store(layer, b, h, slot, keys[b, h, column], values[b, h, column], position)
                layer.lengths[b, h] = slot + 1
        layer.seen[b] += count


def attend(
    queries: Tensor,
    layer: Any,
    others: Sequence[Any] = (),
    *,
    num_new: Tensor | None = None,
    sink_logits: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    appends: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Attention of the newest S tokens (appended already) over slots ``0 .. length - S + s``.

    With ``appends`` as by the call that appends them: one that fills a page of int4 reads it first.
    Of the tiers ``others`` every query sees all slots, by queries of the tier if it has some, and
    the softmax is over all of them. What it gives values of a tier comes to the output's columns
    from the tier's on.
    """
    batch, num_heads, num_columns, head_dim = queries.shape
    group = num_heads // layer.lengths.shape[1]
    scale = scale or head_dim**-0.5
    out = torch.zeros(batch, num_heads, num_columns, _columns(queries, layer, others), dtype=dtype)
    lse = torch.full((batch, num_heads, num_columns), -INF, dtype=dtype)
    for b, count in enumerate(_lengths(num_new, batch, num_columns)):
        just_filled = appends and num_columns == count == 1
        for h in range(num_heads // group):
            rows = [(queries, 0, _entries(layer, b, h, dtype, just_filled))]
            for tier in others:
                asked = queries if tier.queries is None else tier.queries
                rows.append((asked, tier.column, _entries(tier.layer, b, h, dtype, False)))
            columns = range(num_columns - count, num_columns)
            for q, s in product(range(h * group, h * group + group), columns):
                logits, values = [], []
                for i, (asked, column, (keys, held, biases)) in enumerate(rows):
                    hidden = num_columns - s - 1 if i == 0 else 0  # newest ones
                    seen = max(len(keys) - hidden, 0)
                    z = keys[:seen] @ asked[b, q, s].cpu().to(dtype) * scale
                    logits.append(_capped(z, softcap) + biases[:seen])
                    behind = out.shape[3] - column - held.shape[1]
                    values.append(F.pad(held[:seen], (column, behind)))
                z, v = torch.cat(logits), torch.cat(values)
                if sink_logits is not None:
                    z = torch.cat([z, sink_logits[q : q + 1].cpu().to(dtype)])
                if not z.isneginf().all():
                    lse[b, q, s] = z.logsumexp(0)
                    out[b, q, s] = z.softmax(0)[: len(v)] @ v
    return out, lse


def _columns(queries: Tensor, layer: Any, others: Sequence[Any]) -> int:
    """Columns of attend's output: the last one of any tier."""
    ends = [layer.value_dim or queries.shape[3]]
    for tier in others:
        asked = queries if tier.queries is None else tier.queries
        ends.append(tier.column + (tier.layer.value_dim or asked.shape[3]))
    return max(ends)


def _entries(
    layer: Any, b: int, h: int, dtype: torch.dtype, just_filled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and biases of a row."""
    keys, values = row_of(layer, b, h, dtype, just_filled=just_filled)
    return keys, values, biases_of(layer, b, h).to(dtype)
