"""Layers beside full attention: what hybrid models keep of a text in states of one size.

transformers' own layers hold these states. A :class:`Cache` only watches that they move together
with its keys and values, as a state can't go back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from adakv.hf import families
from adakv.hf.layers import FullAttentionLayer

if TYPE_CHECKING:
    from adakv.hf.cache import Cache

# Older versions of transformers have neither; none of their layers is one of them.
_States: Any = getattr(cache_utils, "LinearAttentionLayer", ())
_StatesAndKeys: Any = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", DynamicLayer)


class HybridLayer(FullAttentionLayer, _StatesAndKeys):
    """A layer with full attention and with states beside it, which are transformers'."""

    def __init__(
        self,
        cache: Cache,
        index: int,
        rotate: families.Rotate | None,
        *,
        is_last: bool,
        number_of_states: int,
    ) -> None:
        super().__init__(cache, index, rotate, is_last=is_last)
        _States.__init__(self, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Those of the states."""
        _States.lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        """Only with the whole cache: see :meth:`Cache.reset`."""
        super().reset()
        _States.__init__(self, self.number_of_states)


def full_attention_layer(
    cache: Cache, own: Any, index: int, rotate: families.Rotate | None, *, is_last: bool
) -> FullAttentionLayer:
    """The layer of ours that stands where transformers has its ``own``."""
    if type(own) is DynamicLayer:
        return FullAttentionLayer(cache, index, rotate, is_last=is_last)
    states = own.number_of_states
    return HybridLayer(cache, index, rotate, is_last=is_last, number_of_states=states)


def reorder_states(layer: Any, beams: Tensor) -> None:
    """The states of a layer's sequences ``beams`` ``[n]`` int64."""
    _States.reorder_cache(layer, beams)


def has_keys(layer: object) -> bool:
    """Whether a layer of a cache holds keys and values of tokens."""
    return isinstance(layer, CacheLayerMixin)


class States:
    """How many forwards have asked for the states of each layer that has any."""

    def __init__(self, layers: Sequence[object]) -> None:
        found = [index for index, layer in enumerate(layers) if isinstance(layer, _States)]
        self._num_asked = dict.fromkeys(found, 0)
        self._first = found[0] if found else None

    def are_at(self, num_forwards: int) -> bool:
        """Whether so many forwards have asked for the states of all layers."""
        return all(count == num_forwards for count in self._num_asked.values())

    def are_ahead(self, num_forwards: int) -> bool:
        """Whether one more has asked for some: it begins with a layer that has states."""
        return self._first is not None and self._num_asked[self._first] > num_forwards

    def begin_at(self, layer: int, num_forwards: int) -> bool:
        """Whether a forward after so many others begins where it asks for this layer's states."""
        return layer == self._first and self._num_asked[layer] >= num_forwards

    def ask(self, layer: int) -> None:
        """A forward asks for a layer's states."""
        self._num_asked[layer] += 1
