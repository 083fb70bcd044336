"""Lets a transformers model run with adakv's caches, through its public extension points.

An attached model has an attention function (:func:`adakv.hf.layers.attention`) that looks for a tag
on the keys it is given. Keys with a tag come from a cache of ours, and the layer that put the tag
there attends to them; all others get the attention the model had before. Nothing is patched and
nothing is kept on the model.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.generation import GenerationMixin

from adakv.hf import families
from adakv.hf.layers import attention
from adakv.hf.wrappers import unwrapped

_arguments = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters

#: The argument by which models and ``generate`` take a cache: its name is another since 5.24.
CACHE = "cache" if "cache" in _arguments else "past_key_values"

_PREFIX = "adakv_"  # of the attention's name in an attached model

#: How many hold each attached decoder, and the attention that a name of ours stands for.
_holders: weakref.WeakKeyDictionary[PreTrainedModel, int] = weakref.WeakKeyDictionary()
_inners: dict[str, str] = {}
_lock = threading.RLock()


class Attachment:
    """What :func:`attach` did to a model; as a context manager it is undone on leaving."""

    def __init__(self, decoder: PreTrainedModel) -> None:
        self._decoder: PreTrainedModel | None = decoder

    def detach(self) -> None:
        """Lets the model go: the last who does so gives it its former attention back.

        A second call does nothing.
        """
        decoder, self._decoder = self._decoder, None
        if decoder is not None and is_attached(decoder):
            _release(decoder)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()


def attach(model: PreTrainedModel) -> Attachment:
    """Lets a model run with :class:`adakv.Cache`, until :meth:`Attachment.detach`.

    Without such a cache the model computes what it did before, with the attention it had before.
    Attachments are counted: threads, nested blocks and notebook cells may attach a model that is
    attached, and the last one to detach gives it its former attention back. A deep copy of an
    attached model is attached, too.

    Raises
    ------
    ValueError
        If the model can't run with adakv: encoder-decoder models, latent attention (MLA), keys
        shared between layers, values as wide as no key, heads of more than 256 numbers, models that
        don't use transformers' attention interface, flex attention; or if it is in training mode.
    """
    decoder = decoder_of(model)
    cache_layers(decoder)
    if decoder.training:
        raise ValueError("model must be in eval mode (model.eval()), as adakv is for inference")
    with _lock:
        if not is_attached(decoder):
            _install(decoder)
        _holders[decoder] = _holders.get(decoder, 0) + 1
    return Attachment(decoder)


def detach(model: PreTrainedModel) -> None:
    """Undoes one :func:`attach` of a model, whose :class:`Attachment` is not at hand.

    Raises
    ------
    ValueError
        If the model is not attached.
    """
    decoder = decoder_of(model)
    if not is_attached(decoder):
        raise ValueError("model: it is not attached")
    _release(decoder)


def _release(decoder: PreTrainedModel) -> None:
    """One holder less; without any the decoder has its own attention."""
    with _lock:
        left = _holders.get(decoder, 1) - 1
        if left > 0:
            _holders[decoder] = left
        else:
            _holders.pop(decoder, None)
            decoder.set_attn_implementation(_inners[decoder.config._attn_implementation])


def _install(decoder: PreTrainedModel) -> None:
    """Gives a decoder the attention function that knows caches of ours."""
    inner = decoder.config._attn_implementation
    masks = AttentionMaskInterface()
    if inner == "flex_attention" or inner not in masks:
        raise ValueError(
            f"model: its attention must be eager, sdpa or flash attention, not {inner}"
        )
    # One name for each inner attention: functions, like names, can be registered but not removed.
    # transformers takes every name with "flash" in it for one of its own.
    name = _PREFIX + inner.replace("flash_attention", "fa")
    _inners[name] = inner
    AttentionInterface.register(name, functools.partial(attention, inner))
    AttentionMaskInterface.register(name, masks[inner])
    decoder.set_attn_implementation(name)
    if decoder.config._attn_implementation != name:
        raise ValueError(
            f"model: {type(decoder).__name__} doesn't look its attention up in AttentionInterface"
        )


def is_attached(decoder: PreTrainedModel) -> bool:
    """Whether a decoder, as :func:`decoder_of` finds it, runs under :func:`attach` now."""
    return bool(decoder.config._attn_implementation.startswith(_PREFIX))


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that generates text: most often the model itself."""
    model = unwrapped(model)
    families.check(model, [])
    config = model.config.get_text_config(decoder=True)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config is config:
            return module
    raise ValueError(f"model: {type(model).__name__} has no text decoder")


def cache_layers(decoder: PreTrainedModel) -> list[Any]:
    """The layers of transformers' own cache for a model, if adakv works with all of them."""
    layers = own_layers(decoder)
    families.check(decoder, layers)
    return layers


def own_layers(decoder: PreTrainedModel) -> list[Any]:
    """New layers as transformers' own cache has them."""
    return list(DynamicCache(config=decoder.config).layers)
