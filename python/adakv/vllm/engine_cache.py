"""An engine's paged cache, described to the verbs: the worker's half, without a line of vLLM.

The engine hands out blocks. A block of one layer is one page of P entries for each kv head here:
page ``block * Hkv + h``. A whole request's row h has the h-th pages of its blocks. In a compressed
request, row h, which kept n entries, has pages of the first blocks, dealt row by row, and behind
them the h-th pages of the blocks behind the prompt (see plan.py)::

    row h = ceil(n / P) pages of blocks 0 .. kept_blocks - 1, page h of blocks tail, tail + 1, ...

so that new tokens follow the kept ones without a gap, and one ``attend`` reads both. (Where layers
keep unequally much, these are pages of all layers: see pages.py.) What has to be remembered of a
request is its boundary and the lengths ``n`` of its rows. Requests are known by their first block,
which they keep to their end.

Which prompts are compressed, and when, the scheduler says: in the step behind a prompt or later,
when blocks run short. Until then what the policy has to know of a prompt's queries is remembered.

    begin_step()   once a step, outside of the model: compresses requests whose prompt has ended,
                   and makes tables and schedules of all layers
    attend()       in each layer: append, attend; prompts that are being read see prompts.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from adakv.ops import Layer, append
from adakv.policy import PartwiseScorer, Policy, Protection
from adakv.reading import Part, Reader, compact
from adakv.reselection import Rule
from adakv.step import Attention, PlannedStep
from adakv.vllm.later import Later
from adakv.vllm.page_memory import Pages, entries_of
from adakv.vllm.pages import SharedPages, kept_of, kept_of_alike, spans_layers
from adakv.vllm.plan import Plan, Scheduler
from adakv.vllm.prompt_attention import Appended, FlashAttention, whole
from adakv.vllm.prompts import (
    READ_BY_TORCH,
    BlockBudget,
    Prompt,
    are_alike,
    classes_of,
    is_plain,
    read_by_torch,
)
from adakv.vllm.rows import Rows
from adakv.vllm.steps import Batch, Buffers, Group, Reading, Run, Step, Tables, equal_runs, sent
from adakv.vllm.tails import Tails
from adakv.vllm.texts import Texts


class EngineCache:
    """Rows of a group of layers whose blocks come from an engine.

    Parameters
    ----------
    policy : :class:`adakv.policy.Policy`
    budget : int
        Mean entries per kv head.
    pages : one :class:`adakv.vllm.page_memory.Pages` for each layer
        The engine's memory, ``N = num_blocks * num_kv_heads``; one memory, if the policy's layers
        keep unequally much (see pages.py).
    num_kv_heads : int
    attentions : one :class:`Attention` for each layer
    w_o : callable, optional
        ``w_o(layer)`` is the ``[E, Hq * D]`` weight of a layer's output projection, for policies
        with "w_o" in their :attr:`Policy.needs`.
    scheduler : :class:`Scheduler`, optional
    flash : :class:`FlashAttention`, optional
        Reads prompts; without it ``attend`` does.
    rule : :class:`adakv.reselection.Rule`, optional
        How texts are chosen from while they are written; not for pages of int4.
    num_requests : int
        Requests of a step at most, padding included. Only pages of int4 need it.
    """

    def __init__(
        self,
        policy: Policy,
        budget: int,
        pages: Sequence[Pages],
        *,
        num_kv_heads: int,
        attentions: Sequence[Attention],
        w_o: Callable[[int], Tensor] | None = None,
        scheduler: Scheduler | None = None,
        flash: FlashAttention | None = None,
        rule: Rule | None = None,
        num_requests: int = 0,
    ) -> None:
        self.block_size = pages[0].page_size
        self.num_kv_heads = num_kv_heads
        self.pages, self.num_layers = list(pages), len(pages)
        self.device = pages[0].entries.device
        self._rows = Rows(
            pages, num_kv_heads, spans_layers=spans_layers(policy), has_gaps=rule is not None
        )
        self._pages, self._integers = self._rows.pages, self._rows.integers
        self.boundaries, self.lengths = self._rows.boundaries, self._rows.lengths
        self._has_codes, is_int4 = pages[0].key_scales is not None, pages[0].is_int4
        self._tails = Tails(num_requests, pages, num_kv_heads) if is_int4 else None
        self._budget = BlockBudget(
            policy, budget, block_size=self.block_size, num_kv_heads=num_kv_heads
        )
        self._attentions, self._w_o = attentions, w_o
        self._are_alike = are_alike(policy, attentions)
        self._takes_parts = isinstance(policy.scorer, PartwiseScorer)
        self._torch_is_faster = (
            self.device.type == "cpu"
            and pages[0].entries.dtype == torch.bfloat16
            and all(map(is_plain, attentions))
        )
        self._scheduler, self._flash = scheduler or Scheduler(), flash
        self._seen = self._scheduler  # what it had of the prompts when this step began
        self.texts: Texts | None = None
        if rule is not None:
            given = self._rows, self._scheduler, attentions, w_o, pages[0].dtype
            self.texts = Texts(rule, *given)
        self.prompts: dict[int, Prompt] = {}  # that may be compressed, by request
        # What the layers of a step that a graph may replay could not observe.
        self._unobserved: Step | None = None
        self._kept: list[tuple[int, Later]] = []  # entries of a prompt, and how many are kept

    def begin_step(self, batch: Batch, buffers: Buffers | None = None) -> Step:
        """Compresses what has to be, and describes the rest of the step to the layers.

        Parameters
        ----------
        batch : :class:`Batch`
        buffers : :class:`Buffers`, optional
            From :meth:`buffers`: the step is described there, at addresses that a recorded CUDA
            graph reads. For steps of one token for each request.

        Raises
        ------
        adakv.Error
            If the scheduler knows of another boundary than the one found here.
        """
        self._observe_late()
        if self._tails is not None and all(name is None for name in self._names(batch)):
            # Nobody's tokens would lie where those of requests do that wait.
            batch = replace(batch, num_new=torch.zeros_like(batch.seq_lens))
        step = Step(queries=None if buffers is None else buffers.queries)
        if any(batch.is_prefilling) or self._may_be_compressed() or self.texts:
            self._follow_prompts(batch, step)
        without, copied = set(step.read_by_torch), []
        spans = enumerate(pairwise(batch.query_start))
        reads = [row for row, (begin, end) in spans if batch.is_prefilling[row] and begin != end]
        if self._flash is not None and reads and buffers is None:
            step.whole = whole(batch, reads)
            if self._has_codes:
                copied = list(equal_runs(batch, set(range(len(batch.computed))) - set(reads)))
            without |= set(reads)
        runs = list(equal_runs(batch, without))
        tails = self._arranged(batch, [*runs, *copied])
        for run, of_run in zip(runs, tails[: len(runs)], strict=True):
            planned = self._planned(batch, run, of_run, buffers)
            step.groups.append(Group(run.tokens, run.new_tokens, planned))
        if step.whole is not None and self._has_codes:
            tables = [self._rows.tables(batch, run.rows, run.new_tokens)[0] for run in copied]
            layers = map(self._rows.layers, tables, tails[len(runs) :])
            sizes = self.block_size, self.num_kv_heads
            appended = list(map(Appended, copied, layers))
            step.whole = step.whole.of_copies(batch, reads, appended, *sizes)
        if buffers is not None and (step.reading or step.asked):
            self._unobserved = step
        self._tell_kept()
        return step

    def buffers(self, num_requests: int, max_seq_len: int, num_q_heads: int) -> Buffers:
        """Memory for the tables of a step of up to so many requests of up to so many tokens, and
        for its queries."""
        rows = self.num_layers, num_requests, self.num_kv_heads
        tables = Tables(
            self._integers(*rows),
            self._integers(*rows, -(-max_seq_len // self.block_size)),
            self._integers(*rows, 1),
            self._integers(*rows[:2]),
        )
        shape = (*rows[:2], num_q_heads, self.pages[0].head_dim)
        queries = torch.zeros(shape, dtype=self.pages[0].dtype, device=self.device)

        def layers_of(tables: Tables) -> list[Layer]:
            places = slice(0, tables.seen.shape[1])
            tails = None if self._tails is None else self._tails.layers(places)
            return self._rows.layers(tables, tails)

        return Buffers(tables, layers_of, queries)

    def attend(
        self, layer: int, step: Step, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor
    ) -> None:
        """Appends a step's new tokens in one layer, and attends.

        Parameters
        ----------
        layer : int
        step : :class:`Step`
        queries, out : ``[tokens, Hq, D]``
        keys, values : ``[tokens, Hkv, D]``
        """
        attention = self._attentions[layer]
        for tokens, new_tokens, planned in step.groups:
            q, k, v = (
                x[tokens].unflatten(0, (-1, new_tokens)).transpose(1, 2)
                for x in (queries, keys, values)
            )
            out[tokens] = planned.attend(layer, q, k, v, attention).flatten(0, 1)
        if step.queries is not None:
            step.queries[layer, : len(queries)] = queries
            return
        if step.asked is not None and self.texts is not None:
            self.texts.put(step.asked, queries, layer)
        lse = None
        if step.whole is not None and self._flash is not None:
            pages = self._flash.append(layer, step.whole, self.pages[layer], keys, values)
            wants = self._takes_parts and is_plain(attention)
            given = pages, self.num_kv_heads, queries, out, attention
            lse = self._flash.attend(step.whole, *given, wants_lse=wants)
        for row, reading in step.reading.items():
            new = reading.tokens
            if row in step.read_by_torch:
                place = self.pages[layer], reading.page_ids, reading.length
                out[new] = read_by_torch(*place, queries[new], keys[new], values[new], attention)
            if lse is None or step.whole is None:
                self._observe(layer, reading, queries[new])
            else:
                self._observe(layer, reading, queries[new], lse[:, step.whole.of_row[row]])

    def _observe(
        self, layer: int, reading: Reading, queries: Tensor, lse: Tensor | None = None
    ) -> None:
        """Hands a prompt's new queries ``[n, Hq, D]`` to its reader, and ``lse`` ``[Hq, n]`` if
        attention gave it."""
        part = Part(
            queries.transpose(0, 1)[None],
            partial(self._entries, layer, reading.prompt, reading.page_ids, 0, reading.length),
            self._attentions[layer],
            self._w_o and partial(self._w_o, layer),
            None if lse is None else lse[None],
        )
        reading.prompt.reader.take(layer, part)

    def _entries(
        self, layer: int, prompt: Prompt, page_ids: Tensor, begin: int, end: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``[1, Hkv, n, D]`` of a whole request's tokens, from ``begin`` on, where
        a page begins, to ``end``; in pages ``[Hkv, blocks]``."""
        place = self.pages[layer], page_ids, end - begin
        if self._tails is None:
            return entries_of(*place)
        tail = self._tails.layers(self._tails.place(prompt.request))[layer]
        return entries_of(*place, tail, prompt.held - begin)

    def _observe_late(self) -> None:
        """Observes the queries of a step that may have been replayed from a graph."""
        step, self._unobserved = self._unobserved, None
        if step is None or step.queries is None:
            return
        for layer, queries in enumerate(step.queries):
            for reading in step.reading.values():
                self._observe(layer, reading, queries[reading.tokens])
        if step.asked is not None and self.texts is not None:
            self.texts.put(step.asked, step.queries)

    def _may_be_compressed(self) -> bool:
        """Whether a prompt may be compressed in this step."""
        if self._scheduler.has_orders and self.prompts:
            return True
        return not all(prompt.has_ended for prompt in self.prompts.values())

    def _follow_prompts(self, batch: Batch, step: Step) -> None:
        """Finds prompts that begin, go on, or have ended before this step."""
        self._forget_gone()
        first_blocks, requests = batch.block_table[:, 0], batch.requests
        if requests is None:
            requests = first_blocks.tolist()
        begins = [
            row
            for row, (begin, end) in enumerate(pairwise(batch.query_start))
            # Also a request that starts again after a preemption, or behind a cached prefix.
            if batch.is_prefilling[row]
            and begin != end
            and not self._goes_on(requests[row], batch.computed[row])
        ]
        if self.texts is not None:
            self.texts.forget(self._is_gone, [requests[row] for row in begins])
        if begins:
            names = first_blocks[sent(begins, self.device)]
            self.boundaries[names.long()] = 0
            prompt_names = Later(names)
            for index, row in enumerate(begins):
                reader = Reader(self._budget, self.num_layers, holds_entries=False)
                self.prompts[requests[row]] = Prompt(reader, requests[row], prompt_names, index)
            if batch.requests is None:
                self._forget_gone()
        others: dict[int, int] = {}  # requests by row
        for row, request in enumerate(requests):
            begin, end = batch.query_start[row : row + 2]
            if begin == end:
                continue
            if request not in self.prompts:
                others[row] = request
                continue
            blocks, computed = batch.block_table[row], batch.computed[row]
            if batch.is_prefilling[row]:
                length, prompt = computed + end - begin, self.prompts[request]
                prompt.reader.begin([length], length)
                prompt.held = length
                page_ids = self._page_ids(blocks, length)
                step.reading[row] = Reading(prompt, slice(begin, end), length, page_ids)
                if self._torch_is_faster and end - begin >= READ_BY_TORCH:
                    step.read_by_torch.add(row)
            elif computed > 0:  # otherwise it is no request, but a number that was one's
                self._obey(request, blocks, computed)
        if self.texts is not None:
            self.texts.choose(batch, others)
            step.asked = self.texts.ask(batch, requests)

    def _goes_on(self, request: int, computed: int) -> bool:
        """Whether a prompt is the one that was read so far as it."""
        prompt = self.prompts.get(request)
        return prompt is not None and not prompt.has_ended and prompt.reader.lengths == [computed]

    def _forget_gone(self) -> None:
        """Forgets prompts that no scheduler has, and keeps what it has of the others."""
        self._seen = self._scheduler.look([x.first_block for x in self.prompts.values()])
        for request, prompt in list(self.prompts.items()):
            if not self._seen.is_running(prompt.first_block):
                del self.prompts[request]

    def _is_gone(self, first_block: int) -> bool:
        return not self._scheduler.is_running(first_block)

    def _tell_kept(self) -> None:
        """Tells of compressions that are over, as far as nobody has to wait."""
        while self._kept and self._kept[0][1].is_here:
            entries, kept = self._kept.pop(0)
            self._scheduler.compressed(entries, *kept.tolist())

    def _page_ids(self, blocks: Tensor, length: int) -> Tensor:
        """``[Hkv, blocks]``: pages of a whole request's first ``length`` tokens."""
        head = torch.arange(self.num_kv_heads, device=self.device)[:, None]
        return blocks[: -(-length // self.block_size)].long() * self.num_kv_heads + head

    def _obey(self, request: int, blocks: Tensor, computed: int) -> None:
        """Does what the scheduler wants of a request whose prompt has ended."""
        prompt = self.prompts[request]
        prompt.has_ended, prompt.held = True, computed
        (boundary,) = prompt.reader.lengths
        order = self._seen.order(prompt.first_block, boundary, computed)
        is_for_later = order is not None and order.budget == 0 and not order.due
        if is_for_later or (order is not None and order.at != computed):
            return
        del self.prompts[request]
        if order is None:
            return
        budget = self._budget.changed(order)
        planned = None if order.budget == 0 else budget.plan(boundary)
        if planned is not None:
            protection = Protection.given(order.protected)
            prompt.reader.change(budget, protection, classes_of(order))
            self._compress(prompt, blocks, computed, planned)
        if order.due and self.texts is not None:
            self.texts.begin(request, prompt.first_block, boundary, order.due, planned)
        self._scheduler.done(prompt.first_block, boundary)

    def _compress(self, prompt: Prompt, blocks: Tensor, computed: int, planned: Plan) -> None:
        """Moves what is kept of a prompt into the request's first blocks, and what the request has
        written since then behind that."""
        reader, first_block = prompt.reader, prompt.first_block
        (boundary,) = reader.lengths
        page_ids = self._page_ids(blocks, boundary)
        tails, written = None, []
        if self._tails is not None:
            tails = self._tails.layers(self._tails.place(prompt.request))
            written = self._written(prompt, blocks) if computed > boundary else []
        totals = [sum(layer) for layer in reader.totals(self.num_kv_heads)]
        if self._tails is None:
            moved = []
            for layers in self._pages.together(boundary):
                if self._are_alike and len(layers) > 1:
                    kept = kept_of_alike(layers, reader, self._pages, page_ids)
                else:
                    kept = kept_of(layers, reader)
                most = sum(totals[layers.start : layers.stop])
                moved.append(self._pages.compact(layers, kept, page_ids, most))
            lengths = torch.cat(moved)
        elif isinstance(self._pages, SharedPages):
            lengths = self._pages.quantise(
                kept_of(range(self.num_layers), reader),
                lambda layer: self._entries(layer, prompt, page_ids, 0, boundary),
                blocks[: planned.kept_blocks + 1],
                sum(totals),
                self._rows.positions,
                self._tails.joined(self._tails.place(prompt.request)),
            )
        else:
            assert tails is not None
            lengths = self._compact(reader, page_ids[:, : planned.kept_blocks + 1], tails)
        if computed > boundary and tails is None:
            self._pages.close_up(blocks, planned.tail, lengths, boundary, computed)
        self._rows.compressed(first_block, blocks, boundary, lengths, planned)
        if written and tails is not None:
            self._append(written, tails, blocks, computed)
        entries = self.num_layers * self.num_kv_heads * boundary
        self._kept.append((entries, Later(lengths.sum()[None])))

    def _compact(self, reader: Reader, page_ids: Tensor, tails: Sequence[Tensor]) -> Tensor:
        """Quantises what each layer keeps into its pages of int4 ``[Hkv, blocks]``; ``[L, Hkv]``
        lengths."""
        heads = self.num_kv_heads
        # compact() also wants a page per row to go on in: the last block's, though rows go on in
        # the blocks from `tail` on.
        usable = page_ids.T.flatten().int()
        starts = sent([0, usable.numel()], self.device).int()
        lengths = self._integers(self.num_layers, heads)
        for layer in range(self.num_layers):
            (chosen,) = reader.finish(layer)[layer]
            tables = (
                lengths[layer, None],
                self._integers(1, heads, usable.numel() - heads),
                self._integers(1, heads, 1),
                self._integers(1),
            )
            rows = self.pages[layer].layer(self._rows.positions, *tables, tails=tails[layer])
            compact(chosen.kept, chosen.entries, rows, usable, starts)
        return lengths

    def _written(self, prompt: Prompt, blocks: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values ``[1, Hkv, n, D]`` of what a whole request has written, in each layer."""
        (boundary,) = prompt.reader.lengths
        before = boundary // self.block_size * self.block_size
        page_ids = self._page_ids(blocks, prompt.held)[:, boundary // self.block_size :]
        written = []
        for layer in range(self.num_layers):
            keys, values = self._entries(layer, prompt, page_ids, before, prompt.held)
            written.append((keys[:, :, boundary - before :], values[:, :, boundary - before :]))
        return written

    def _append(
        self,
        new: Sequence[tuple[Tensor, Tensor]],
        tails: Sequence[Tensor],
        blocks: Tensor,
        end: int,
    ) -> None:
        """Appends a request's newest tokens, up to its ``end``, in each layer."""
        count = new[0][0].shape[2]
        lengths = sent([end], self.device).int()
        batch = Batch([0, count], [end - count], [False], lengths, blocks[None], end)
        tables, _ = self._rows.tables(batch, slice(0, 1), count)
        for (keys, values), layer in zip(new, self._rows.layers(tables, tails), strict=True):
            append(keys, values, layer)

    def _planned(
        self, batch: Batch, run: Run, tails: Sequence[Tensor] | None, buffers: Buffers | None
    ) -> PlannedStep:
        """The step of some requests that have equally many new tokens."""
        tables, num_new = self._rows.tables(batch, run.rows, run.new_tokens)
        if buffers is not None and num_new is not None:
            return buffers.plan(tables, num_new)
        layers, inputs = self._rows.layers(tables, tails), tables.plan_inputs
        return PlannedStep.plan(layers, inputs, new_tokens=run.new_tokens, num_new=num_new)

    def _names(self, batch: Batch) -> list[int | None]:
        """By which request each row of a step is known, None for padding and for what only warms
        the engine up, or keeps it in step with others."""
        names, nobody = batch.requests, -1
        if names is None:
            names, nobody = batch.block_table[:, 0].tolist(), 0
        rows = zip(names, batch.is_prefilling, range(len(names)), strict=True)
        return [
            name if name != nobody and (reads or batch.computed[row] > 0) else None
            for name, reads, row in rows
        ]

    def _arranged(self, batch: Batch, runs: Sequence[Run]) -> list[list[Tensor] | None]:
        """The tails of a step's requests, of each run ``[L]`` times ``[n, Hkv, 2 P, D]``."""
        if self._tails is None:
            return [None] * len(runs)
        rows = [row for run in runs for row in run.numbers]
        names = self._names(batch)
        requests = [name for row in rows if (name := names[row]) is not None]
        self._tails.arrange(requests, self._is_gone if batch.requests is None else lambda _: False)
        ends = list(accumulate((len(run.numbers) for run in runs), initial=0))
        return [self._tails.layers(slice(*places)) for places in pairwise(ends)]
