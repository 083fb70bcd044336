"""Decoding the sequences of a shared cache together, one token each a step.

    begin(slot, ...)     a prompt is in the slot: chooses its first token
    grow()               pages for the next step
    step(width)()        plan, the model's forward, choosing; over the first slots
    end(slot)            the pages go back, the slot is empty

A :class:`Step` is a function of tensors that stay where they are: nothing in it waits for the
device, and no Python state is another after it. So it can be recorded in a CUDA graph, or compiled
as one graph, and run again while sequences come, grow and go. All else is done by the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache as TransformersCache
from transformers import PreTrainedModel

from adakv.cache import KVCache
from adakv.devices import AnyCache, FirstSlots, SplitStep
from adakv.errors import Error
from adakv.hf.attachment import CACHE
from adakv.hf.layers import AttendingLayer, attention_of
from adakv.hf.sampling import Chooser
from adakv.page_history import recorded_reader_of
from adakv.policy.reads import Read
from adakv.recent import RecentQueries
from adakv.reselection import Reselection, Rule
from adakv.step import PageReader, PlannedStep

_UNIFORMS = 256  # numbers of a sequence that are drawn at a time


class Slots(NamedTuple):
    """What a step reads and writes beside the cache, for each of B slots.

    A slot without a sequence has ``num_new`` 0: a step changes nothing of it but ``tokens``.
    """

    tokens: Tensor  # [B, 1] int64    the newest
    positions: Tensor  # [B, 1] int64    where it stands in its sequence, for RoPE
    written: Tensor  # [B, 1] int64    how many there are after the prompt
    num_new: Tensor  # [B, 1] int32    1 if there is a sequence
    uniforms: Tensor  # [B, U] float64    numbers in [0, 1) to choose the next U of them by


class Slot(NamedTuple):
    """What a sequence takes with it when it leaves its slot."""

    rows: Slots  # its own, without the B
    generator: torch.Generator | None
    num_used: int  # of its newest numbers
    seen: int  # tokens that went by


class Decoder:
    """Sequences in the slots of a cache.

    Parameters
    ----------
    model : PreTrainedModel
        Under :func:`adakv.attach` whenever it decodes.
    kv : :class:`adakv.cache.KVCache`
        With a layer for each of the model's. A prompt comes in by :meth:`adakv.Cache.fill`.
    sampling : :class:`Chooser`
        Most often a :class:`adakv.hf.sampling.Sampling`.
    rule : :class:`adakv.reselection.Rule`, optional
        By which texts are evicted from while they are written.
    read : :class:`adakv.policy.Read`, optional
        Which pages of a row a step reads.

    Raises
    ------
    ValueError
        For a read whose steps can't be recorded, or of layers on several devices.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kv: AnyCache,
        sampling: Chooser,
        rule: Rule | None = None,
        read: Read | None = None,
    ) -> None:
        def zeros(columns: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(kv.num_sequences, columns, dtype=dtype, device=kv.device)

        self.model = model
        self.kv = kv
        self._sampling = sampling
        self._num_new = [0] * kv.num_sequences  # slots.num_new, known to the host
        self._num_used = [0] * kv.num_sequences  # of their newest numbers
        self._generators: dict[int, torch.Generator] = {}  # by slot
        self._texts: dict[int, Reselection] = {}  # that are chosen from, by slot
        self._seen = [0] * kv.num_sequences  # tokens of their sequences
        self._reader = None if read is None else recorded_reader_of(read, kv)
        self._queries = None
        if rule is not None:
            assert isinstance(kv, KVCache)
            self._queries = SlotQueries(model, kv, rule.num_queries)
        self.slots = Slots(
            tokens=zeros(1, torch.int64),
            positions=zeros(1, torch.int64),
            written=zeros(1, torch.int64),
            num_new=zeros(1, torch.int32),
            uniforms=zeros(_UNIFORMS, torch.float64),
        )

    def begin(
        self,
        slot: int,
        logits: Tensor,
        position: int,
        generator: torch.Generator | None = None,
        text: Reselection | None = None,
    ) -> None:
        """A prompt is in the slot: chooses its first token, which will stand at ``position``.

        ``logits`` ``[V]`` are those of its last token. Chance comes from ``generator``, a CPU's, of
        which the sequence's token i takes number i; without one nothing is left to chance. ``text``
        is what comes behind the prompt, if there is a rule for it.
        """
        if text is not None:
            self._listen(text, slice(slot, slot + 1))
        mine = Slots(*(tensor[slot] for tensor in self.slots))
        if generator is not None:
            self._generators[slot] = generator
            self._draw(slot)
        mine.tokens[:] = self._sampling.choose(logits[None], mine.uniforms[:1])
        mine.positions[:] = position
        mine.written[:] = 1
        mine.num_new[:] = 1
        self._num_new[slot] = 1
        self._num_used[slot] = 1
        self._begin_reading(slot, position)

    def _begin_reading(self, slot: int, seen: int) -> None:
        """The slot holds another sequence."""
        self._seen[slot] = seen
        if self._reader is not None:
            self._reader.forget(slice(slot, slot + 1))

    def take_over(self, seen: Sequence[int], text: Reselection | None = None) -> None:
        """All slots hold sequences, of so many tokens; their newest ones are still to be given.

        They may have a text in common, until :meth:`hand_back`.
        """
        self.slots.positions[:, 0] = torch.tensor(seen)
        self.slots.num_new.fill_(1)
        self._num_new, self._seen = [1] * len(seen), list(seen)
        if text is not None:
            assert isinstance(text.recent, RecentQueries) and self._queries is not None
            self._queries.fill(text.recent.all_layers(), self.slots.positions)
            self._listen(text, slice(0, len(seen)))

    def hand_back(self) -> None:
        """Gives the text of :meth:`take_over`, if there is one, its newest queries."""
        for text in self._texts.values():
            assert self._queries is not None
            count, recent = self._queries.window, text.recent
            layers = [recent.last(layer, count) for layer in range(self.kv.num_layers)]
            text.recent = RecentQueries(count, len(layers), layers)

    def _listen(self, text: Reselection, slots: slice) -> None:
        """A text is chosen from by the queries of some slots."""
        assert self._queries is not None
        text.recent = QueriesOfSlots(self._queries, slots, self.slots.positions[slots])
        self._texts[slots.start] = text

    def end(self, slot: int) -> None:
        """Gives the slot's pages back."""
        self.kv.remove(slot)
        self.slots.num_new[slot] = 0
        self.slots.written[slot] = 0
        self._num_new[slot] = 0
        self._generators.pop(slot, None)
        self._texts.pop(slot, None)

    def take_out(self, slot: int) -> Slot:
        """:meth:`end`, but the sequence will go on: :meth:`put_back`. It has no text that is chosen
        from."""
        rows = Slots(*(tensor[slot].clone() for tensor in self.slots))
        left = Slot(rows, self._generators.get(slot), self._num_used[slot], self._seen[slot])
        self.end(slot)
        return left

    def put_back(self, slot: int, left: Slot) -> None:
        """The sequence goes on, in an empty slot that holds its entries."""
        for tensor, row in zip(self.slots, left.rows, strict=True):
            tensor[slot] = row
        self._num_new[slot], self._num_used[slot] = 1, left.num_used
        self._begin_reading(slot, left.seen)
        if left.generator is not None:
            self._generators[slot] = left.generator

    def _draw(self, slot: int) -> None:
        """The next numbers of a sequence."""
        self.slots.uniforms[slot] = torch.rand(
            _UNIFORMS, generator=self._generators[slot], dtype=torch.float64
        )

    def grow(self) -> None:
        """Makes room for the next step of all sequences.

        Raises
        ------
        adakv.Error
            If there are too few free pages. Nothing changes.
        """
        self.kv.grow(self._num_new, 1)
        if self._reader is not None:
            assert isinstance(self.kv, KVCache)  # others have no reader
            self._reader.begin_step(self.kv, self._seen, self._num_new, 1)
        self._seen = [n + new for n, new in zip(self._seen, self._num_new, strict=True)]
        for slot in self._generators:
            if self._num_used[slot] == _UNIFORMS:
                self._draw(slot)
                self._num_used[slot] = 0
            self._num_used[slot] += 1
        for text in self._texts.values():
            text.begin_step([1] * text.num_sequences, 1)

    def end_step(self) -> bool:
        """Chooses from the texts for which it is time, and says whether there is one.

        Raises
        ------
        adakv.Error
            If there is no memory for what stays. Nothing changes in that slot.
        """
        due = [slot for slot, text in self._texts.items() if text.is_due]
        for slot in due:
            text = self._texts[slot]
            assert isinstance(self.kv, KVCache)  # others have no rule
            slots = slice(slot, slot + text.num_sequences)
            text.choose(self.kv, slots)
            if self._reader is not None:
                self._reader.forget(slots)
        return bool(due)

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Steps change nothing meanwhile: to warm up, and to record one."""
        kept = [self.slots.tokens, self.slots.num_new]
        copies = [tensor.clone() for tensor in kept]
        self.slots.num_new.zero_()
        try:
            yield
        finally:
            for tensor, copy in zip(kept, copies, strict=True):
                tensor.copy_(copy)

    def step(self, width: int) -> Step:
        """The step of the first ``width`` slots."""
        slots = Slots(*(tensor[:width] for tensor in self.slots))
        queries = self._queries
        watcher = None if queries is None else StepQueries(queries, slots.positions)
        return Step(self.model, self.kv, self._sampling, slots, watcher, self._reader)


class SlotQueries:
    """The last W queries of every slot's text: that of position p is number p modulo W."""

    def __init__(self, model: PreTrainedModel, kv: KVCache, window: int) -> None:
        heads = model.config.get_text_config().num_attention_heads
        shape = kv.num_layers, kv.num_sequences, heads, window, kv.head_dim
        self.window = window
        self.rings = torch.zeros(shape, dtype=kv.dtype, device=kv.device).unbind()

    def fill(self, layers: Sequence[Tensor | None], positions: Tensor) -> None:
        """Takes the last W of each layer ``[B, Hq, W, D]``, which stand before ``positions``
        ``[B, 1]``."""
        places = _places(positions, self.window, self.window)
        for ring, newest in zip(self.rings, layers, strict=True):
            if newest is not None:
                ring.scatter_(2, places.expand_as(newest), newest)


def _places(positions: Tensor, count: int, window: int) -> Tensor:
    """``[B, 1, count, 1]``: numbers in a ring of those that stand before ``positions`` ``[B, 1]``,
    the oldest first."""
    behind = torch.arange(-count, 0, device=positions.device)
    return ((positions + behind) % window)[:, None, :, None]


class StepQueries(NamedTuple):
    """Where the first slots' queries of a step go, which stand at ``positions`` ``[B, 1]``."""

    queries: SlotQueries
    positions: Tensor

    def put(self, layer: int, queries: Tensor) -> None:
        """Those of a layer ``[B, Hq, 1, D]``."""
        place = (self.positions % self.queries.window)[:, None, :, None].expand_as(queries)
        self.queries.rings[layer][: len(queries)].scatter_(2, place, queries)


class QueriesOfSlots(NamedTuple):
    """The newest queries of some slots' text, whose next tokens will stand at ``positions``
    ``[B, 1]``."""

    queries: SlotQueries
    slots: slice
    positions: Tensor

    def advance(self, num_new: Sequence[int], columns: int) -> None:
        """Positions tell where queries go."""

    def put(self, layer: int, queries: Tensor) -> None:
        """Those of all slots come together: :class:`StepQueries`."""
        raise NotImplementedError

    def last(self, layer: int, count: int) -> Tensor:
        """The last ``count <= W``, ``[B, Hq, count, D]``, the oldest first."""
        ring = self.queries.rings[layer][self.slots]
        places = _places(self.positions, count, self.queries.window)
        return ring.gather(2, places.expand(*ring.shape[:2], count, ring.shape[3]))


class Step:
    """Appends the newest token of each of the first slots and chooses the next one."""

    def __init__(
        self,
        model: PreTrainedModel,
        kv: AnyCache,
        sampling: Chooser,
        slots: Slots,
        watcher: StepQueries | None = None,
        reader: PageReader | None = None,
    ) -> None:
        self._model = model
        self._sampling = sampling
        self._slots = slots
        self._cache = StepCache(kv, slots.num_new[:, 0], watcher, reader)
        # Models make no mask if they are given one; attend reads none.
        self._mask = slots.tokens[:, :, None, None].to(kv.dtype)

    def __call__(self) -> None:
        slots = self._slots
        self._cache.plan()
        output = self._model(
            input_ids=slots.tokens,
            attention_mask=self._mask,
            position_ids=slots.positions,
            use_cache=True,
            **{CACHE: self._cache},
        )
        self._cache.end_step()
        uniforms = slots.uniforms.gather(1, slots.written % _UNIFORMS)[:, 0]
        slots.tokens[:] = self._sampling.choose(output.logits[:, -1], uniforms)[:, None]
        slots.positions.add_(slots.num_new)
        slots.written.add_(slots.num_new)


class StepCache(TransformersCache):
    """The first slots of a cache, as a model's forward over one token of each takes them."""

    def __init__(
        self,
        kv: AnyCache,
        num_new: Tensor,
        watcher: StepQueries | None = None,
        reader: PageReader | None = None,
    ) -> None:
        self.step: PlannedStep | SplitStep | None = None  # that is running
        self.num_attended = 0  # layers, in this step
        self._num_new = num_new  # [B] int32
        self._watcher, self._reader = watcher, reader
        self._first = FirstSlots(kv, len(num_new))
        super().__init__(layers=[StepLayer(self, index) for index in range(kv.num_layers)])

    def plan(self) -> None:
        """Shares out the step's work, for all layers."""
        self.num_attended = 0
        self.step = self._first.plan(self._num_new, self._watcher, self._reader)

    def end_step(self) -> None:
        """Forgets the plan, which is good for one step.

        Raises ``adakv.Error`` if a layer did not attend to the keys that it was handed: then the
        model was detached meanwhile, and what it computed is worth nothing.
        """
        self.step = None
        if self.num_attended != len(self.layers):
            raise Error(
                f"{self.num_attended} of {len(self.layers)} layers attended to the cache in a "
                "step: the model was detached by somebody else"
            )


class StepLayer(AttendingLayer):
    """One layer of a :class:`StepCache`. Slots differ in length, so it gives none."""

    is_compileable = True

    def __init__(self, cache: StepCache, index: int) -> None:
        super().__init__()
        self._cache = cache
        self._index = index

    def attend(
        self,
        inner: str,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Appends and attends."""
        step = self._cache.step
        assert step is not None
        self._cache.num_attended += 1
        query, key = query.to(value.dtype), key.to(value.dtype)
        return step.attend(self._index, query, key, value, attention_of(kwargs)), None
