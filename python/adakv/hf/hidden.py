"""Hidden states for policies that ask for them: what a layer's attention module is fed.

Attention functions see queries, keys and values alone. So the modules tell the layers of a cache,
in forwards with that cache, by torch's hooks before a forward, which go when the cache goes. Nobody
else has any.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache as TransformersCache

from adakv.hf import families
from adakv.hf.layers import AttendingLayer, eagerly
from adakv.policy import Need


def tell(
    cache: TransformersCache,
    needs: Collection[Need],
    decoder: torch.nn.Module,
    layers: Sequence[int],
) -> None:
    """Has the attention modules of some of a decoder's layers tell those of a cache what they are
    fed, as long as there is the cache, if policies that choose from it need "hidden".

    Raises ``ValueError`` if there is a layer whose module can't be found.
    """
    if "hidden" not in needs:
        return
    modules = families.attention_modules(decoder, layers)
    if {module.layer_idx for module in modules} != set(layers):
        raise ValueError(
            f"model: the policy needs hidden states, and {type(decoder).__name__} doesn't show "
            "which module attends in which layer"
        )
    told = functools.partial(_tell, weakref.ref(cache))
    for module in modules:
        handle = module.register_forward_pre_hook(told, with_kwargs=True)
        weakref.finalize(cache, handle.remove).atexit = False


def _tell(
    found: weakref.ref[TransformersCache],
    module: torch.nn.Module,
    args: tuple[Any, ...],
    options: Mapping[str, Any],
) -> None:
    if torch.compiler.is_compiling():
        eagerly(_tell, found, module, args, options)
        return
    cache = found()
    if cache is None or not any(x is cache for x in (*args, *options.values())):
        return
    hidden = options.get("hidden_states", args[0] if args else None)
    layer = cache.layers[module.layer_idx]
    if isinstance(layer, AttendingLayer) and isinstance(hidden, Tensor):
        layer.hidden = hidden.detach()
