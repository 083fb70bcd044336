"""plan in plain Python: who attends to what, page by page."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from listed_pages import listed_length


def plan_borders(pages: list[int], num_workers: int, page_size: int = 16) -> list[int]:
    """Where the workers' ranges begin and end: ascending units from 0 to the sum of ``pages``."""
    total = sum(pages)
    workers = max(1, min(total // 8, num_workers))
    chunk = 1
    while chunk < max(pages, default=0) and sum(-(-p // chunk) for p in pages) > workers:
        chunk += 1
    row_ends = np.cumsum([0, *pages]).tolist()
    largest = min(7 * total // (5 * workers), total // workers + 256 // page_size)
    if sum(-(-p // chunk) for p in pages) <= workers and chunk <= largest:
        borders = [0]  # whole rows in even parts of at most `chunk` pages
        for begin, p in zip(row_ends, pages, strict=False):
            parts = -(-p // chunk)
            borders += [begin + (j + 1) * p // parts for j in range(parts)]
        return borders
    cost = min(256 // page_size, total // (4 * workers))
    if len(set(pages)) == 1:  # whole rows, where equal ranges that cut some take no less
        rows, row = -(-len(pages) // workers), pages[0] + cost
        if rows * row <= -(-len(pages) * row // workers) + cost:
            return [*row_ends[:-1:rows], row_ends[-1]]
    # Equal ranges of pages and of what row ends cost; a border near the end of a row moves there.
    page_of = [0]  # behind each unit of cost, the next page
    for end, p in zip(row_ends[1:], pages, strict=True):
        page_of += [*range(end - p + 1, end + 1), *([end] * cost if p else [])]
    borders = []
    for k in range(workers + 1):
        even = page_of[k * (len(page_of) - 1) // workers]
        nearest = min(row_ends, key=lambda end: (abs(end - even), end))
        distance = abs(nearest - even)
        is_near = 5 * distance * workers <= total and distance <= 256 // page_size
        borders.append(nearest if is_near else even)
    return borders


def plan(
    lengths: Tensor,
    block_table: Tensor,
    fresh_pages: Tensor,
    *,
    num_workers: int,
    new_tokens: int = 1,
    num_new: Tensor | None = None,
    page_size: int = 16,
    listing: dict[str, Any] | None = None,
) -> Tensor:
    """The schedule of ``cpp/ops/schedule.h``, layer by layer, field by field; with a ``listing``
    (share, least, newest) for the pages that are listed."""
    num_layers, batch, num_heads = lengths.shape
    num_rows = batch * num_heads
    schedule = torch.zeros(num_layers, num_workers * 64 + num_rows * 8, dtype=torch.int32)
    counts = [new_tokens] * batch if num_new is None else num_new.tolist()
    new = [n if new_tokens else 0 for n in counts]
    for layer in range(num_layers):
        held = lengths[layer].flatten().tolist()
        grown = [held[r] + new[r // num_heads] for r in range(num_rows)]
        if listing:  # what is left out are whole pages
            grown = [
                listed_length(
                    grown[r], max(new_tokens, 1), page_size=page_size,
                    asks=new_tokens == 0 or new[r // num_heads] > 0, **listing,
                )
                for r in range(num_rows)
            ]  # fmt: skip
        pages = [-(-x // page_size) for x in grown]
        units = []  # page id of each unit
        for r in range(num_rows):
            b, h = divmod(r, num_heads)
            old = -(-held[r] // page_size)
            units += block_table[layer, b, h, :old].tolist()
            units += fresh_pages[layer, b, h, : max(pages[r] - old, 0)].tolist()
        borders = plan_borders(pages, num_workers, page_size)
        ranges = [(a, z) for a, z in pairwise(borders) if a < z]
        facts, begin, partials = [], 0, 0
        for r in range(num_rows):
            end = begin + pages[r]
            sharing = [w for w, (a, z) in enumerate(ranges) if max(a, begin) < min(z, end)]
            shared = len(sharing) if len(sharing) > 1 else 0
            first = sharing[0] if sharing else 0
            facts.append([begin, end, grown[r], partials, len(sharing), first, 0, 0])
            begin, partials = end, partials + shared
        workers = schedule[layer, : num_workers * 64].view(num_workers, 64)
        for w, (a, z) in enumerate(ranges):
            row = next(r for r in range(num_rows) if facts[r][0] <= a < facts[r][1])
            ids = [] if listing else units[a : min(z, a + 52)]
            looks_up = 1 if listing else 0
            ids += [0] * (52 - len(ids))
            workers[w] = torch.tensor([a, z, row, looks_up, *facts[row], *ids])
        if num_rows:
            schedule[layer, num_workers * 64 :] = torch.tensor(facts).flatten()
    return schedule
