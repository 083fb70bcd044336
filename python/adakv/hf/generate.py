"""Many prompts at once: prefilled one by one into one cache, decoded together.

    while prompts wait or run:
        admit    into free slots, as long as the pages suffice for all that a prompt may write
        step     one token of every running sequence
        end      of those that are done: their pages go back

A prompt's pages are known before it is read, so that none runs out on the way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adakv.devices import AnyCache
from adakv.errors import integer
from adakv.formats import check_page_size
from adakv.hf import long_rope
from adakv.hf.allocation import Allocation
from adakv.hf.attachment import attach, decoder_of
from adakv.hf.cache import Cache
from adakv.hf.cuda_graph import Steps
from adakv.hf.families import input_device
from adakv.hf.parking import FIRST_ROOM, Parked, check_parks, place_for, with_return
from adakv.hf.pool_size import Need, cache_for, first_tokens, shape_of
from adakv.hf.prefix import Prefix, check_shared
from adakv.hf.prompts import Given, Requests, read
from adakv.hf.sampling import Sampling
from adakv.hf.slots import Decoder
from adakv.hf.stopping import End, Stop
from adakv.hf.token_classes import classes_of_all
from adakv.hf.wrappers import unwrapped
from adakv.policy import DEFAULT, Budget, Policy, Protection, Read, TokenClasses
from adakv.policy.presets import read_by
from adakv.reselection import Rule


@dataclass(frozen=True)
class BatchOptions:
    """How :func:`generate_batch` writes, and in how much memory.

    Parameters
    ----------
    temperature, top_k, top_p : float, int, float
        As in transformers. ``temperature`` 0 takes the most likely token; ``top_k`` 0 and ``top_p``
        1 are off.
    seed : int, optional
        Prompt i draws from a generator of its own, seeded with ``seed + i``, so that its text
        doesn't depend on what runs beside it. Default: from torch's generator.
    eos_token_id : int or ints, optional
        Tokens that end a text. Default: those of ``model.generation_config``.
    stop_strings : str or strings
        Strings that end a text; they need a tokenizer.
    max_batch : int
        The most sequences that run at a time.
    cache_bytes : int, optional
        The most bytes that pages take. Default: what ``max_batch`` sequences need; on CUDA at most
        what is free beside the prefill of the longest prompt.
    page_size : int, optional
        As in :class:`adakv.Cache`.
    park : str or torch.device, optional
        Where sequences wait when the pages don't suffice for what all of them write, as ``"cpu"``:
        prompts join when there are pages for their first tokens, else for all that they may write.
    read : str or :class:`adakv.policy.Read`, optional
        Which part of what a head holds a step reads, as in :class:`adakv.Cache`.
    cuda_graph : bool
        On CUDA, record a step once and replay it, which spares the host nearly all of its work.
    compile : bool
        Let ``torch.compile`` fuse the step: a minute or more for the first, less for the others.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    stop_strings: str | Sequence[str] = ()
    max_batch: int = 64
    cache_bytes: int | None = None
    page_size: int | None = None
    park: str | torch.device | None = None
    read: str | Read | None = None
    cuda_graph: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        """Refuses numbers that make no sense; those of numpy become Python's."""
        Sampling(self.temperature, self.top_k, self.top_p)
        object.__setattr__(self, "max_batch", integer("max_batch", self.max_batch, 1))
        if self.page_size is not None:
            object.__setattr__(self, "page_size", check_page_size(self.page_size))
        place_for(self.park)
        if self.seed is not None:
            object.__setattr__(self, "seed", integer("seed", self.seed, -(2**62), 2**62))
        if self.cache_bytes is not None:
            object.__setattr__(self, "cache_bytes", integer("cache_bytes", self.cache_bytes, 0))

    @classmethod
    def given(cls, options: BatchOptions | None) -> BatchOptions:
        """The same, or the defaults; raises ``ValueError`` for anything else."""
        if options is not None and not isinstance(options, cls):
            raise ValueError(f"options must be adakv.BatchOptions, got {type(options).__name__}")
        return options or cls()


@dataclass(frozen=True)
class BatchResult:
    """What was written after one prompt."""

    index: int  #: number of the prompt, from 0
    prompt_tokens: int  #: how many tokens the prompt has
    tokens: list[int]  #: what was written, with the token that ended the text
    text: str | None  #: the same as a string, without special tokens; None without a tokenizer
    end: End  #: what ended it: "eos", "stop_string" or "length"


@dataclass(frozen=True)
class NewToken:
    """A token of :func:`generate_stream`."""

    index: int  #: number of the prompt, from 0
    token: int  #: its id
    result: BatchResult | None  #: all of the text, if this was its last token


@dataclass
class _Sequence:
    """A prompt and what was written after it."""

    index: int
    prompt: Tensor  # [T] int64
    inputs: Mapping[str, Any]  # beside it, such as images
    max_new_tokens: int
    room: int  # tokens that there are pages for
    need: Need  # for these
    protection: Protection
    classes: TokenClasses
    tokens: list[int] = field(default_factory=list)

    def give_room(self, room: int, need_of: Callable[[int, int], Need]) -> None:
        """It is to have pages for so many tokens."""
        self.room, self.need = room, need_of(len(self.prompt), room)


def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Given],
    *,
    policy: str | Policy = DEFAULT,
    budget: int | None = None,
    ratio: float | None = None,
    budget_bytes: int | str | None = None,
    kv_dtype: str | None = None,
    protect: Any = None,
    protect_tokens: Sequence[int] = (),
    classes: Any = None,
    prefix: Given | None = None,
    decode_budget: int | None = None,
    decode_policy: str | Policy | None = None,
    every: int | None = None,
    pin_prompt: bool = True,
    max_new_tokens: int | Sequence[int] = 128,
    tokenizer: Any = None,
    options: BatchOptions | None = None,
) -> list[BatchResult]:
    """Writes a text behind each of many prompts, all in one compressed cache.

    Prompts are read one by one and decoded together; when one is done its pages go back and the
    next joins. Each text is what its prompt gets alone, up to the rounding of sums.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder in eval mode whose layers all have full attention. It is attached meanwhile, if it
        isn't yet.
    prompts : strings, lists of token ids, ``[T]`` integer tensors or mappings
        Strings need a tokenizer. A mapping is what the model's processor gave for one prompt, such
        as ``input_ids`` and ``pixel_values``; others may stand beside it.
    policy, budget, ratio, budget_bytes, kv_dtype
        As in :class:`adakv.Cache`. ``budget_bytes`` is for each sequence; all have one format, the
        first in which every prompt fits with all of its entries, if there is one (docs/bits.md).
    decode_budget, decode_policy, every, pin_prompt
        As in :class:`adakv.Cache`.
    protect : spans, masks or a list of them, optional
        Tokens that stay, of all prompts or of each: see :meth:`adakv.policy.Protection.given`.
    protect_tokens : ints
        Ids of tokens that stay wherever a prompt has them.
    classes : dict, optional
        As in :class:`adakv.Cache`, of all prompts or of each. Default: for policies that ask, what
        :func:`adakv.classes_of` finds in each.
    prefix : as a prompt, optional
        The text that all prompts begin with; ``prompts`` are then what comes behind it (strings
        get no special tokens there). It is read once, budget and ``protect`` are for it, and what
        is kept of it is stored once; prompts behind it stay whole. Not with ``decode_budget``.
    max_new_tokens : int or ints
        The most tokens to write, for all prompts or for each.
    tokenizer : optional
        A tokenizer of transformers; prompts that are strings and ``stop_strings`` need it.
    options : :class:`BatchOptions`, optional

    Returns
    -------
    results : list of :class:`BatchResult`
        In the order of the prompts.

    Raises
    ------
    ValueError
        For arguments that make no sense and for models with other layers, before any work.
    adakv.Error
        If a prompt can never fit, before any work; names the pages it needs and those there are.
    """
    stream = generate_stream(
        model,
        prompts,
        policy=policy,
        budget=budget,
        ratio=ratio,
        budget_bytes=budget_bytes,
        kv_dtype=kv_dtype,
        protect=protect,
        protect_tokens=protect_tokens,
        classes=classes,
        prefix=prefix,
        decode_budget=decode_budget,
        decode_policy=decode_policy,
        every=every,
        pin_prompt=pin_prompt,
        max_new_tokens=max_new_tokens,
        tokenizer=tokenizer,
        options=options,
    )
    results = [new.result for new in stream if new.result is not None]
    return sorted(results, key=lambda result: result.index)


def generate_stream(
    model: PreTrainedModel,
    prompts: Sequence[Given],
    *,
    policy: str | Policy = DEFAULT,
    budget: int | None = None,
    ratio: float | None = None,
    budget_bytes: int | str | None = None,
    kv_dtype: str | None = None,
    protect: Any = None,
    protect_tokens: Sequence[int] = (),
    classes: Any = None,
    prefix: Given | None = None,
    decode_budget: int | None = None,
    decode_policy: str | Policy | None = None,
    every: int | None = None,
    pin_prompt: bool = True,
    max_new_tokens: int | Sequence[int] = 128,
    tokenizer: Any = None,
    options: BatchOptions | None = None,
) -> Iterator[NewToken]:
    """:func:`generate_batch` token by token, as they are written.

    Arguments are checked and memory is taken by the call, the work is done while iterating.
    """
    model = unwrapped(model)
    options = BatchOptions.given(options)
    limit = Budget.given(policy, budget, ratio, budget_bytes)
    rule = Rule.given(limit.policy, decode_policy, decode_budget, every, pin_prompt)
    if "repeat" in limit.policy.needs:
        raise ValueError("policy: a prompt read twice needs a cache of its own: adakv.Cache")
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    stop = Stop(model, tokenizer, options.eos_token_id, options.stop_strings)
    allocation = Allocation(limit, kv_dtype, options.page_size)
    beside = {"decode_budget": rule, "prefix": prefix, "park": options.park, "read": options.read}
    allocation.check_together((), beside)
    text: dict[str, Any] = {} if rule is None else rule.arguments
    text["kv_dtype"] = kv_dtype if allocation.has_tiers else None
    reader = Cache(model, policy, budget, ratio, budget_bytes=budget_bytes, **text)
    requests = Requests.given(model, tokenizer, prompts, max_new_tokens, prefix)
    chosen_from = requests.chosen_from
    protection = Protection.of_prompts(protect, protect_tokens, chosen_from)
    if not requests.ids:
        return iter(())
    if classes is None and "classes" in limit.policy.needs:
        classes = classes_of_all(model, chosen_from)
    requests = requests._replace(protection=protection, classes=TokenClasses.given(classes))
    fit = _fit(model, requests, rule, reader, allocation, options)
    decoder = Decoder(model, fit.kv, sampling, rule, read_by(limit.policy, options.read))
    steps = Steps(decoder, cuda_graph=options.cuda_graph, compile=options.compile)
    seed = int(torch.randint(2**48, ())) if options.seed is None else options.seed
    chance = None if sampling.is_greedy else seed
    park = place_for(options.park)
    return _Batch(
        decoder, steps, reader, stop, chance, fit.need_of, fit.waiting, fit.prefix, park
    ).run()


class _Fit(NamedTuple):
    """What requests take, and pages for it."""

    kv: AnyCache
    waiting: deque[_Sequence]
    need_of: Callable[[int, int], Need]  # a prompt's tokens, and those after it
    prefix: Prefix | None


def _fit(
    model: PreTrainedModel,
    requests: Requests,
    rule: Rule | None,
    reader: Cache,
    allocation: Allocation,
    options: BatchOptions,
) -> _Fit:
    """Decides how much is kept of some requests, and takes memory for as many as can run.

    Raises ``ValueError`` and ``adakv.Error`` as :func:`generate_batch` does.
    """
    shape = replace(shape_of(model), has_biases=reader.budget.policy.has_biases)
    check_shared(requests.prefix, rule, shape.groups)
    if options.park is not None:
        check_parks(requests.prefix is not None, rule, shape.groups)
    lengths, chosen_from = requests.lengths, [len(prompt) for prompt in requests.chosen_from]
    before = 0 if requests.prefix is None else chosen_from[0]
    long_rope.check_batch(decoder_of(model).config, lengths, requests.counts, before)
    rooms = _rooms(model, lengths, requests.counts, options)
    most_new = max(rooms) + (max(lengths) - before if before else 0)
    limit = allocation.decide(reader.budget, shape, chosen_from, rule, new=most_new)
    limit.check(chosen_from)
    requests.check(limit, shape.num_layers)
    reader.budget, (shape, page_size) = limit, allocation.pages(limit, shape)
    sizes: dict[str, Any] = {"budget": limit, "shape": shape, "page_size": page_size}
    need_of: Callable[[int, int], Need] = partial(Need.of, rule=rule, **sizes)
    if options.park is not None:
        need_of = partial(with_return, need_of, shape)
    prefix = None
    if requests.prefix is not None:
        prefix = Prefix(requests, need_of(before, 1))
        need_of = partial(Need.of_branch, before, **sizes)
        requests = requests._replace(protection=Protection(), classes=TokenClasses())
    waiting = _waiting(requests, rooms, need_of)
    kv = cache_for(
        model,
        [*requests.chosen_from, *requests.ids],
        [sequence.need for sequence in waiting],
        shape,
        limit,
        max_batch=options.max_batch,
        cache_bytes=options.cache_bytes,
        page_size=page_size,
        prefix=None if prefix is None else prefix.need,
    )
    if options.park is not None:
        for sequence in waiting:
            sequence.give_room(min(sequence.room, FIRST_ROOM), need_of)
    return _Fit(kv, waiting, need_of, prefix)


def _rooms(
    model: PreTrainedModel, lengths: Sequence[int], counts: Sequence[int], options: BatchOptions
) -> list[int]:
    """Tokens behind each prompt that have their pages from the beginning."""
    is_limited = options.cache_bytes is not None or input_device(model).type == "cuda"
    room = partial(first_tokens, model, is_limited=is_limited)
    return [room(*pair) for pair in zip(lengths, counts, strict=True)]


def _waiting(
    requests: Requests,
    rooms: Sequence[int],
    need_of: Callable[[int, int], Need],
) -> deque[_Sequence]:
    """The prompts in their order, with what each one needs."""
    each = enumerate(zip(requests.ids, requests.inputs, requests.counts, rooms, strict=True))
    stays, is_of = requests.protection.of_one, requests.classes.of_one
    return deque(
        _Sequence(i, ids, beside, count, room, need_of(len(ids), room), stays(i), is_of(i))
        for i, (ids, beside, count, room) in each
    )


@dataclass
class _Batch:
    """Prompts that wait and sequences that run."""

    decoder: Decoder
    steps: Steps
    reader: Cache  # that prompts go through on their way into the decoder's cache
    stop: Stop
    seed: int | None  # None: nothing is left to chance
    need_of: Callable[[int, int], Need]  # a prompt's tokens, and those after it
    waiting: deque[_Sequence]
    prefix: Prefix | None = None
    park: torch.device | None = None  # where sequences wait for pages
    parked: deque[tuple[_Sequence, Parked]] = field(default_factory=deque)
    spare: int = 0  # pages beside those of sequences: of the prefix, and for a choice from one text
    slots: int = 0  # for sequences
    running: dict[int, _Sequence] = field(default_factory=dict)  # by slot

    def __post_init__(self) -> None:
        self.spare = max(sequence.need.again for sequence in self.waiting)
        self.slots = self.decoder.kv.num_sequences
        if self.prefix is not None:
            self.spare += self.prefix.need.pages
            self.slots -= 1  # the prefix has the last one

    @torch.no_grad()
    def run(self) -> Iterator[NewToken]:
        """Until all are done."""
        with attach(self.decoder.model):
            if self.prefix is not None:
                self.prefix.read(self.decoder.model, self.reader, self.decoder.kv)
            while self.waiting or self.running or self.parked:
                yield from self._admit()
                yield from self._step()

    def _admit(self) -> Iterator[NewToken]:
        """Lets prompts in, in their order, while there is room; those that were parked first."""
        for slot in range(self.slots):
            while slot not in self.running and (self.parked or self.waiting):
                sequence = self.parked[0][0] if self.parked else self.waiting[0]
                if not self._has_room(sequence):
                    return
                self.running[slot] = sequence
                if self.parked:
                    self.parked.popleft()[1].put_back(self.decoder, slot)
                else:
                    self.waiting.popleft()
                    yield self._take(slot, self._prefill(slot, sequence))

    def _has_room(self, *more: _Sequence) -> bool:
        """Whether there are pages for all that runs, and for more."""
        needs = [sequence.need.pages for sequence in (*self.running.values(), *more)]
        return sum(needs) <= self.decoder.kv.num_pages - self.spare

    def _prefill(self, slot: int, sequence: _Sequence) -> int:
        """Reads a prompt; its first token."""
        generator = None
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + sequence.index)
        model, kv, first = self.decoder.model, self.decoder.kv, None
        if self.prefix is not None:
            first = self.prefix.branch(self.reader, kv, slot)
        else:
            self.reader.protection, self.reader.classes = sequence.protection, sequence.classes
            self.reader.fill(kv, slot)
        logits, position = read(model, sequence.prompt, sequence.inputs, self.reader, first)
        text = self.reader.eviction.text
        self.decoder.begin(slot, logits, position, generator, text)
        return int(self.decoder.slots.tokens[slot])

    def _step(self) -> Iterator[NewToken]:
        """One token of each."""
        if self.running:
            width = max(self.running) + 1
            self._make_room()
            self.decoder.grow()
            self.steps.run(width)
            tokens = self.decoder.slots.tokens[:width, 0].tolist()
            for slot in sorted(self.running):
                yield self._take(slot, tokens[slot])
            self.decoder.end_step()

    def _make_room(self) -> None:
        """Has the cache grow for texts that have come to the end of their room.

        Raises ``adakv.Error`` if there is no memory for them.
        """
        longer = [one for one in self.running.values() if len(one.tokens) == one.room]
        for sequence in longer:
            sequence.give_room(min(2 * sequence.room, sequence.max_new_tokens), self.need_of)
        while self.park is not None and len(self.running) > 1 and not self._has_room():
            last = max(self.running, key=lambda slot: self.running[slot].index)
            sequence = self.running.pop(last)
            self.parked.appendleft((sequence, Parked.take(self.decoder, last, self.park)))
        if longer:
            needs = [sequence.need for sequence in self.running.values()]
            self.decoder.kv.reserve(
                num_pages=sum(need.pages for need in needs) + self.spare,
                max_row_pages=max(need.row_pages for need in needs),
            )

    def _take(self, slot: int, token: int) -> NewToken:
        """Writes a token down; if it is the sequence's last, the slot is free again."""
        sequence = self.running[slot]
        sequence.tokens.append(token)
        end = self.stop.end(sequence.tokens, sequence.max_new_tokens)
        if end is None:
            return NewToken(sequence.index, token, None)
        del self.running[slot]
        self.decoder.end(slot)
        text = self.stop.text(sequence.tokens)
        result = BatchResult(sequence.index, len(sequence.prompt), sequence.tokens, text, end)
        return NewToken(sequence.index, token, result)
