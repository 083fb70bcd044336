"""Caches grow where pages are too few."""

from __future__ import annotations

from collections.abc import Sequence

from adakv.cache import KVCache
from adakv.errors import Error


def make_room(kv: KVCache, num_new: Sequence[int]) -> None:
    """Has a cache grow if there are too few pages for ``num_new[b]`` more tokens of each sequence.

    Raises ``adakv.Error`` if there is no memory for them. The cache goes on working.
    """
    pages, rows = kv.pages_to_grow(num_new) - kv.num_free, kv.row_pages_to_grow(num_new)
    if pages > 0 or rows > kv.max_row_pages:
        enlarge(kv, pages, rows)


def enlarge(kv: KVCache, pages: int, rows: int = 0) -> None:
    """Has a cache grow by so many pages, to rows of so many; by a half if there is memory for it,
    so that all copies together stay in proportion to the text."""
    more = kv.num_pages + max(pages, kv.num_pages // 2) if pages > 0 else 0
    try:
        kv.reserve(num_pages=more, max_row_pages=rows + rows // 2)
    except Error:
        kv.reserve(num_pages=kv.num_pages + max(pages, 0), max_row_pages=rows)
