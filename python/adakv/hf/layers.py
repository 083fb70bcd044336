"""Layers of caches, and the attention function that meets them: it looks for the tag that a layer
put on its keys, and has the layer attend to prompts and steps."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import CacheLayerMixin
from transformers.generation import GenerationMixin

from adakv.devices import AnyCache
from adakv.hf import families, long_rope
from adakv.hf.log_sum_exp import with_log_sum_exp
from adakv.hf.padding import align, restore
from adakv.reading import Part
from adakv.step import Attention

if TYPE_CHECKING:
    from adakv.hf.cache import Cache

# generate(prefill_chunk_size=...) of 4.57 leaves the prompt's last token to a forward of its own.
LAST_TOKEN_COMES_ALONE = hasattr(GenerationMixin, "_prefill_chunking")

#: Arguments of attention functions that change logits or add some: then torch's log-sum-exp, if
#: there is one, may be another than that of the scores.
_MORE_LOGITS = ("softcap", "s_aux", "position_bias")

#: Arguments of attention functions that depend on keys which may be evicted.
_UNHEEDED = ("position_bias", "indices", "block_indices", "sinks")

TAG = "adakv_layer"  # attribute of keys: the cache layer that attends to them

#: How a layer attends that no forward has told of, as its entries come from a file.
UNKNOWN = Attention()


@partial(
    torch.compiler.disable,
    reason="adakv.Cache runs between the graphs of a compiled model, so fullgraph must be False",
)
def eagerly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls ``function`` outside of the graph that torch.compile makes of a model: caches count
    tokens and make room on the host."""
    return function(*args, **kwargs)


def attention(
    inner: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of models that had ``inner`` before they were attached."""
    layer = getattr(key, TAG, None)
    if layer is None and not torch.compiler.is_compiling():
        long_rope.check_dropped(module, query)
    attend = inner_attention if layer is None else layer.attend
    return attend(inner, module, query, key, value, attention_mask, **kwargs)


class AttendingLayer(CacheLayerMixin):
    """A layer of a cache of ours: it tags new keys, and attends to them itself."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    hidden: Tensor | None = None
    """``[B, S, E]``, what its attention module was fed, until the layer attends: see
    :mod:`adakv.hf.hidden`."""

    def lazy_initialization(self, *args: Any) -> None:
        """Nothing to do: pages are made elsewhere."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values, tagged."""
        setattr(key_states, TAG, self)
        return key_states, value_states

    @abstractmethod
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
        """What the attention function of a model that had ``inner`` does with tagged keys.

        Query ``[B, Hq, S, D]``, key and value ``[B, Hkv, T, D]`` as :meth:`update` gave them; the
        result ``[B, S, Hq, D]``, and attention weights where ``inner`` gives any.
        """

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: what positions and masks are made from."""
        return 0

    def get_mask_sizes(self, queries: int | Tensor) -> tuple[int, int]:
        """Length and offset of the mask, from the number of queries or (4.57) their positions."""
        columns = queries if isinstance(queries, int) else queries.shape[0]
        return self.get_seq_length() + columns, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length  # its name in 4.57


class FullAttentionLayer(AttendingLayer):
    """A full-attention layer of a :class:`Cache`, which holds what it stores."""

    is_croppable = True  # asked by transformers 5.24; Cache.crop names what can't be taken back

    def __init__(
        self, cache: Cache, index: int, rotate: families.Rotate | None, *, is_last: bool
    ) -> None:
        super().__init__()
        self.index = index  # among the full-attention layers
        self.num_seen = 0  # tokens, padding included
        self._cache = cache
        self._config = cache.model_config
        self._is_last = is_last
        self._rotate = rotate
        self.attention = Attention()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values, tagged; of a prompt in parts all that came so far."""
        cache = self._cache
        if key_states.dtype is not value_states.dtype:  # RoPE under autocast
            key_states = key_states.to(value_states.dtype)
        if cache.handed_out:
            cache.check_attended()
        if cache.reading is not None and cache.waits:
            side_by_side = cache.reading.side_by_side(self.index)
            key_states, value_states = side_by_side.put(key_states, value_states, self.num_seen)
        cache.handed_out = True
        setattr(key_states, TAG, self)
        return key_states, value_states

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
        """Gives a prompt the model's own attention, then chooses; appends and attends to a step."""
        if torch.compiler.is_compiling():
            return eagerly(self.attend, inner, module, query, key, value, mask, **kwargs)
        delattr(key, TAG)
        cache, hidden, self.hidden = self._cache, self.hidden, None
        cache.handed_out = False
        if module.config is not self._config:
            raise ValueError("past_key_values: the cache was made for another model")
        is_all_again = 0 < self.num_seen == query.shape[2] - 1
        if is_all_again and kwargs.get("use_cache") is False:  # which some models always say
            raise ValueError(
                "use_cache must not be False beside an adakv.Cache: the model feeds its whole text "
                "again in every step"
            )
        if cache.reading is not None:
            needs = cache.reading.policy.needs
            result, part = attend_to_prompt(inner, module, query, key, value, mask, needs, **kwargs)
            self.take(part._replace(hidden=hidden), mask)
            return result
        if self.index == 0:
            cache.begin_step(mask, query.shape[2])
            if kwargs.get("output_attentions") or cache.model_config.output_attentions:
                cache.notices.of_attentions()
        assert cache.step is not None
        if query.dtype is not key.dtype:
            query = query.to(key.dtype)
        if self.attention is UNKNOWN:
            self.attention = attention_of(kwargs)._replace(rotate=self._rotate)
        order = cache.padding.order
        if order is not None:
            query, key, value = (align(x, order) for x in (query, key, value))
        out = cache.step.attend(self.index, query, key, value, self.attention)
        if order is not None:
            out = restore(out, order)
        self.num_seen += query.shape[2]
        if self._is_last:
            cache.end_step()
        return out, None

    def take(self, part: Part, mask: Tensor | None) -> None:
        """What is left to do when a prompt, or a chunk of it, has been attended to.

        ``mask`` is that of :meth:`attend`.
        """
        cache, columns = self._cache, part.queries.shape[2]
        reader = cache.reading
        assert reader is not None
        cache.handed_out = False
        self.attention = part.attention._replace(rotate=self._rotate, w_o=part.w_o)
        part = part._replace(attention=self.attention)
        if self.index == 0:
            cache.begin_part(mask, part.queries.shape[0], columns)
        if cache.padding.order is not None:
            part = _aligned(part, cache.padding.order)
        if not cache.waits:
            cache.finish(self.index, part)
        else:
            entries = reader.side_by_side(self.index).view
            reader.take(self.index, part._replace(entries=entries, lse=None))
            if columns == 1 and LAST_TOKEN_COMES_ALONE:
                cache.finish(self.index)
        self.num_seen += columns
        if self._is_last:
            cache.is_midway = False

    def get_seq_length(self) -> int:
        return self.num_seen

    def get_mask_sizes(self, queries: int | Tensor) -> tuple[int, int]:
        """A chunk that is evicted from has a mask of its own columns: one of all tokens seen would
        take more memory than the cache."""
        length, offset = super().get_mask_sizes(queries)
        columns = length - self.num_seen
        if self._cache.eviction.reads_chunks and columns > 1:
            return columns, self.num_seen
        return length, offset

    def reset(self) -> None:
        """Only with the whole cache: see :meth:`Cache.reset`."""
        self.num_seen, self.hidden = 0, None


def attend_to_prompt(
    inner: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    needs: frozenset[str],
    **kwargs: Any,
) -> tuple[Any, Part]:
    """A prompt's attention as the model had it, and what a :class:`Reader` has to know of it.

    The arguments are those of :meth:`AttendingLayer.attend` and the policy's needs.
    """
    if kwargs.get("cu_seq_lens_q") is not None:
        raise ValueError("cu_seq_lens_q must not be given: a cache holds one text a sequence")
    attend = partial(inner_attention, inner, module, query, key, value, mask, **kwargs)
    is_causal = mask is None and query.shape[2] == key.shape[2]
    is_plain = all(kwargs.get(name) is None for name in _MORE_LOGITS)
    if "all_queries" in needs and is_causal and is_plain:
        result, lse = with_log_sum_exp(attend)
    else:
        result, lse = attend(), None
    query, key = query.to(value.dtype), key.to(value.dtype)
    width = query.shape[1] * value.shape[3]
    w_o = partial(families.output_projection, module, width, value.new_empty(0))
    return result, Part(query, lambda: (key, value), attention_of(kwargs), w_o, lse)


def attention_of(options: dict[str, Any]) -> Attention:
    """How a layer attends, from the keyword arguments of its attention function.

    Raises ``ValueError`` for arguments that say more than a step over kept entries can heed.
    """
    for name in _UNHEEDED:
        if options.get(name) is not None:
            raise ValueError(f"model: its attention takes {name}, which adakv.Cache can't heed")
    sink_logits = options.get("s_aux")
    return Attention(
        options.get("scaling"),
        options.get("softcap"),
        None if sink_logits is None else sink_logits.detach().float(),
    )


def inner_attention(inner: str, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the model's attention was before it was attached."""
    if inner == "eager":  # every modeling file has its own
        attend = sys.modules[type(module).__module__].eager_attention_forward
    else:
        attend = AttentionInterface()[inner]
    return attend(module, *args, **kwargs)


def _aligned(part: Part, order: Tensor) -> Part:
    """With the padding on the left."""
    keys, values = (align(x, order) for x in part.entries())
    hidden = part.hidden
    if hidden is not None:
        hidden = align(hidden[:, None], order)[:, 0]
    return part._replace(
        queries=align(part.queries, order), entries=lambda: (keys, values), hidden=hidden
    )


def contents(
    layers: Sequence[Any], kv: AnyCache | None, slots: slice, seen: Sequence[int], num_kv_heads: int
) -> dict[str, Any]:
    """:meth:`Cache.stats` of a cache's layers, with its sequences in some slots of ``kv``."""
    counts = torch.tensor(seen, dtype=torch.int32)
    num_full = sum(isinstance(layer, FullAttentionLayer) for layer in layers)
    full = torch.zeros(num_full, len(seen), num_kv_heads, dtype=torch.int32)
    entry_bytes = bytes_used = pages_used = 0
    kv_dtype = None
    if kv is not None:
        full = kv.lengths(slots)
        entry_bytes = (kv.head_dim + kv.value_dim) * kv.dtype.itemsize
        bytes_used, pages_used, kv_dtype = kv.bytes_used, kv.pages_used, kv.kv_dtype
    lengths = [
        full[layer.index]
        if isinstance(layer, FullAttentionLayer)
        else counts.clamp(max=getattr(layer, "sliding_window", 1) - 1)[:, None].expand(
            -1, num_kv_heads
        )
        for layer in layers
    ]
    return {
        "lengths": torch.stack(lengths),
        "bytes": bytes_used,
        "full_bytes": sum(seen) * num_full * num_kv_heads * entry_bytes,
        "pages_used": pages_used,
        "kv_dtype": kv_dtype,
        "seen": list(seen),
    }
