"""Caches that come from elsewhere and go there: files, and entries that somebody else made."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor

from adakv.cache import KVCache
from adakv.errors import Error
from adakv.hf import from_entries, saving
from adakv.hf.branches import BranchingCache, check_branches
from adakv.hf.layers import UNKNOWN, FullAttentionLayer
from adakv.hf.pool_size import pages_of
from adakv.shape import Shape
from adakv.tiered_cache import TieredCache

Self = TypeVar("Self", bound="StoredCache")


class StoredCache(BranchingCache):
    """A cache that can be saved, loaded and made of entries."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError(
            "adakv.Cache can't be pickled, its pages belong to this process: save() it"
        )

    def save(self, path: str | os.PathLike[str], notes: dict[str, str] | None = None) -> None:
        """Writes what the cache holds to one safetensors file (docs/memory.md, Files).

        ``notes`` are texts of your own, which :func:`adakv.hf.saving.notes_of` reads again.

        Raises
        ------
        adakv.Error
            If it holds nothing, or a prompt is still being read.
        ValueError
            If the model has layers with states, or a text was evicted from. Nothing is written.
        """
        cache: Any = self
        check_branches(cache, "save")
        if cache._kv is None:
            raise Error("save: the cache holds nothing")
        if isinstance(cache._kv, TieredCache):
            raise ValueError(f"save: files hold one format, got kv_dtype={cache._kv.kv_dtype!r}")
        for layer in cache.layers:
            if not isinstance(layer, FullAttentionLayer) or hasattr(layer, "number_of_states"):
                saving.check_window(layer)
        if cache.eviction.text is not None and cache._seen != list(cache.prompt_lens):
            raise ValueError("save: a text is evicted from (decode_budget), which files don't hold")
        saving.save(cache, cache._kv, path, notes or {})

    @property
    def columns(self) -> int:
        """Columns of the model's masks so far: tokens of each sequence with padding."""
        cache: Any = self
        return int(cache._full[0].num_seen)

    def pages_for_rows(self, shape: Shape, lengths: Tensor) -> KVCache:
        """Pages for rows of ``lengths`` ``[L, B, Hkv]`` int32, which are to be filled, and for
        tokens behind them."""
        cache: Any = self
        stored, page_size = cache._allocation.pages(cache.budget, shape)
        return pages_of(stored, page_size, lengths, cache._allocation.max_new_tokens)

    @classmethod
    def load(
        cls: type[Self],
        model: Any,
        path: str | os.PathLike[str],
        *,
        policy: Any = None,
        max_new_tokens: int = 4096,
        page_size: int | None = None,
        read: Any = None,
    ) -> Self:
        """A cache that :meth:`save` wrote, on the device of the model.

        Parameters
        ----------
        model : PreTrainedModel
            The one that it was made for, with the same weights.
        path : str or Path
        policy : str or :class:`adakv.Policy`, optional
            For prompts after a :meth:`reset`. Default: that of the file, if it can be written down.
        max_new_tokens, page_size, read : optional
            As :class:`adakv.Cache` takes them.

        Raises
        ------
        OSError
            If there is no such file.
        ValueError
            If it was made for another model.
        adakv.Error
            If it is no such file, or was cut or altered.
        """
        settings = {"max_new_tokens": max_new_tokens, "page_size": page_size, "read": read}
        loaded: Self = saving.load(cls, model, path, policy, settings)
        return loaded

    @classmethod
    def from_entries(
        cls: type[Self],
        model: Any,
        keys: Any,
        values: Any,
        positions: Any,
        seen: int | Sequence[int],
        *,
        bias: Any = None,
        max_new_tokens: int = 4096,
        page_size: int | None = None,
        kv_dtype: str | None = None,
    ) -> Self:
        """A cache of entries that were made elsewhere: chosen by other code, or trained.

        Parameters
        ----------
        model : PreTrainedModel
            A decoder with full attention in every layer.
        keys, values : ``[L][B][Hkv]`` tensors ``[n, D]``
            Of the model's dtype, keys behind RoPE. Kv heads may have different n. Where all n of a
            layer are equal, a tensor ``[B, Hkv, n, D]`` will do for it.
        positions : ``[L][B][Hkv]`` integer tensors ``[n]``
            Where the entries stood, ascending.
        seen : int or ints ``[B]``
            Tokens of each sequence: its next one has this position. The model's masks have as many
            columns as the longest sequence, padded on the left.
        bias : ``[L][B][Hkv]`` floating-point tensors ``[n]``, optional
            What is added to the logits of the entries, held in float16; in pages of "auto" alone.
        max_new_tokens, page_size, kv_dtype : optional
            As :class:`adakv.Cache` takes them.

        Raises
        ------
        ValueError
            If one of them isn't as said here; names the row.
        adakv.Error
            If there is no memory.
        """
        settings = {"max_new_tokens": max_new_tokens, "page_size": page_size, "kv_dtype": kv_dtype}
        entries = (keys, values, positions)
        made: Self = from_entries.from_entries(cls, model, entries, seen, bias, settings)
        return made

    def go_on_from(
        self,
        kv: KVCache,
        seen: list[int],
        prompt_lens: list[int],
        columns: int,
        *,
        first_sequence: int = 0,
    ) -> None:
        """An empty cache has pages that were filled elsewhere: of sequences of so many tokens, in
        so many columns of the model's masks, from a slot of ``kv`` on."""
        cache: Any = self
        cache._kv, cache._seen, cache.prompt_lens = kv, seen, prompt_lens
        cache._first, cache.reading = first_sequence, None
        cache._heads = kv.num_kv_heads, kv.head_dim, kv.value_dim
        cache._num_forwards = 2  # what comes now is not taken for more of the prompt
        for layer in cache._full:
            layer.num_seen, layer.attention = columns, UNKNOWN
