"""Entries that stay move into pages: a verb of :mod:`adakv.ops`."""

from __future__ import annotations

from torch import Tensor

from adakv import _C
from adakv._register import verb
from adakv.tensors import Kept, Layer


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
        rows, and everything stays in its place that can. Not of int4.
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
        Of the entries, for a layer with ``page_biases``. Default: 0, and in place what they have.
    """
    _C.compact(keys, values, *kept, places, seq_lens, page_ids, page_indptr, biases, layer)
