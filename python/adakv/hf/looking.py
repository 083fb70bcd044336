"""A small model beside a large one: it reads the same tokens first, and remembers what it looks at.

Before a forward of the large model with a cache whose steps read by the small one, the small one
reads the forward's tokens: by one of torch's hooks, which goes when the cache is emptied or goes.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import Cache as TransformersCache

from adakv.beside import DraftPages, Look, SmallEntries
from adakv.cache import KVCache
from adakv.entries import GrowingEntries
from adakv.hf import families
from adakv.hf.attachment import CACHE, attach, cache_layers, decoder_of
from adakv.hf.layers import TAG, AttendingLayer, attention_of, eagerly
from adakv.moving import moved
from adakv.page_history import reader_of as page_reader_of
from adakv.policy import LayerInputs, Read
from adakv.policy.attention import attention
from adakv.policy.beside import SmallKV, SpecAttn, head_map, layer_map
from adakv.policy.presets import name_of
from adakv.step import PageReader

if TYPE_CHECKING:
    from adakv.hf.cache import Cache

_ROWS = 64  # queries whose attention is there at a time


class LookingLayer(AttendingLayer):
    """A layer that keeps keys and values of one sequence as they are, and what it looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.num_seen = 0
        self.look: Look | None = None  # of the last step, if it wasn't wide
        self._entries = GrowingEntries()
        self._sums = torch.empty(0)  # [Hq, T] float32

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._entries.put(key_states, value_states, self.num_seen)
        return super().update(key_states, value_states, *args, **kwargs)

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
        """Attention in plain torch, as what was looked at has to be known anyway."""
        delattr(key, TAG)
        keys, values = self._entries.view()
        length, columns = keys.shape[2], query.shape[2]
        inputs = LayerInputs(
            query, keys, values, None, (length,), 0, 1, attention=attention_of(kwargs)
        )
        sums = query.new_zeros(query.shape[1], length, dtype=torch.float32)
        sums[:, : self.num_seen] = self._sums
        parts, found = [], values[:, :, None].float()
        for start in range(0, columns, _ROWS):
            p = attention(inputs, slice(start, start + _ROWS))  # [1, Hkv, G, R, T]
            sums += p.sum(3).view(-1, length)
            parts.append((p @ found).flatten(1, 2))
            weights = p.view(-1, p.shape[3], length)
        is_step = columns <= _ROWS
        self._sums, self.num_seen = sums, length
        self.look = Look(weights, sums) if is_step else None
        return torch.cat(parts, 2).to(value.dtype).transpose(1, 2), None

    def crop(self, count: int) -> None:
        """Takes the newest tokens back, and their part of the sums if the last step had them."""
        left = self.num_seen - count
        sums = self._sums[:, :left]
        if self.look is not None and count <= self.look.weights.shape[1]:
            sums = sums - self.look.weights[:, -count:, :left].sum(1)
        self._sums, self.num_seen, self.look = sums, left, None

    def get_seq_length(self) -> int:
        return self.num_seen


def looking_cache(model: PreTrainedModel) -> TransformersCache:
    """An empty cache of :class:`LookingLayer`.

    Raises ``ValueError`` if not all of the model's layers have full attention.
    """
    own = cache_layers(model)
    if len(families.full_attention(own)) < len(own):
        raise ValueError(
            f"small: {type(model).__name__} has layers without full attention, by which nothing "
            "can be read"
        )
    return TransformersCache(layers=[LookingLayer() for _ in own])


class Small:
    """The small model beside a cache, which reads what the cache's model reads.

    Parameters
    ----------
    model : the small model, or its name
    cache : :class:`adakv.Cache`
        Of one sequence.
    map_tokens : int
        Tokens of the prompt by which heads can be matched.
    """

    def __init__(self, model: Any, cache: Cache, map_tokens: int = 0) -> None:
        large = cache.model
        self.model = decoder_of(_loaded(model, large) if isinstance(model, str) else model)
        self._check(large)
        self._large = weakref.ref(large)
        self._cache = looking_cache(self.model)
        self._map_tokens, self._first = map_tokens, torch.empty(1, 0, dtype=torch.int64)
        told = functools.partial(_before_forward, weakref.ref(self), weakref.ref(cache))
        handle = large.base_model.register_forward_pre_hook(told, with_kwargs=True)
        weakref.finalize(self, handle.remove).atexit = False
        weakref.finalize(self, attach(self.model).detach).atexit = False

    def _check(self, large: PreTrainedModel) -> None:
        ours, theirs = (x.config.get_text_config().vocab_size for x in (large, self.model))
        if abs(ours - theirs) > 0.01 * ours:  # embeddings are padded differently within a family
            raise ValueError(
                f"small must be a model of the same tokenizer, got one of {theirs} tokens beside "
                f"one of {ours}"
            )

    @property
    def seen(self) -> int:
        """Tokens that it has read."""
        return int(self._cache.layers[0].get_seq_length())

    @torch.no_grad()
    def read(self, tokens: Tensor, had: int) -> None:
        """Reads tokens ``[1, S]`` behind the first ``had``; it forgets what it has seen behind
        them, and reads nothing if it has not seen so many."""
        if tokens.shape[0] != 1:
            raise ValueError(f"read: a small model beside takes one sequence, got {len(tokens)}")
        if had == 0:
            self._cache = looking_cache(self.model)
            self._first = tokens[:, : self._map_tokens]
        elif self.seen > had:
            count = self.seen - had
            for layer in self._cache.layers:
                layer.crop(count)
        elif self.seen < had:
            return
        place = {CACHE: self._cache, "use_cache": True}
        self.model.base_model(tokens.to(self.model.device), **place)

    def looks(self, seen: int) -> Sequence[Look] | None:
        """As :class:`adakv.beside.Looking` has it."""
        found = [layer.look for layer in self._cache.layers]
        return found if self.seen == seen and None not in found else None

    def head_map(self, num_layers: int) -> Sequence[Tensor]:
        """As :class:`adakv.beside.Looking` has it."""
        large = self._large()
        assert large is not None
        ours, theirs = (looked_at(model, self._first) for model in (large, self.model))
        count = max(self._first.shape[1] // 4, 1)
        of_small = torch.cat([look.sums for look in theirs])
        return [head_map(look.sums.to(of_small.device), of_small, count) for look in ours]


@torch.no_grad()
def looked_at(model: PreTrainedModel, tokens: Tensor) -> list[Look]:
    """What each layer of an attached decoder looks at in a prompt ``[1, T]``; weights are those of
    the last 64 tokens at most."""
    cache = looking_cache(model)
    first, last = tokens[:, :-_ROWS].to(model.device), tokens[:, -_ROWS:].to(model.device)
    for part in (first, last):
        if part.shape[1]:
            model.base_model(part, use_cache=True, **{CACHE: cache})
    return [layer.look for layer in cache.layers]


def match_layers(model: PreTrainedModel, small: PreTrainedModel, tokens: Tensor) -> tuple[int, ...]:
    """The layer of a small model that looks at most alike, for each of a model's layers.

    By the Kullback-Leibler divergence of the small model's attention from the model's, of their q
    heads' means, summed over the last 64 tokens; no layer belongs to one before that of the layer
    under it (SpecAttn, arXiv 2510.27641).

    Parameters
    ----------
    model, small : PreTrainedModel
        Of the same tokenizer.
    tokens : ``[1, T]`` int64
        A text that both read.

    Returns
    -------
    layers : tuple of int
        For ``SpecAttn(layers=)``.
    """
    looks = []
    for decoder in (decoder_of(model), decoder_of(small)):
        with attach(decoder):
            found = looked_at(decoder, tokens)
        looks.append(torch.stack([look.weights.mean(0) for look in found]).double().flatten(1))
    ours, theirs = looks[0], looks[1].to(looks[0].device).clamp(min=1e-12).log()
    entropy = torch.special.xlogy(ours, ours).sum(1)
    return layer_map(entropy[:, None] - ours @ theirs.mT)


def reader_of(read: Read, cache: Cache) -> PageReader:
    """What chooses for a cache by a read, and keeps what it chooses by.

    Raises ``ValueError`` if the cache or its model don't go with it.
    """
    if isinstance(read, SpecAttn):
        small, num_layers = Small(read.small, cache), len(cache._full)
        of_small = len(small._cache.layers)
        layers = read.layers or (tuple(range(num_layers)) if of_small == num_layers else ())
        if len(layers) != num_layers or max(layers) >= of_small:
            raise ValueError(
                f"layers must be one of the draft's {of_small} layers for each of the model's "
                f"{num_layers}, as adakv.match_layers finds them, got {read.layers}"
            )
        return DraftPages(replace(read, layers=layers), small)
    if isinstance(read, SmallKV):
        _check_whole(cache)
        return SmallEntries(read, Small(read.small, cache, read.map_tokens))
    return page_reader_of(read)


def _place(cache: Cache, read: SmallKV, *, is_read: bool) -> None:
    """Moves what a cache holds to where a step wants it: one that reads copies alone, or
    everything."""
    assert isinstance(cache._kv, KVCache)
    device = torch.device("cpu") if is_read and read.reserve == "cpu" else cache.model.device
    if cache._kv.device != device:
        cache._kv = moved(cache._kv, device, cache._allocation.new_tokens)


def _check_whole(cache: Cache) -> None:
    """Raises ``ValueError`` unless it holds everything, in plain pages."""
    kv_dtype, policy = cache._allocation.kv_dtype, cache.budget.policy
    if name_of(policy) != "full" or cache._rule is not None:
        raise ValueError(
            "read: SmallKV takes a cache with policy='full' and no decode_budget, as what is left "
            f"out may come back, got {name_of(policy)}"
        )
    if kv_dtype not in (None, "auto"):
        raise ValueError(f"read: SmallKV takes plain pages, got kv_dtype={kv_dtype!r}")
    full = families.full_attention(cache_layers(cache.model))
    for dims in map(families.head_dims, families.attention_modules(cache.model, full)):
        if dims is not None and dims[0] != dims[1]:
            raise ValueError(
                f"read: SmallKV takes values as wide as keys, got heads of {dims[0]} and {dims[1]} "
                "numbers"
            )


def read_beside(cache: Cache, tokens: Tensor) -> None:
    """Has the small model beside a cache, if there is one, read a prompt ``[1, T]`` whose entries
    came into the cache without a forward."""
    small = getattr(cache._reader, "looking", None)
    if small is not None:
        small.read(tokens, 0)


def _before_forward(
    of_small: weakref.ref[Small],
    of_cache: weakref.ref[Cache],
    module: torch.nn.Module,
    args: tuple[Any, ...],
    options: Mapping[str, Any],
) -> None:
    if torch.compiler.is_compiling():
        eagerly(_before_forward, of_small, of_cache, module, args, options)
        return
    small, cache = of_small(), of_cache()
    if small is None or cache is None:
        return
    if not any(x is cache for x in (*args, *options.values())):
        return
    tokens = options.get("input_ids", args[0] if args else None)
    mask = options.get("attention_mask")
    if not isinstance(tokens, Tensor):
        raise ValueError("read: a small model beside reads tokens: give input_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.all():
        raise ValueError("read: a small model beside takes a prompt without padding")
    had = cache._full[0].num_seen
    small.read(tokens, had)
    if isinstance(cache._reader, SmallEntries) and cache._kv is not None and cache.reading is None:
        is_read = tokens.shape[1] == 1 and small.looks(had + 1) is not None
        _place(cache, cache._reader.read, is_read=is_read)


@functools.lru_cache(maxsize=2)
def _loaded_on(name: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.to(device).eval()


def _loaded(name: str, large: PreTrainedModel) -> PreTrainedModel:
    try:
        return _loaded_on(name, large.dtype, large.device)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"small can't be loaded: {reason}") from None
