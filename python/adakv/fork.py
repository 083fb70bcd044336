"""Branches whose rows share pages: the verb, and what the device does for
:meth:`adakv.cache.KVCache.fork`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adakv import _C
from adakv._register import verb
from adakv.tensors import Layer, Source

if TYPE_CHECKING:
    from adakv.cache import KVCache


@verb(fake=lambda *_, **_options: None, mutates=Layer._fields)
def fork(
    source: Source,
    sources: Tensor,
    stretch: Tensor,
    page_ids: Tensor,
    page_indptr: Tensor,
    layer: Layer,
    *,
    back: Tensor | None = None,
    whole: bool = False,
) -> None:
    """Fills the rows of a fork (:meth:`adakv.cache.KVCache.fork`), which shares the source's pages:
    sequence b goes on where the source's ``sources[b]`` is, without its ``back[b]`` newest tokens.

    ``stretch`` are tokens of each since its rows got fresh pages; ``page_ids``, from
    ``page_indptr`` on, the ``layer``'s own: ``[2, Hkv]``, or if ``whole`` as for :func:`compact`.
    """
    _C.fork(*source, sources, stretch, back, page_ids, page_indptr, whole, layer)


def fill(
    cache: KVCache,
    branches: Sequence[Layer],
    given: bytes,
    sources: Sequence[int],
    *,
    back: Sequence[int],
    whole: bool,
    is_dealt: bool,
) -> None:
    """:func:`adakv.ops.fork` in every layer.

    Parameters
    ----------
    cache : :class:`adakv.cache.KVCache`
        That of the sources.
    branches : one :class:`adakv.ops.Layer` for each layer
        The fork's B sequences.
    given : bytes
        int32 numbers: the stretch of each of the fork's B sequences; where the pages of each begin
        in each layer, ``[L, B + 1]``; and these pages.
    sources, back, whole
        As :meth:`adakv.cache.KVCache.fork` takes them.
    is_dealt : bool
        Whether all pages are copied, and only the device knows which layer has which.
    """
    numbers = torch.frombuffer(bytearray(given), dtype=torch.int32)
    batch, num_layers = len(sources), cache.num_layers
    stretch, starts, page_ids = numbers.tensor_split([batch, batch + num_layers * (batch + 1)])
    starts = starts.view(num_layers, batch + 1)
    if is_dealt:
        page_ids, starts = _of_sequences(page_ids, starts)
    lists = [torch.tensor([*x]).int() for x in (sources, back)]
    stretch, page_ids, starts, named, backs = (
        x.to(cache.device, non_blocking=True) for x in (stretch, page_ids, starts, *lists)
    )
    for layer, (old, new) in enumerate(zip(cache.layers, branches, strict=True)):
        fork(
            Source(old.block_table, old.lengths, old.seen, old.tails),
            named,
            stretch,
            page_ids,
            starts[0 if is_dealt else layer],
            new,
            back=backs if any(back) else None,
            whole=whole,
        )
        if is_dealt:
            cache.advance_pages(starts[0], new.lengths)


def _of_sequences(page_ids: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Pages of each sequence in each layer, which begin at ``starts`` ``[L, B + 1]``, as those that
    it has in all: as :meth:`adakv.cache.KVCache.begin_layers` gives them."""
    sizes = starts.diff()  # [L, B]
    pieces = torch.split(page_ids, sizes.flatten().tolist())
    order = torch.arange(sizes.numel()).view(sizes.shape).T.flatten()
    ends = torch.cat([starts.new_zeros(1), sizes.sum(0).cumsum(0).int()])
    return torch.cat([pieces[i] for i in order.tolist()]), ends[None]
