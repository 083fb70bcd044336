"""The cache for Hugging Face transformers, 4.57 to 5.23.

    model.forward -> Cache.update         first layer: checks everything that can go wrong
                  -> layer.update         tags the new keys with their layer and hands them back
                  -> attention function   keys without a tag: the attention the model had before
                                          a prompt:           that attention, then choose + compact
                                          later tokens:       append + attend

The tag is how an attention function knows its cache: it sits on the very tensor that update()
returned, so that any number of caches and models can run in turn or in threads. A prompt's dense
keys and values die with its layer's forward.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache as TransformersCache
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerationMixin

from adakv.cache import KVCache
from adakv.errors import Error
from adakv.models import families
from adakv.models.attachment import (
    TAG,
    AttendingLayer,
    cache_layers,
    decoder_of,
    inner_attention,
    is_attached,
)
from adakv.models.budget import Budget
from adakv.models.log_sum_exp import with_log_sum_exp
from adakv.models.prompt import Attention, Prompt
from adakv.models.repeat import repeating
from adakv.models.store import Store
from adakv.policy import DEFAULT, Policy

_logger = logging.getLogger("adakv")

# generate(prefill_chunk_size=...) of 4.57 leaves the prompt's last token to a forward of its own.
_LAST_TOKEN_COMES_ALONE = hasattr(GenerationMixin, "_prefill_chunking")

#: Arguments of attention functions that change logits or add some: then torch's log-sum-exp, if
#: there is one, may be another than that of the scores.
_MORE_LOGITS = ("softcap", "s_aux", "position_bias")


class Cache(TransformersCache):
    """A KV cache whose prompts are cut down to what a policy keeps, for ``past_key_values=``.

    Full-attention layers are compressed right after their prefill attention, which sees everything
    (all of them after the last one, if the policy is model-wide).
    Sliding-window layers are transformers' own. Padding is never stored. Later forwards, of one
    token or of several, attend to what was kept and to all newer tokens.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder in eval mode, to be run under :func:`attach` and without gradients.
    policy : str or :class:`adakv.Policy`
        One of :func:`adakv.policies`, or your own. The default measured best of those that read a
        prompt once; docs/quality.md has what it costs.
    budget : int, optional
        Mean entries to keep per kv head, the policy's window included.
    ratio : float in (0, 1], optional
        Instead of ``budget``: the share of each prompt's tokens.
    max_new_tokens : int
        Tokens after the prompt that the pages are made for. CPU memory is taken when it is used.
    chunked_prefill : bool
        The prompt comes in several forwards (``generate(prefill_chunk_size=...)``): its keys and
        values are kept until the first forward of one token, and compressed then; a last chunk of
        one token is not taken for a part of the prompt. Without ``chunked_prefill`` a second
        forward of several tokens is a second turn, from which nothing is evicted.
    page_size : int
        Entries of a page: a power of two from 8 to 256.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: str | Policy = DEFAULT,
        budget: int | None = None,
        ratio: float | None = None,
        *,
        max_new_tokens: int = 4096,
        chunked_prefill: bool = False,
        page_size: int = 16,
    ) -> None:
        decoder = decoder_of(model)
        layers = cache_layers(decoder)
        full = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
        if not full:
            _logger.warning("every layer of the model has a sliding window: nothing to compress")
        self._model = decoder
        self._store = Store(
            Budget.given(policy, budget, ratio),
            num_layers=len(full),
            max_new_tokens=max_new_tokens,
            page_size=page_size,
            is_chunked=chunked_prefill,
        )
        rotate = families.rotation(decoder) if "rotate" in self._store.policy.needs else None
        for index, layer in enumerate(full):
            layers[layer] = FullAttentionLayer(self._store, index, decoder.config, rotate)
        super().__init__(layers=layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention modules, layer by layer."""
        if layer_idx == 0:
            self._begin_forward(key_states)
        elif layer_idx >= len(self.layers):
            raise ValueError(f"the cache has {len(self.layers)} layers: it is of another model")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def stats(self) -> dict[str, Any]:
        """What the cache holds.

        Returns
        -------
        stats : dict
            ``lengths`` ``[L, B, Hkv]`` int32 on the CPU, entries per layer, sequence and kv head (a
            sliding layer: what its window holds); ``seen``, tokens per sequence; and of the
            full-attention layers ``bytes`` in pages, ``pages_used`` and ``full_bytes``, what a full
            cache would hold.
        """
        store = self._store
        seen = torch.tensor(store.seen, dtype=torch.int32)
        heads = self._model.config.num_key_value_heads
        held = store.lengths(heads)
        lengths = [
            held[layer.index]
            if isinstance(layer, FullAttentionLayer)
            else seen.clamp(max=layer.sliding_window - 1)[:, None].expand(-1, heads)
            for layer in self.layers
        ]
        return {
            "lengths": torch.stack(lengths),
            "bytes": store.bytes,
            "full_bytes": store.full_bytes,
            "pages_used": store.pages_used,
            "seen": list(store.seen),
        }

    def kept(self, layer: int) -> list[list[Tensor]]:
        """Positions that a full-attention layer holds: per sequence and kv head int32, ascending.

        Positions count a sequence's own tokens from 0, padding left out.
        """
        if not isinstance(self.layers[layer], FullAttentionLayer):
            raise ValueError(f"layer {layer} has a sliding window and is not compressed")
        return self._store.positions(self.layers[layer].index)

    @torch.no_grad()
    def repeat(self, input_ids: Tensor) -> None:
        """Has the model read its prompts once more, and compresses by what it looks at.

        For policies whose scorer is :class:`adakv.policy.RepeatAttention`, between the prompts'
        forward and everything else; the cache then holds what it kept of the prompts alone.

        Parameters
        ----------
        input_ids : ``[B, R]`` int64
            An instruction such as "Repeat the previous context exactly.", and the prompts.

        Raises
        ------
        ValueError
            If the policy is another, the prompts are of unequal length, or the model has layers
            with a sliding window. The cache is as it was.
        adakv.Error
            If there is no prompt that waits for it.
        """
        if not all(isinstance(layer, FullAttentionLayer) for layer in self.layers):
            raise ValueError("model: its layers with a sliding window can't forget a repetition")
        with repeating(self._store, input_ids.shape[0]):
            self._model.base_model(input_ids, past_key_values=self, use_cache=True)

    def reset(self) -> None:
        """Empties the cache and gives its memory back; the next forward is a new prompt."""
        for layer in self.layers:
            layer.reset()
            if not isinstance(layer, FullAttentionLayer):
                # Some versions only zero a sliding layer's tensors, but the batch may change.
                layer.keys = layer.values = None
                layer.is_initialized = False
        self._store.reset()

    def fill(self, kv: KVCache, slot: int) -> None:
        """Empties the cache; the next prompt, of one sequence, goes into a slot of ``kv``.

        There it is decoded by :class:`adakv.models.decode.Decoder`.
        """
        self.reset()
        self._store.fill(kv, slot)

    def decoded_pages(self) -> tuple[KVCache, list[int]]:
        """The pages and the tokens that each sequence has seen, for a
        :class:`adakv.models.decode.Decoder` to go on with; then :meth:`advance`."""
        if not all(isinstance(layer, FullAttentionLayer) for layer in self.layers):
            raise ValueError(
                "past_key_values: the model has layers with a sliding window, whose steps can't be "
                "recorded; generate without custom_generate"
            )
        return self._store.pages(), list(self._store.seen)

    def advance(self, num_tokens: int) -> None:
        """Says that a decoder appended tokens of every sequence."""
        self._store.advance(num_tokens)
        for layer in self.layers:
            layer.advance(num_tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise ValueError("beam search is not supported: adakv.Cache can't reorder its sequences")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise ValueError("adakv.Cache can't repeat its sequences")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise ValueError("adakv.Cache can't select from its sequences")

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("assisted decoding is not supported: adakv.Cache can't take tokens back")

    def activate_past_recording(self) -> None:
        self.crop()

    def _begin_forward(self, key_states: Tensor) -> None:
        """Finds what would go wrong before any layer is changed."""
        if not is_attached(self._model):
            raise Error("the model is not attached: run it inside adakv.attach(model)")
        if self._model.training or key_states.requires_grad:
            raise ValueError("adakv.Cache is for inference: use model.eval() and torch.no_grad()")
        lengths = {layer.get_seq_length() for layer in self.layers}
        if len(lengths) > 1:
            raise Error("an earlier forward stopped midway: reset() the cache")
        self._store.begin_forward(key_states)
        is_after_prompt = key_states.shape[2] == 1 and 0 not in lengths
        if self._store.is_prompt and is_after_prompt and not _LAST_TOKEN_COMES_ALONE:
            self._store.compact_all()


class FullAttentionLayer(AttendingLayer):
    """A full-attention layer of a :class:`Cache`; what it holds is in the cache's store."""

    def __init__(
        self, store: Store, index: int, config: Any, rotate: families.Rotate | None
    ) -> None:
        super().__init__()
        self.index = index  # among the full-attention layers
        self._store = store
        self._config = config
        self._rotate = rotate
        self._num_seen = 0
        self._sinks: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values, tagged; of a prompt in chunks all that came so far."""
        self._store.check_attended()
        before = self._store.prompt(self.index)
        if before is not None:
            key_states = torch.cat([before.keys, key_states], dim=2)
            value_states = torch.cat([before.values, value_states], dim=2)
        self._store.is_attending = True
        return super().update(key_states, value_states)

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
        """Of a prompt the model's own attention, then choosing; later appends and attends."""
        delattr(key, TAG)
        store = self._store
        store.is_attending = False
        if module.config is not self._config:
            raise ValueError("past_key_values: the cache was made for another model")
        if store.is_repeating:
            result = inner_attention(inner, module, query, key, value, mask, **kwargs)
            store.take_repeat(self.index, query, key)  # and nothing was seen
        elif store.is_prompt:
            attend = partial(inner_attention, inner, module, query, key, value, mask, **kwargs)
            is_causal = mask is None and query.shape[2] == key.shape[2]
            is_plain = all(kwargs.get(name) is None for name in _MORE_LOGITS)
            if "all_queries" in store.policy.needs and is_causal and is_plain:
                result, lse = with_log_sum_exp(attend)
            else:
                result, lse = attend(), None
            self.take_prompt(module, query, key, value, mask, lse, **kwargs)
        else:
            if self.index == 0:
                store.begin_step(mask, query.shape[2])
            attention = Attention(kwargs.get("scaling"), kwargs.get("softcap"), self._sinks)
            result = store.attend(self.index, query, key, value, attention), None
            self._num_seen += query.shape[2]
        return result

    def take_prompt(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        lse: Tensor | None,
        **kwargs: Any,
    ) -> None:
        """What is left to do when a prompt, or a chunk of it, has been attended to."""
        store = self._store
        store.is_attending = False
        if self.index == 0:
            store.begin_prompt(mask, key.shape[0], key.shape[2])
        sinks = kwargs.get("s_aux")
        self._sinks = None if sinks is None else sinks.detach().float()
        options = kwargs.get("scaling"), kwargs.get("softcap")
        attention = Attention(*options, self._sinks, self._rotate)
        before = store.prompt(self.index)
        w_o = None if before is None else before.w_o
        if "w_o" in store.policy.needs and w_o is None:
            width = query.shape[1] * query.shape[3]
            w_o = families.output_projection(module, width, value)
        store.hold(self.index, Prompt(query, key, value, w_o, attention, lse))
        if not store.is_chunked or (query.shape[2] == 1 and _LAST_TOKEN_COMES_ALONE):
            store.compact(self.index)
        self._num_seen += query.shape[2]

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: what positions and masks are made from."""
        return self._num_seen

    def get_mask_sizes(self, queries: int | Tensor) -> tuple[int, int]:
        """Length and offset of the mask, from the number of queries or (4.57) their positions."""
        columns = queries if isinstance(queries, int) else queries.shape[0]
        return self._num_seen + columns, 0

    def advance(self, num_tokens: int) -> None:
        """Only with the whole cache: see :meth:`Cache.advance`."""
        self._num_seen += num_tokens

    def reset(self) -> None:
        """Only with the whole cache: see :meth:`Cache.reset`."""
        self._num_seen = 0
