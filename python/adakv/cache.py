"""Cache memory: pages, block tables, lengths and positions of every layer, owned by C++.

The life of a sequence::

    # prefill, for each layer
    page_ids, page_indptr = cache.begin(layer, totals, prompt_lens)
    ops.compact(keys, values, kept, cache.layer(layer), page_ids, page_indptr)

    # decode: once for all layers, then for each layer
    columns = cache.grow(num_new, columns)
    schedule = ops.plan(*cache.plan_inputs, new_tokens=columns)
    out, lse = ops.attend(queries, cache.layer(layer), schedule[layer], keys=keys, values=values)

    cache.remove(sequence)
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from adakv import _C
from adakv.errors import integer
from adakv.fork import fill
from adakv.formats import check_kv_dtype, check_page_size, core_format, device_of, page_size_for
from adakv.ops import Layer
from adakv.tensors import SHARED

_MOST = 2**31 - 1  # of what is counted in int32

#: Fields of a layer with a row for each sequence.
_ROWS = ("block_table", "lengths", "seen", "fresh_pages", "tails")


class KVCache:
    """Pages for the entries that are kept, for a batch of sequences over all layers.

    All memory is taken at once; on the CPU, pages that were never used cost nothing. More is made
    by :meth:`reserve`. Tensors that it hands out keep their memory alive.

    Parameters
    ----------
    num_layers, num_sequences, num_kv_heads, head_dim : int
        ``head_dim`` is that of queries and keys: a multiple of 8, at most 256.
    num_pages : int
        Pages of the pool, shared by all layers. A page holds ``page_size`` entries of one row.
    max_row_pages : int
        Most pages of one row: ``ceil(longest / page_size)`` for rows of up to ``longest`` entries.
        A block table has no more columns than the pool has pages, so a large number costs nothing.
    page_size : int, optional
        Entries of a page: a power of two from 8 to 256. Default: 16, in int8 and fp8 32. In
        int4, int2 and mixed always 32.
    dtype, device
        Of keys and values.
    kv_dtype : "auto", "int8", "fp8", "int4", "int2" or as "mixed3"
        How pages hold them: as they are, or quantised (docs/bits.md), for which ``dtype`` must be
        float16 or bfloat16.
    has_biases : bool
        Whether each entry has a bias, which attend adds to its logit; only with "auto".
    value_dim : int, optional
        Width of the values, if it is another one than that of keys; not in int4 and int2.

    Raises
    ------
    ValueError
        For sizes that make no sense.
    adakv.Error
        If the memory can't be had.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_sequences: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        max_row_pages: int,
        page_size: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        kv_dtype: str = "auto",
        has_biases: bool = False,
        value_dim: int | None = None,
    ) -> None:
        page_size = page_size_for(kv_dtype, page_size)
        device = device_of(device)
        num_layers = integer("num_layers", num_layers, 0)
        num_sequences = integer("num_sequences", num_sequences, 0)
        num_kv_heads = integer("num_kv_heads", num_kv_heads, 0)
        head_dim = integer("head_dim", head_dim, 0)
        value_dim = head_dim if value_dim is None else integer("value_dim", value_dim, 8, 256)
        dims = head_dim, value_dim
        kv_dtype = check_kv_dtype(kv_dtype, dtype, has_biases=has_biases, dims=dims)
        num_pages = integer("num_pages", num_pages, 0)
        max_row_pages = integer("max_row_pages", max_row_pages, 0)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype must be a torch.dtype, got {dtype!r}")
        self.num_layers = num_layers
        self.num_sequences = num_sequences
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.value_dim = value_dim
        self.num_pages = num_pages
        self.max_row_pages = max_row_pages
        self.page_size = page_size
        self.dtype = dtype
        self.kv_dtype = kv_dtype
        self.has_biases = has_biases
        self.device = device
        # Sequences whose pages went to layers as only the device knows.
        self._shared: set[int] = set()
        self._cache = _C.KVCache(
            num_layers=num_layers,
            num_sequences=num_sequences,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            page_size=page_size,
            num_pages=num_pages,
            max_row_pages=max_row_pages,
            dtype=str(dtype).removeprefix("torch."),
            **core_format(kv_dtype, head_dim),
            has_biases=has_biases,
            value_dim=value_dim,
            device_type=device.type,
            device_index=device.index or 0,
        )
        self._members: weakref.WeakSet[KVCache] = weakref.WeakSet([self])  # and its forks
        self._take_tensors()

    def _take_tensors(self) -> None:
        self.all_layers = Layer._make(self._cache.all_layers())
        # What all layers share is one tensor: compiled graphs take two for different memory.
        shared = {name: getattr(self.all_layers, name) for name in SHARED}
        self.layers = tuple(
            Layer._make(self._cache.layer(layer))._replace(**shared)
            for layer in range(self.num_layers)
        )

    all_layers: Layer
    """The tensors of all layers, with a leading L on all but those that are shared."""

    layers: tuple[Layer, ...]
    """The tensors of each layer, as the verbs take them."""

    def layer(self, layer: int) -> Layer:
        """The tensors of one layer."""
        return self.layers[layer]

    @property
    def plan_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Lengths, block table and fresh pages of all layers, as :func:`adakv.ops.plan` takes
        them."""
        return self.all_layers.lengths, self.all_layers.block_table, self.all_layers.fresh_pages

    def reserve(self, *, num_pages: int = 0, max_row_pages: int = 0) -> None:
        """Makes room for more pages, and keeps what the cache holds.

        What has to grow is copied to new memory: the pool takes twice its memory for a moment, so
        double rather than add a little. Tensors that the cache handed out before are stale (what
        all layers share if the pool grew, ``block_table`` if its rows did; they show the past, and
        what is written to them is lost): ask :meth:`layer` and
        :attr:`plan_inputs` again. CUDA graphs that were recorded with them must be recorded again.

        Parameters
        ----------
        num_pages : int
            Pages that the pool should have at least, see :meth:`pages_to_grow`.
        max_row_pages : int
            Pages that a row should have room for at least, see :meth:`row_pages_to_grow`.

        Raises
        ------
        adakv.Error
            If the memory can't be had. Nothing changes.
        """
        self._cache.reserve(num_pages, max_row_pages)
        self.max_row_pages = max(self.max_row_pages, int(max_row_pages))
        for member in self._members:  # the pool is that of all of them
            member.num_pages = max(member.num_pages, int(num_pages))
            member._take_tensors()

    def begin(
        self, layer: int, totals: Sequence[int], longest: Sequence[int], *, first_sequence: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Takes the pages for what some sequences keep of their prompts in a layer.

        Parameters
        ----------
        layer : int
        totals : ints
            Most entries that sequence ``first_sequence + i`` keeps, over all its rows.
        longest : ints
            Most entries that one of its rows keeps; the prompt's length will do.

        Returns
        -------
        page_ids, page_indptr : ``[Q]`` and ``[len(totals) + 1]`` int32, on the cache's device
            As :func:`adakv.ops.compact` takes them.

        Raises
        ------
        adakv.Error
            If there are too few free pages; names how many are needed and free. Nothing changes.
        ValueError
            If a sequence holds entries in this layer already. Nothing changes.
        """
        page_ids, page_indptr = self._cache.begin(layer, first_sequence, totals, longest)
        both = torch.tensor(page_indptr + page_ids, dtype=torch.int32).to(
            self.device, non_blocking=True
        )
        return both[len(page_indptr) :], both[: len(page_indptr)]

    def begin_layers(
        self,
        layers: Sequence[int],
        totals: Sequence[Sequence[int]],
        longest: Sequence[int],
        *,
        first_sequence: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`begin` for layers of which only the device knows how much each one keeps.

        A model-wide policy keeps K entries of a prompt in all layers together. Over L * Hkv rows
        they fill at most ``K // P + L * Hkv`` pages, however they lie, and every row needs a fresh
        page besides. The host takes that many; the device deals them out, each layer from where the
        one before stopped.

        Parameters
        ----------
        layers : ints
            One, or those whose entries were chosen together.
        totals : ints ``[len(layers)][B]``
            As :meth:`adakv.Policy.totals` counts them.
        longest, first_sequence : ints ``[B]``, and int
            As in :meth:`begin`.

        Returns
        -------
        page_ids, next_page : ``[Q]`` and ``[B + 1]`` int32, on the cache's device
            As :func:`adakv.ops.compact` takes them for the first layer; :meth:`advance_pages` makes
            them those of the next.
        """
        taken = []  # of each layer, the [Q] pages of each sequence
        for layer, counts in zip(layers, totals, strict=True):
            most = [min(pair) for pair in zip(counts, longest, strict=True)]
            page_ids, page_indptr = self.begin(layer, counts, most, first_sequence=first_sequence)
            if len(layers) == 1:
                return page_ids, page_indptr
            sizes = [
                self.pages_for(n, 0, num_kv_heads=self.num_kv_heads, page_size=self.page_size)
                for n in counts
            ]
            taken.append(torch.split(page_ids, sizes))
        self._shared.update(range(first_sequence, first_sequence + len(longest)))
        pages = [torch.cat(sequence) for sequence in zip(*taken, strict=True)]
        ends = torch.tensor([0, *map(len, pages)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return torch.cat(pages), ends.to(self.device, non_blocking=True)

    def begin_again(
        self, totals: Sequence[Sequence[int]], longest: Sequence[int], *, first_sequence: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The pages for what some sequences keep of all that they hold, in every layer.

        They are the sequences' own as far as possible; free ones come to them only where hardly
        anything leaves. The others are free at once, and hold their entries until the next call
        that takes pages: compact every layer before, in place or from a copy. After
        :meth:`begin_layers` only the device knows which layer has which pages, and all are free
        ones.

        Parameters
        ----------
        totals : ints ``[L][B]``
            Most entries that sequence ``first_sequence + i`` keeps in each layer, over all its
            rows.
        longest : ints ``[B]``
            Most entries that one of its rows keeps.

        Returns
        -------
        page_ids, page_indptr : ``[Q]`` and ``[L, B + 1]`` int32, on the cache's device
            For each layer as :func:`adakv.ops.compact` takes them.

        Raises
        ------
        adakv.Error
            If there are too few free pages. Nothing changes.
        ValueError
            If a sequence holds nothing. Nothing changes.
        """
        sequences = range(first_sequence, first_sequence + len(longest))
        own_pages = self._shared.isdisjoint(sequences)
        pages = bytearray(self._cache.begin_again(first_sequence, totals, longest, own_pages))
        self._shared.difference_update(sequences)
        both = torch.frombuffer(pages, dtype=torch.int32).to(self.device, non_blocking=True)
        num_starts = self.num_layers * (len(longest) + 1)
        return both[num_starts:], both[:num_starts].view(self.num_layers, -1)

    def num_owned(self, layer: int, first_sequence: int = 0) -> list[int]:
        """Pages that sequences own in a layer, from ``first_sequence`` on; 0 if they are shared."""
        sequences = range(first_sequence, self.num_sequences)
        return [0 if b in self._shared else int(self._cache.num_pages(layer, b)) for b in sequences]

    def advance_pages(self, next_page: Tensor, lengths: Tensor) -> None:
        """Moves ``next_page`` of :meth:`begin_layers` past the pages of a layer that was compacted
        to ``lengths`` ``[B, Hkv]``."""
        pages = (lengths + self.page_size - 1) // self.page_size + 1  # and the fresh one
        next_page[:-1] += pages.sum(1, dtype=torch.int32)

    def grow(self, num_new: Sequence[int], columns: int) -> int:
        """Makes room for new tokens in all layers, before they are appended.

        Parameters
        ----------
        num_new : ints
            Tokens that come for each sequence: the last ``num_new[b]`` of ``columns``
            (right-aligned).
        columns : int
            Width of the batch of new tokens.

        Returns
        -------
        now : int
            How many columns, from the left, may be appended now. Append them in every layer, then
            call again for the rest.

        Raises
        ------
        adakv.Error
            If there are too few free pages for all of the tokens; names how many are needed and
            free. Nothing changes.
        """
        return int(self._cache.grow(num_new, columns))

    def fork(
        self, sources: Sequence[int], *, back: Sequence[int] = (), whole: bool = False
    ) -> KVCache:
        """A cache of the sequences ``sources`` of this one, as branches of their texts.

        They share pages, which are counted: a row has for itself what it may still write to, its
        last page and its fresh one. Both caches have one pool, and are for one thread at a time.

        Parameters
        ----------
        sources : ints
            A sequence may be named several times, or not at all.
        back : ints, optional
            Newest tokens of each of them that stay behind; not in int4 and int2.
        whole : bool
            All pages are copied, and nothing is shared; which :meth:`begin_again` needs.

        Raises
        ------
        adakv.Error
            If there are too few free pages, see :meth:`pages_to_fork`. Nothing changes.
        """
        made, given = self._cache.fork(sources, back, whole)
        fork = copy.copy(self)
        fork._cache, fork.num_sequences = made, len(sources)
        is_dealt = whole and not self._shared.isdisjoint(sources)
        fork._shared = {i for i, b in enumerate(sources) if is_dealt or b in self._shared}
        self._members.add(fork)
        fork._take_tensors()
        fill(self, fork.layers, given, sources, back=back, whole=whole, is_dealt=is_dealt)
        return fork

    def fork_into(self, first_sequence: int, sources: Sequence[int]) -> None:
        """:meth:`fork`, but the branches become sequences of this cache, from ``first_sequence``
        on, which must be empty.

        Parameters
        ----------
        first_sequence : int
            The first branch's; the others follow it.
        sources : ints
            Sequences of this cache, a branch of each.

        Raises
        ------
        adakv.Error
            If there are too few free pages. Nothing changes.
        ValueError
            If one of them holds entries. Nothing changes.
        """
        given = self._cache.fork_into(first_sequence, sources, (), False)
        slots = slice(first_sequence, first_sequence + len(sources))
        self._shared |= {first_sequence + i for i, b in enumerate(sources) if b in self._shared}
        branches = [sequences(layer, slots) for layer in self.layers]
        fill(self, branches, given, sources, back=(), whole=False, is_dealt=False)

    def pages_to_fork(self, sources: Sequence[int], *, whole: bool = False) -> int:
        """Pages that have to be free for :meth:`fork` of ``sources``, ``whole`` or not."""
        return int(self._cache.pages_to_fork(sources, whole))

    def shares_pages(self, sequence: int) -> bool:
        """Whether a page of a sequence is one of another sequence, too."""
        return bool(self._cache.is_shared(sequence))

    def pages_to_grow(self, num_new: Sequence[int]) -> int:
        """Pages that have to be free for appending ``num_new[b]`` tokens to each sequence b."""
        return int(self._cache.pages_to_grow(num_new))

    def row_pages_to_grow(self, num_new: Sequence[int]) -> int:
        """What ``max_row_pages`` has to be for appending ``num_new[b]`` tokens to each sequence b:
        pages that the longest row may need."""
        return int(self._cache.row_pages_to_grow(num_new))

    @staticmethod
    def pages_for(total: int, new_tokens: int, *, num_kv_heads: int, page_size: int = 16) -> int:
        """Pages that one sequence takes in one layer.

        For ``total`` entries of its prompt, however they are spread over the ``num_kv_heads``
        rows, and for ``new_tokens`` tokens after it; a page holds ``page_size`` entries. Raises
        ``ValueError`` for numbers that make no sense.
        """
        try:
            return _C.KVCache.pages_for(total, new_tokens, num_kv_heads, page_size)
        except ValueError:  # which has the names of the C++ side
            return _C.KVCache.pages_for(
                integer("total", total, 0),
                integer("new_tokens", new_tokens, 0, _MOST),
                integer("num_kv_heads", num_kv_heads, 1, _MOST),
                check_page_size(page_size),
            )

    def lengths(self, slots: slice = slice(None)) -> Tensor:
        """``[L, B, Hkv]`` int32 on the CPU: entries of the rows of the sequences in ``slots``."""
        return self.all_layers.lengths[:, slots].cpu()

    @property
    def parts(self) -> tuple[KVCache, ...]:
        """The caches of which it consists, as :class:`adakv.devices.SplitCache` has several."""
        return (self,)

    def positions(self, layer: int, slots: slice = slice(None)) -> list[list[Tensor]]:
        """Positions that a layer holds: per sequence and kv head ``[length]`` int32 on the CPU, as
        they lie in its slots."""
        view = sequences(self.layer(layer), slots)
        table, lengths = view.block_table.cpu(), view.lengths.tolist()
        positions = view.page_positions.cpu()
        return [
            [
                positions[table[b, h, : -(-length // self.page_size)]].flatten()[:length]
                for h, length in enumerate(row)
            ]
            for b, row in enumerate(lengths)
        ]

    def remove(self, sequence: int) -> None:
        """Gives all pages of a sequence back and empties its rows."""
        self._cache.remove(sequence)
        self._shared.discard(sequence)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: keys, values and positions, scales and biases if there are any."""
        return int(self._cache.page_bytes)

    @property
    def tail_bytes(self) -> int:
        """Bytes that a sequence takes beside its pages: the 16-bit tails of its rows in int4 and
        int2."""
        return int(self._cache.tail_bytes)

    @property
    def table_bytes(self) -> int:
        """Bytes of a sequence's rows in block tables, lengths and what else is counted by row."""
        layers = self.all_layers
        rows = (layers.block_table, layers.lengths, layers.seen, layers.fresh_pages)
        return sum(table.numel() * table.itemsize for table in rows) // self.num_sequences

    @property
    def bytes_used(self) -> int:
        """Bytes of what sequences own: their pages, and the tails of those that hold anything."""
        return int(self._cache.bytes_used)

    @property
    def pages_used(self) -> int:
        """Pages that are owned by sequences."""
        return int(self._cache.num_used)

    @property
    def num_free(self) -> int:
        """Pages that are free."""
        return int(self._cache.num_free)


def sequences(layer: Layer, slots: slice) -> Layer:
    """Some of the sequences of a layer."""
    rows = {name: getattr(layer, name) for name in _ROWS}
    return layer._replace(**{name: x[slots] for name, x in rows.items() if x is not None})
