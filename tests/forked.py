"""fork: a part of ``reference.py``."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def fork(
    source: Any,
    sources: Tensor,
    stretch: Tensor,
    page_ids: Tensor,
    page_indptr: Tensor,
    layer: Any,
    *,
    back: Tensor | None = None,
    whole: bool = False,
) -> None:
    """Rows hold what those of ``sources`` do, without the ``back`` newest: in the same pages, but
    for those that a row may still write to, which are copied to its own.

    These are the page that begins within the newest ``stretch`` entries and the one before it, or
    the last one where none begins; a row's own are ``page_ids[h]``, for the one before, and
    ``page_ids[Hkv + h]``, which is fresh until it begins. If ``whole``, pages are dealt as in
    compact.
    """
    page_size = layer.page_positions.shape[1]
    others = (layer.key_scales, layer.value_scales, layer.page_biases, layer.value_pages)
    scales = [x for x in others if x is not None]
    for b, a in enumerate(sources.tolist()):
        mine = page_ids[int(page_indptr[b]) : int(page_indptr[b + 1])].tolist()
        left = 0 if back is None else int(back[b])
        layer.seen[b] = source.source_seen[a] - left
        lengths = [int(n) - left for n in source.source_lengths[a]]
        counts = [-(-n // page_size) for n in lengths]
        for h, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            if whole:
                first = sum(counts[:h])
                own = dict(enumerate(mine[first : first + count]))
                fresh = mine[sum(counts) + h]
            else:
                before = -(-max(length - int(stretch[b]), 0) // page_size)
                own = dict(zip((before - 1, before), mine[h :: len(lengths)], strict=True))
                fresh = own[before]
            layer.lengths[b, h] = length
            layer.fresh_pages[b, h] = -1
            layer.fresh_pages[b, h, 0] = fresh
            layer.block_table[b, h] = -1
            for i in range(count):
                page = int(source.source_table[a, h, i])
                layer.block_table[b, h, i] = own.get(i, page)
                if i in own:
                    for x in (layer.pages, layer.page_positions, *scales):
                        x[own[i]] = x[page]
            if layer.tails is not None:
                layer.tails[b, h] = source.source_tails[a, h]
