"""One planned step: new tokens of many sequences, through all layers of a model.

    step = PlannedStep.grow(kv, num_new, columns)    makes room and shares the work out, once
    out = step.attend(layer, q, k, v, attention)     in each layer, in order: appends and attends

Every adapter decodes through it: nothing else calls ``plan`` or ``attend``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from adakv import ops
from adakv.basis import Basis
from adakv.cache import KVCache, sequences
from adakv.ops import Layer, Tier


class Attention(NamedTuple):
    """How a layer attends, besides its queries, keys and values.

    ``scale`` (default ``1 / sqrt(D)``), ``softcap`` (default: none) and ``sink_logits`` ``[Hq]``
    float32, which join each softmax and attend to nothing (gpt-oss), are those of
    :func:`adakv.ops.attend`. ``rotate(x, positions)`` turns ``x`` ``[B, H, n, D]`` by the model's
    RoPE at ``positions`` ``[n]`` or ``[B, n]``, which may be negative; it is there for policies
    that need it, and so is ``w_o()``, the output projection's weight ``[E, Hq * D]``.
    """

    scale: float | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None
    rotate: Callable[[Tensor, Tensor], Tensor] | None = None
    w_o: Callable[[], Tensor] | None = None


class _Piece(NamedTuple):
    """Columns of a step that :meth:`KVCache.grow` made room for in one go."""

    columns: slice
    fresh_pages: Tensor  # [L, B, Hkv, F]
    num_new: Tensor | None  # [B] int32


class Watcher(Protocol):
    """What hears of the queries of steps, such as :class:`adakv.reselection.RecentQueries`."""

    def put(self, layer: int, queries: Tensor) -> None:
        """Those of a layer ``[B, Hq, S, D]``."""
        ...


class Listing(NamedTuple):
    """How many pages of a row ``shortlist`` lists in a step, by its arguments of these names; as
    :func:`adakv.ops.plan` takes them."""

    share: float
    least: int
    newest: int


class PageReader(Protocol):
    """What has a step read some pages of a row only, such as
    :class:`adakv.page_bounds.PageBounds`."""

    def forget(self) -> None:
        """Entries have moved."""
        ...

    def begin_step(
        self, kv: KVCache, seen: Sequence[int], num_new: Sequence[int], columns: int
    ) -> None:
        """A step of so many columns comes, the last ``num_new[b]`` of them tokens of sequence b, of
        which ``seen[b]`` have been there before; before room is made for it."""
        ...

    def reads_some(self, layer: int) -> bool:
        """Whether not all pages of a layer are read in this step."""
        ...

    @property
    def listing(self) -> Listing | None:
        """How many pages of each row of such layers are read, if that is known before the step:
        then all layers are planned at once. Otherwise each is when its pages are known."""
        return None

    def listed(
        self,
        layer: int,
        view: Layer,
        queries: Tensor,
        attention: Attention,
        num_new: Tensor | None,
    ) -> Layer:
        """The same layer with those pages of its rows that are read, for queries ``[B, Hq, S, D]``
        whose tokens it holds already: a block table and lengths of its own. The pages of the S
        newest entries are among them, and the last ones."""
        ...

    def mixed(self, layer: int, out: Tensor) -> Tensor:
        """``[B, Hq, S, D]``, what a layer attended to in what was listed, with whatever else it
        reads."""
        return out


class PlannedStep:
    """A step whose work has been shared out, to be attended to layer by layer.

    Made by :meth:`plan` or :meth:`grow`.

    Parameters
    ----------
    layers : one :class:`adakv.ops.Layer` for each layer
        Rows of the B sequences of the step, with room for its tokens.
    schedules : one ``[X]`` for each layer
        As :func:`adakv.ops.plan` gives them: by the reader's ``listing``, if it has one, where it
        reads some pages.
    num_new : ``[B]`` int32, optional
        How many of the step's S columns, counted from the right, are tokens of each sequence.
    watcher : :class:`Watcher`, optional
    reader : :class:`PageReader`, optional
        Without one all pages are read.
    others : :class:`PlannedStep`, optional
        Over entries of the same rows that lie elsewhere, in other tiers, to which nothing is
        appended: each planned with ``new_tokens=0``.
    basis : :class:`adakv.basis.Basis`, optional
        Of all layers: what the rows hold of each entry. Those that tokens are appended to have all
        channels, in an order of their own.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        schedules: Sequence[Tensor],
        num_new: Tensor | None = None,
        *,
        watcher: Watcher | None = None,
        reader: PageReader | None = None,
        others: Sequence[PlannedStep] = (),
        basis: Basis | None = None,
        _pieces: Sequence[_Piece] = (),
    ) -> None:
        self._layers, self._basis = layers, basis
        self.schedules = schedules
        self._num_new = num_new
        self._watcher, self._reader, self._others = watcher, reader, others
        self._pieces = _pieces

    @classmethod
    def plan(
        cls,
        layers: Sequence[Layer],
        tables: tuple[Tensor, Tensor, Tensor],
        *,
        new_tokens: int = 1,
        num_new: Tensor | None = None,
        out: Tensor | None = None,
        watcher: Watcher | None = None,
        reader: PageReader | None = None,
        others: Sequence[PlannedStep] = (),
        basis: Basis | None = None,
    ) -> PlannedStep:
        """Shares the work of a step of ``new_tokens`` columns out, for all layers at once.

        ``tables`` are the lengths ``[L, B, Hkv]``, block table ``[L, B, Hkv, M]`` and fresh pages
        ``[L, B, Hkv, F]`` of the ``layers``, int32. The schedules go into the first columns of
        ``out`` ``[L, X or more]`` if it is given, where a recorded CUDA graph reads them.
        """
        step: dict[str, Any] = {"new_tokens": new_tokens, "num_new": num_new}
        step["page_size"] = layers[0].pages.shape[2]
        if reader is None or reader.listing is None:
            schedules = ops.plan(*tables, **step)
        else:
            schedules = _planned_in_runs(tables, step, reader.listing, reader.reads_some)
        if out is not None:
            schedules = out[:, : schedules.shape[1]].copy_(schedules)
        heard: dict[str, Any] = {"watcher": watcher, "reader": reader, "others": others}
        return cls(layers, schedules.unbind(), num_new, basis=basis, **heard)

    @classmethod
    def grow(
        cls,
        kv: KVCache,
        num_new: Sequence[int],
        columns: int,
        *,
        watcher: Watcher | None = None,
        reader: PageReader | None = None,
        others: Sequence[PlannedStep] = (),
        basis: Basis | None = None,
        slots: slice = slice(None),
    ) -> PlannedStep:
        """Makes room for a step in all layers of a cache, and plans it.

        Parameters
        ----------
        kv : :class:`adakv.cache.KVCache`
        num_new : ints
            How many of the ``columns``, counted from the right, are tokens of each sequence. Where
            they are more than the fresh pages of a row take, they are appended in pieces.
        columns : int
            S, padding included.
        basis : :class:`adakv.basis.Basis`, optional
            Of all layers and the sequences of the step.
        slots : slice, optional
            Where the sequences lie in a cache that others share; their step leaves these alone.

        Raises
        ------
        adakv.Error
            If there are too few free pages. Nothing changes.
        """
        first, after, _ = slots.indices(kv.num_sequences)
        before, behind = [0] * first, [0] * (kv.num_sequences - after)
        layers, tables = kv.layers, kv.plan_inputs
        if before or behind:
            layers = tuple(sequences(layer, slots) for layer in layers)
            lengths, block_table, fresh_pages = (table[:, slots] for table in tables)
            tables = lengths, block_table, fresh_pages
        pieces: list[_Piece] = []
        left = columns
        while left:
            rest = [min(n, left) for n in num_new]
            now = kv.grow([*before, *rest, *behind], left)
            if now < columns:
                # The next piece's pages overwrite these before the other layers have used them.
                fresh = tables[2].clone()
                counts = _on_device([max(n - left + now, 0) for n in rest], now, kv)
                start = columns - left
                pieces.append(_Piece(slice(start, start + now), fresh, counts))
            left -= now
        of_step = _on_device(num_new, columns, kv)
        heard: dict[str, Any] = {"watcher": watcher, "others": others, "basis": basis}
        if pieces:
            return cls(layers, (), of_step, _pieces=pieces, **heard)
        heard["reader"] = reader
        return cls.plan(layers, tables, new_tokens=columns, num_new=of_step, **heard)

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, attention: Attention
    ) -> Tensor:
        """Appends keys and values ``[B, Hkv, S, D]`` to a layer, and attends.

        ``queries`` are ``[B, Hq, S, D]``, the result is ``[B, S, Hq, D]``.
        """
        if self._watcher is not None:
            self._watcher.put(layer, queries)
        view, schedule, is_listed, asked = self._layers[layer], None, False, queries
        if self._basis is not None:
            basis = self._basis.of(layer)
            asked, (keys, values) = basis.of_queries(queries), basis.of_entries(keys, values)
        if self._pieces:
            self._append_pieces(layer, keys, values)
        elif self._reader is not None and self._reader.reads_some(layer):
            place = view.pages.device  # most often that of the queries
            ops.append(keys.to(place), values.to(place), view, num_new=self._num_new)
            view = self._reader.listed(layer, view, queries, attention, self._num_new)
            is_listed = True
            if self._reader.listing is not None:
                schedule = self.schedules[layer]
        else:
            schedule = self.schedules[layer]
        appends = schedule is not None and not is_listed  # else rows hold the step's tokens already
        out, _ = ops.attend(
            asked,
            view,
            planned(view) if schedule is None else schedule,
            self._tiers(layer, queries, values.shape[3]) if self._others else (),
            keys=keys if appends else None,
            values=values if appends else None,
            num_new=self._num_new,
            sink_logits=attention.sink_logits,
            scale=attention.scale,
            softcap=attention.softcap,
            # Not right behind the plan, which comes before the first layer. (A compiler may move
            # it, but no further than there.)
            prefetch=schedule is not None and (layer > 0 or is_listed),
        )
        if is_listed:
            assert self._reader is not None
            out = self._reader.mixed(layer, out)
        if out.shape[3] > values.shape[3]:
            out = self._whole(layer, out, values.shape[3])
        return out.transpose(1, 2)

    def _tiers(self, layer: int, queries: Tensor, value_dim: int) -> list[Tier]:
        """The other tiers of a layer, with queries of their own where these see other dimensions.
        Coordinates of values come behind the ``value_dim`` columns of values."""
        tiers = []
        for step in self._others:
            asked, column = None if self._basis is None else queries, 0
            if step._basis is not None:
                basis = step._basis.of(layer)
                asked, column = basis.of_queries(queries), 0 if basis.values is None else value_dim
            tiers.append(Tier(step._layers[layer], step.schedules[layer], asked, column))
        return tiers

    def _whole(self, layer: int, out: Tensor, value_dim: int) -> Tensor:
        """Values and coordinates ``[B, Hq, S, Dv + Dw]`` together. Those of narrow tiers are the
        first ones of the widest."""
        found = [step._basis.of(layer) for step in self._others if step._basis is not None]
        widest = max(found, key=lambda basis: basis.keys.shape[-1])
        return out[..., :value_dim] + widest.whole(out[..., value_dim:])

    def _append_pieces(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Appends a step that was too wide for one go."""
        view = self._layers[layer]
        for columns, fresh_pages, num_new in self._pieces:
            piece = view._replace(fresh_pages=fresh_pages[layer])
            ops.append(keys[:, :, columns], values[:, :, columns], piece, num_new=num_new)


def _planned_in_runs(
    tables: tuple[Tensor, Tensor, Tensor],
    step: Mapping[str, Any],
    listing: Listing,
    reads_some: Callable[[int], bool],
) -> Tensor:
    """The schedules ``[L, X]`` of a step of which some layers read what is listed."""
    found, begin, lists = [], 0, [reads_some(layer) for layer in range(len(tables[0]))]
    for end in range(1, len(lists) + 1):
        if end < len(lists) and lists[end] == lists[begin]:
            continue
        lengths, block_table, fresh_pages = (table[begin:end] for table in tables)
        how = {**step, **(listing._asdict() if lists[begin] else {})}
        found.append(ops.plan(lengths, block_table, fresh_pages, **how))
        begin = end
    return torch.cat(found)


def planned(view: Layer) -> Tensor:
    """The schedule ``[X]`` of a layer that holds a step's tokens already."""
    tables = (x[None] for x in (view.lengths, view.block_table, view.fresh_pages))
    return ops.plan(*tables, new_tokens=0, page_size=view.pages.shape[2])[0]


def _on_device(num_new: Sequence[int], columns: int, kv: KVCache) -> Tensor | None:
    if all(n == columns for n in num_new):
        return None
    return torch.tensor(num_new, dtype=torch.int32, device=kv.device)
