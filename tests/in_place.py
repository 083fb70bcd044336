"""compact without keys and values: a part of ``reference.py``."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def compact_in_place(
    kept: tuple[Tensor, Tensor], layer: Any, page_ids: Tensor, page_indptr: Tensor
) -> None:
    """Slot i of a row: its slot ``positions[i]``, with all that a page has of it.

    Kept pages stay if they are among the sequence's ``page_ids``; the next of these that no row
    keeps is in the place of another.
    """
    batch, num_heads = layer.lengths.shape
    page_size = layer.page_positions.shape[1]
    positions, indptr = kept[0].tolist(), kept[1].tolist()
    halves = [layer.pages[:, 0], layer.values]  # [N, P, D] and [N, P, Dv]
    scales = [x for x in (layer.key_scales, layer.value_scales) if x is not None]
    biases = [] if layer.page_biases is None else [layer.page_biases]
    parts = [*halves, *scales, layer.page_positions, *biases]
    before = [x.clone() for x in parts]
    tables = layer.block_table.clone()
    layer.block_table.fill_(-1)
    layer.fresh_pages.fill_(-1)
    for b in range(batch):
        named = page_ids[int(page_indptr[b]) : int(page_indptr[b + 1])].tolist()
        rows = [
            positions[indptr[r] : indptr[r + 1]] for r in range(b * num_heads, (b + 1) * num_heads)
        ]
        pages = [-(-len(row) // page_size) for row in rows]
        held = {int(p) for h, n in enumerate(pages) for p in tables[b, h, :n]}
        others = iter([page for page in named if page not in held])
        for h, row in enumerate(rows):
            layer.lengths[b, h] = len(row)
            for i in range(pages[h]):
                own = int(tables[b, h, i])
                layer.block_table[b, h, i] = own if own in named else next(others)
            for slot, position in enumerate(row):
                to = int(layer.block_table[b, h, slot // page_size]), slot % page_size
                source = int(tables[b, h, position // page_size]), position % page_size
                for part, old in zip(parts, before, strict=True):
                    part[to] = old[source]
        for h in range(num_heads):
            layer.fresh_pages[b, h, 0] = next(others)
