"""How many pages prompts take in a shared cache, and how many there can be."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from adakv import room
from adakv.cache import KVCache
from adakv.devices import AnyCache, groups_of
from adakv.errors import Error
from adakv.hf.attachment import CACHE, cache_layers, decoder_of
from adakv.hf.families import input_device
from adakv.policy import Budget, ByteBudget
from adakv.reading import Reader
from adakv.reselection import Rule
from adakv.shape import Footprint, Shape, unit_bytes
from adakv.tiered_cache import TieredCache
from adakv.tiers import Tiers

#: Tokens after a prompt that pages are made for at first; a longer text has its cache grow.
FIRST_TOKENS = 4096

_PROBE = 1024  # tokens whose prefill tells what a token takes
_SHARE = 0.9  # of the memory that a prefill leaves free


def shape_of(model: PreTrainedModel) -> Shape:
    """What a model's layers put into a cache, found by reading one token. Raises ``ValueError`` for
    layers that can't share pages."""
    layers = cache_layers(decoder_of(model))
    if any(type(layer) is not DynamicLayer for layer in layers):
        raise ValueError(
            f"model: {type(model).__name__} has layers without full attention, which "
            "many prompts can't share; run them one by one through adakv.Cache"
        )
    look = _Look(config=model.config)
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.int64, device=input_device(model)), **{CACHE: look})
    shapes = {shape[:4] for shape in look.shapes}
    if len(shapes) > 1:
        raise ValueError(f"model: its layers have keys of different kinds: {shapes}")
    devices = [shape[4] for shape in look.shapes]
    heads, dim, value_dim, dtype = shapes.pop()
    shape = Shape(len(devices), heads, dim, dtype, devices[0], groups=groups_of(devices))
    return replace(shape, value_dim=value_dim)


class _Look(DynamicCache):
    """A cache that looks at what a model's layers would store, and stores nothing."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.shapes: list[tuple[int, int, int, torch.dtype, torch.device]] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        _, heads, _, head_dim = key_states.shape
        kind = value_states.dtype, value_states.device
        self.shapes.append((heads, head_dim, value_states.shape[3], *kind))
        return key_states, value_states


def decided(
    budget: ByteBudget,
    shape: Shape,
    prompt_lens: Sequence[int],
    *,
    formats: Sequence[tuple[str, int]],
    new: int,
    rule: Rule | None,
    row_pages: int = 0,
) -> ByteBudget:
    """A budget in bytes as so many entries, in one of some formats of pages.

    Parameters
    ----------
    prompt_lens : ints
        Tokens of the prompts in one cache.
    formats : pairs of format and page size
        Those of :meth:`adakv.shape.Shape.formats`.
    new : int
        Tokens behind each prompt that rows have room for.
    rule : :class:`adakv.reselection.Rule`, optional
        How the text is evicted from; its entries count, too.
    row_pages : int
        Columns that the block table has already.
    """
    text: tuple[int, ...] = ()
    if rule is not None:
        heads, longest = shape.num_kv_heads, 2**31 - 1
        limit = Budget(rule.policy, rule.budget)
        text = tuple(limit.totals(longest, num_kv_heads=heads, num_layers=shape.num_layers))
    footprints = [
        Footprint(
            replace(shape, kv_dtype=name),
            page_size,
            max(row_pages, row_pages_for(max(prompt_lens), new, shape, page_size, rule)),
            text,
            every=0 if rule is None else rule.every,
            first=0 if rule is None else rule.most,
            window=budget.policy.window,
            model_wide=budget.policy.is_model_wide,
        )
        for name, page_size in formats
    ]
    return budget.decided(footprints, prompt_lens)


def row_pages_for(
    prompt_len: int, new: int, shape: Shape, page_size: int, rule: Rule | None = None
) -> int:
    """Most pages of a row of a prompt and of ``new`` tokens behind it."""
    if rule is not None:
        new = min(new, rule.most_in_row(shape))
    return (prompt_len + new) // page_size + 2


@dataclass(frozen=True)
class Need:
    """What a prompt and the tokens after it take, at most."""

    pages: int  # over all layers; of several tiers in the first one
    row_pages: int  # of the longest row
    again: int = 0  # pages beside these while its text is chosen from
    others: tuple[int, ...] = ()  # pages in each of the other tiers

    @classmethod
    def of(
        cls,
        prompt_len: int,
        new: int,
        *,
        budget: Budget,
        shape: Shape,
        page_size: int,
        rule: Rule | None = None,
    ) -> Need:
        """``new`` tokens are written, the last of which is never stored."""
        heads = shape.num_kv_heads
        totals = budget.totals(prompt_len, num_kv_heads=heads, num_layers=shape.num_layers)
        row = max(totals)
        totals, *others = _of_tiers(totals, budget, shape)

        def pages_for(text: int, new_tokens: int) -> int:
            return sum(
                KVCache.pages_for(
                    total + heads * text, new_tokens, num_kv_heads=heads, page_size=page_size
                )
                for total in totals
            )

        if rule is None or rule.pins_prompt:
            row = min(prompt_len, row)
        if rule is None or new - 1 < rule.most:
            row_pages, pages = -(-(row + new) // page_size), pages_for(0, new - 1)
            rest = (sum(_pages_for(n, heads, page_size) for n in tier) for tier in others)
            return cls(pages, row_pages, others=tuple(rest))
        most = max(pages_for(0, rule.most), pages_for(rule.budget, rule.every))
        row += min(new, rule.most_in_row(shape))
        # A model-wide policy may begin a page more in each layer.
        more = shape.num_layers if rule.policy.is_model_wide else 0
        return cls(most + more, -(-row // page_size), pages_for(rule.budget, 0) + more)

    @classmethod
    def of_branch(
        cls,
        prefix_len: int,
        prompt_len: int,
        new: int,
        *,
        budget: Budget,
        shape: Shape,
        page_size: int,
    ) -> Need:
        """The same of a prompt that is read behind a prefix, which others share."""
        heads, tokens = shape.num_kv_heads, prompt_len + new - 1
        totals = budget.totals(prefix_len, num_kv_heads=heads, num_layers=shape.num_layers)
        pages = KVCache.pages_for(0, tokens, num_kv_heads=heads, page_size=page_size)
        row = min(prefix_len, max(totals)) + tokens + 1
        return cls(shape.num_layers * pages, -(-row // page_size))


def first_tokens(model: PreTrainedModel, prompt_len: int, new: int, *, is_limited: bool) -> int:
    """How many of ``new`` tokens have their pages promised before a prompt is read.

    Where memory is limited those that the model's context has room for, so that no text ends for
    want of pages; otherwise :data:`FIRST_TOKENS`.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    room = max(context - prompt_len, FIRST_TOKENS) if is_limited else FIRST_TOKENS
    return min(new, room)


def cache_for(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    needs: Sequence[Need],
    shape: Shape,
    budget: Budget,
    *,
    max_batch: int,
    cache_bytes: int | None,
    page_size: int,
    prefix: Need | None = None,
) -> AnyCache:
    """A cache for ``max_batch`` of the prompts at a time, or for as many as there is memory for;
    with one slot more for a ``prefix`` that they share.

    Raises ``adakv.Error`` if one of them can never fit.
    """
    slots = min(max_batch, len(needs))
    spare = max(need.again for need in needs)
    if prefix is not None:
        spare += prefix.pages
    pages = sum(sorted((need.pages for need in needs), reverse=True)[:slots]) + spare
    slots += prefix is not None
    unit = unit_bytes(shape.of_tiers[0], page_size)
    on_cuda = any(x.type == "cuda" for x in (shape.device, *(g.device for g in shape.groups)))
    if cache_bytes is None and on_cuda:
        longest = max(prompts, key=len)
        waiting = waiting_bytes(budget, len(longest), shape)
        cache_bytes = _free_bytes(model, longest, waiting, shape)
    if cache_bytes is not None:
        pages = min(pages, max(cache_bytes - slots * unit.tails, 0) // unit.page)
    if not Tiers.given(shape.kv_dtype).is_one:
        return _tiered_cache(needs, shape, slots, cache_bytes, page_size)
    for index, need in enumerate(needs):
        if need.pages + spare > pages:
            raise Error(
                f"prompts[{index}] can never fit: it needs {need.pages + spare} pages of "
                f"{unit.page} bytes, and the cache has {pages}"
            )
    return shape.cache(slots, pages, max(need.row_pages for need in needs), page_size)


def _of_tiers(totals: Sequence[int], budget: Budget, shape: Shape) -> list[list[int]]:
    """``[tiers][L]``: most entries of each layer that each tier has of ``totals`` ``[L]``."""
    policy, layers = budget.policy, [[n] for n in totals]
    of_tiers = Tiers.given(shape.kv_dtype).totals(
        layers, shape.num_kv_heads, policy.window, model_wide=policy.is_model_wide
    )
    return [[n for (n,) in of_tier] for of_tier in of_tiers]


def _pages_for(total: int, num_kv_heads: int, page_size: int) -> int:
    return KVCache.pages_for(total, 0, num_kv_heads=num_kv_heads, page_size=page_size)


def _tiered_cache(
    needs: Sequence[Need], shape: Shape, slots: int, cache_bytes: int | None, page_size: int
) -> AnyCache:
    """A cache of several tiers for any ``slots`` of some prompts, or for as many as there is memory
    for: what other tiers have is there for all of them."""
    units = [unit_bytes(of_tier, page_size) for of_tier in shape.of_tiers]
    of_tiers = [
        sorted(of_tier, reverse=True)
        for of_tier in zip(*((need.pages, *need.others) for need in needs), strict=True)
    ]
    while True:
        pages = [sum(of_tier[:slots]) for of_tier in of_tiers]
        size = sum(n * unit.page + slots * unit.tails for n, unit in zip(pages, units, strict=True))
        size += slots * shape.basis_bytes
        if cache_bytes is None or size <= cache_bytes:
            return shape.tiered_cache(slots, pages, max(x.row_pages for x in needs), page_size)
        if slots == 1:
            raise Error(
                f"prompts can never fit, all of them: one needs {size} bytes in tiers of "
                f"{shape.kv_dtype}, and there are {cache_bytes}"
            )
        slots -= 1


def cache_of(
    reader: Reader,
    shape: Shape,
    *,
    num_sequences: int,
    new: int,
    page_size: int,
    rule: Rule | None = None,
) -> AnyCache:
    """A cache for what is kept of a reader's prompts, and for ``new`` tokens behind each, or for
    what a rule leaves of them."""
    heads = shape.num_kv_heads
    stored = new if rule is None else min(new, rule.most)
    window, model_wide = reader.policy.window, reader.policy.is_model_wide
    tiers = Tiers.given(shape.kv_dtype)
    totals = tiers.totals(reader.totals(heads), heads, window, model_wide=model_wide)
    pages = [
        sum(
            KVCache.pages_for(n, stored, num_kv_heads=heads, page_size=page_size)
            for of_layer in of_tier
            for n in of_layer
        )
        for of_tier, stored in zip(totals, [stored, *[0] * len(totals)], strict=False)
    ]
    if tiers.mean is not None:  # what goes to which tier is known when it comes
        pages = [-(-n // len(pages)) for n in pages]
    row_pages = row_pages_for(max(reader.lengths), new, shape, page_size, rule)
    # The pool decides what is full.
    return shape.tiered_cache(num_sequences, pages, row_pages, page_size)


def pages_of(shape: Shape, page_size: int, lengths: Tensor, max_new_tokens: int) -> KVCache:
    """Pages for rows of ``lengths`` ``[L, B, Hkv]`` int32, which are to be filled, and for tokens
    behind them. Raises ``ValueError`` if they would lie on several devices."""
    new = min(max_new_tokens, FIRST_TOKENS)
    sizes = {"num_kv_heads": shape.num_kv_heads, "page_size": page_size}
    totals = lengths.sum(2).flatten().tolist()
    pages = sum(KVCache.pages_for(n, new, **sizes) for n in totals)
    row_pages = (int(lengths.max()) + new) // page_size + 2
    kv = shape.cache(lengths.shape[1], pages, row_pages, page_size)
    if not isinstance(kv, KVCache):
        raise ValueError("model: its layers must lie on one device, this model lies on several")
    return kv


def make_room(kv: AnyCache, num_new: Sequence[int], first_sequence: int = 0) -> None:
    """Has a cache grow if there are too few pages for so many more tokens of each sequence, from
    ``first_sequence`` on.

    Raises ``adakv.Error`` if there is no memory for them. The cache goes on working.
    """
    behind = kv.num_sequences - first_sequence - len(num_new)
    num_new = [*[0] * first_sequence, *num_new, *[0] * behind]
    for part in kv.parts:
        room.make_room(part, num_new)


def make_room_to_fork(
    kv: KVCache | TieredCache, sources: Sequence[int], *, whole: bool = False
) -> None:
    """Has a cache grow if there are too few pages for a fork of the sequences ``sources``.

    Raises ``adakv.Error`` if there is no memory for them. The cache goes on working.
    """
    if isinstance(kv, TieredCache):
        for cache in kv.caches:
            make_room_to_fork(cache, sources, whole=whole)
        return
    pages = kv.pages_to_fork(sources, whole=whole)
    if pages > kv.num_free:
        gc.collect()  # forks that nobody has any more, but that are part of cycles
    if pages > kv.num_free:
        room.enlarge(kv, pages - kv.num_free)


def waiting_bytes(budget: Budget, prompt_len: int, shape: Shape) -> int:
    """What layers hold beside the pages until the last one of a prompt is there: keys and values,
    and scores, once more when they are joined."""
    entries = budget.waiting(prompt_len)
    if entries == 0:
        return 0
    rows = shape.num_layers * shape.num_kv_heads
    return rows * (entries * shape.entry_bytes + 2 * 4 * prompt_len)


def _free_bytes(model: PreTrainedModel, prompt: Tensor, waiting: int, shape: Shape) -> int:
    """CUDA memory that is left for pages while a prompt is read, from reading its beginning; of
    several GPUs what the one that has least for its layers leaves for all of them."""
    layers = {
        group.device: len(group.layers) for group in shape.groups if group.device.type != "cpu"
    }
    layers = layers or {shape.device: shape.num_layers}
    ids = prompt[None, :_PROBE].to(input_device(model))
    torch.cuda.empty_cache()
    before = {}
    for device in layers:
        torch.cuda.reset_peak_memory_stats(device)
        before[device] = torch.cuda.memory_allocated(device)
    with torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=1)
    left = []
    for device, count in layers.items():
        prefill = torch.cuda.max_memory_allocated(device) - before[device]
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        waits = waiting * count // shape.num_layers
        rest = max(free - prefill * len(prompt) // ids.shape[1] - waits, 0)
        left.append(rest * shape.num_layers // count)
    return int(_SHARE * min(left))
