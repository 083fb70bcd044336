"""Pages of a model whose layers are spread over several devices: each layer's lie where it does.

    groups_of(devices)       which layers share a device
    SplitCache               a KVCache for each group, under one roof
    grow_step, FirstSlots    a step over all layers, planned on each device for its own

Tables, lengths and free pages are those of each device. What a prompt or a step needs of the others
are numbers of the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adakv.basis import Basis
from adakv.cache import KVCache, sequences
from adakv.ops import Layer
from adakv.room import make_room
from adakv.step import Attention, PageReader, PlannedStep, Watcher
from adakv.tensors import on_device
from adakv.tiered_cache import TieredCache


class Group(NamedTuple):
    """Layers that share a device."""

    device: torch.device
    layers: tuple[int, ...]


def groups_of(devices: Sequence[torch.device]) -> tuple[Group, ...]:
    """The layers of each device, in the order in which a model comes to the devices; nothing if
    all are on one."""
    different = dict.fromkeys(devices)
    if len(different) == 1:
        return ()
    return tuple(
        Group(device, tuple(i for i, x in enumerate(devices) if x == device))
        for device in different
    )


def check_together(groups: Sequence[Group], wanted: object) -> None:
    """Raises ``ValueError`` if something is ``wanted`` that layers on several devices can't do:
    choosing again from texts, or reading some of the pages."""
    if groups and wanted is not None:
        places = ", ".join(str(group.device) for group in groups)
        raise ValueError(
            "decode_budget, chunk_budget and read need all layers with full attention on one "
            f"device, got {places}"
        )


class SplitCache:
    """Layers whose pages lie in several :class:`adakv.cache.KVCache`.

    What it has in common with one cache has the same names there. A part that is too small for what
    its layers keep grows: how much of the model's budget they get is known when they get it.

    Parameters
    ----------
    groups : :class:`Group`, one for each part
        All layers of the model, each once.
    parts : :class:`adakv.cache.KVCache`, one for each group
    """

    def __init__(self, groups: Sequence[Group], parts: Sequence[KVCache]) -> None:
        self.parts = tuple(parts)
        places = {
            layer: (part, index)
            for part, group in enumerate(groups)
            for index, layer in enumerate(group.layers)
        }
        if sorted(places) != list(range(sum(part.num_layers for part in parts))):
            raise ValueError(f"groups must have every layer once, got {[x.layers for x in groups]}")
        self.places = tuple(places[layer] for layer in range(len(places)))
        """Part and place in it of each layer."""
        first = self.parts[0]
        self.num_layers = len(self.places)
        self.num_sequences, self.num_kv_heads = first.num_sequences, first.num_kv_heads
        self.head_dim, self.value_dim = first.head_dim, first.value_dim
        self.dtype, self.kv_dtype = first.dtype, first.kv_dtype
        self.page_size, self.page_bytes = first.page_size, first.page_bytes
        self.device = first.device
        """That of the first layer."""
        self._layers: tuple[Layer, ...] = ()
        self._made_of: list[tuple[Layer, ...]] = []

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The tensors of each layer; the same tuple until a part has grown."""
        of_parts = [part.layers for part in self.parts]
        is_new = len(self._made_of) != len(of_parts) or any(
            a is not b for a, b in zip(self._made_of, of_parts, strict=True)
        )
        if is_new:
            self._made_of = of_parts
            self._layers = tuple(of_parts[part][index] for part, index in self.places)
        return self._layers

    def begin_layers(
        self,
        layers: Sequence[int],
        totals: Sequence[Sequence[int]],
        longest: Sequence[int],
        *,
        first_sequence: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`KVCache.begin_layers`, of one layer: a device has no pages for another's."""
        (layer,) = layers
        place, index = self.places[layer]
        part = self.parts[place]
        needed = sum(
            part.pages_for(n, 0, num_kv_heads=self.num_kv_heads, page_size=self.page_size)
            for n in totals[0]
        )
        if needed > part.num_free:
            part.reserve(num_pages=part.num_pages + needed - part.num_free)
        return part.begin_layers([index], totals, longest, first_sequence=first_sequence)

    def grow(self, num_new: Sequence[int], columns: int) -> int:
        """As :meth:`KVCache.grow`, for one column; a part that has too few pages gets more."""
        self._make_room(num_new)
        return min(part.grow(num_new, columns) for part in self.parts)

    def _make_room(self, num_new: Sequence[int]) -> None:
        """Has parts grow: what was meant for texts may have gone to layers that keep much."""
        for part in self.parts:
            make_room(part, num_new)

    def reserve(self, *, num_pages: int = 0, max_row_pages: int = 0) -> None:
        """As :meth:`KVCache.reserve`: each part has its layers' share of the pages at least."""
        for part in self.parts:
            share = -(-num_pages * part.num_layers // self.num_layers)
            part.reserve(num_pages=share, max_row_pages=max_row_pages)

    def lengths(self, slots: slice = slice(None)) -> Tensor:
        """As :meth:`KVCache.lengths`."""
        of_parts = [part.lengths(slots) for part in self.parts]
        return torch.stack([of_parts[part][index] for part, index in self.places])

    def positions(self, layer: int, slots: slice = slice(None)) -> list[list[Tensor]]:
        """As :meth:`KVCache.positions`."""
        part, index = self.places[layer]
        return self.parts[part].positions(index, slots)

    def remove(self, sequence: int) -> None:
        """Gives all pages of a sequence back and empties its rows."""
        for part in self.parts:
            part.remove(sequence)

    @property
    def num_pages(self) -> int:
        """Pages of all pools."""
        return sum(part.num_pages for part in self.parts)

    @property
    def bytes_used(self) -> int:
        """Bytes of what sequences own."""
        return sum(part.bytes_used for part in self.parts)

    @property
    def pages_used(self) -> int:
        """Pages that are owned by sequences."""
        return sum(part.pages_used for part in self.parts)


AnyCache = KVCache | SplitCache | TieredCache

#: Layers and tables of some sequences.
_Rows = tuple[tuple[Layer, ...], tuple[Tensor, Tensor, Tensor]]


class SplitStep:
    """A step whose work has been shared out on each device."""

    def __init__(
        self, kv: SplitCache, steps: Sequence[PlannedStep], watcher: Watcher | None = None
    ) -> None:
        self._places, self._steps, self._watcher = kv.places, steps, watcher

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, attention: Attention
    ) -> Tensor:
        """As :meth:`PlannedStep.attend`."""
        if self._watcher is not None:
            self._watcher.put(layer, queries)
        part, index = self._places[layer]
        return self._steps[part].attend(index, queries, keys, values, attention)


def grow_step(
    kv: AnyCache,
    num_new: Sequence[int],
    columns: int,
    *,
    watcher: Watcher | None = None,
    reader: PageReader | None = None,
    slots: slice = slice(None),
) -> PlannedStep | SplitStep:
    """:meth:`PlannedStep.grow`, on all devices; a reader of pages and ``slots`` want one device."""
    if isinstance(kv, KVCache):
        return PlannedStep.grow(kv, num_new, columns, watcher=watcher, reader=reader, slots=slots)
    if isinstance(kv, TieredCache):
        basis, behind = _of_tiers(kv, slots)
        return PlannedStep.grow(
            kv.first,
            num_new,
            columns,
            watcher=watcher,
            others=_planned_behind(behind),
            basis=basis,
            slots=slots,
        )
    kv._make_room(num_new)
    steps = [PlannedStep.grow(part, num_new, columns) for part in kv.parts]
    return SplitStep(kv, steps, watcher)


def _of_slots(kv: KVCache, slots: slice) -> _Rows:
    """Layers and tables of some sequences, as :meth:`PlannedStep.plan` takes them."""
    lengths, block_table, fresh_pages = (table[:, slots] for table in kv.plan_inputs)
    return tuple(sequences(x, slots) for x in kv.layers), (lengths, block_table, fresh_pages)


def _of_tiers(
    kv: TieredCache, slots: slice
) -> tuple[Basis | None, list[tuple[_Rows, Basis | None]]]:
    """What rows of some sequences hold of entries in the first tier; in each of those behind it the
    rows, and what they hold."""
    first, *behind = (
        None if basis is None else basis.of((slice(None), slots)) for basis in kv.bases
    )
    rows = (_of_slots(cache, slots) for cache in kv.caches[1:])
    return first, list(zip(rows, behind, strict=True))


def _planned_behind(tiers: Iterable[tuple[_Rows, Basis | None]]) -> list[PlannedStep]:
    """What a step attends to in the tiers behind the first one."""
    return [PlannedStep.plan(*rows, new_tokens=0, basis=basis) for rows, basis in tiers]


class FirstSlots:
    """The first slots of a cache, whose steps of one token each are planned again and again."""

    def __init__(self, kv: AnyCache, count: int) -> None:
        self._kv, slots = kv, slice(0, count)
        self._parts = [(part.device, *_of_slots(part, slots)) for part in kv.parts]
        self._basis: Basis | None = None
        self._behind: list[tuple[_Rows, Basis | None]] = []
        if isinstance(kv, TieredCache):
            self._basis, self._behind = _of_tiers(kv, slots)

    def plan(
        self, num_new: Tensor, watcher: Watcher | None, reader: PageReader | None = None
    ) -> PlannedStep | SplitStep:
        """A step in which each sequence has ``num_new`` ``[B]`` tokens; a ``reader`` is for caches
        on one device."""
        if isinstance(self._kv, KVCache):
            ((_, layers, tables),) = self._parts
            return PlannedStep.plan(layers, tables, num_new=num_new, watcher=watcher, reader=reader)
        if isinstance(self._kv, TieredCache):
            ((_, layers, tables),) = self._parts
            others = _planned_behind(self._behind)
            return PlannedStep.plan(
                layers, tables, num_new=num_new, others=others, basis=self._basis
            )
        steps = [
            PlannedStep.plan(layers, tables, num_new=on_device(num_new, device))
            for device, layers, tables in self._parts
        ]
        return SplitStep(self._kv, steps, watcher)
