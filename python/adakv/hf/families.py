"""What differs between model families, as tables; adding one is a row here and one in the tests.

Scale, logits soft-cap and attention sinks need no row: transformers hands them to its attention
functions. Which layers slide is what transformers' own cache makes of a config.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from adakv.formats import with_number

Rotate = Callable[[Tensor, Tensor], Tensor]

#: Attributes of attention modules that hold the output projection, [E, Hq * D].
OUTPUT_PROJECTIONS = ("o_proj", "dense", "out_proj", "wo", "Wo", "c_proj")

#: Layers of transformers' caches, and types of layers in configs, that adakv works with.
LAYERS = {
    *("DynamicLayer", "DynamicSlidingWindowLayer", "LinearAttentionLayer", "DummyLayer"),
    *("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer"),
}
#: Those of them that hold keys and values of all tokens.
FULL_ATTENTION = {"DynamicLayer", "LinearAttentionAndFullAttentionLayer"}
#: Types in configs of layers that hold keys and values alone.
WITH_KEYS = {"full_attention", "sliding_attention", "chunked_attention"}

#: Model types whose full-attention layers are all turned by the one ``rotary_emb`` of the decoder.
ROTARY = {
    *("glm", "gpt_oss", "granite", "gemma2", "llama", "mistral", "mixtral", "olmo2", "phi3"),
    *("qwen2", "qwen3", "qwen3_moe", "starcoder2"),
}

#: Settings that, if they are there and not 0, make a cache that adakv has no rows for.
UNSUPPORTED = {
    "is_encoder_decoder": "is an encoder-decoder model",
    "kv_lora_rank": "has latent attention (MLA): its cache holds no keys and values of heads",
    "num_kv_shared_layers": "shares keys and values between layers",
}


#: Model types whose attention meets other keys and values than those that its cache gave it.
UNLIKE_ITS_CACHE = {
    "diffllama": "halves the heads of its values between its cache and its attention",
    "doge": "hides keys by a mask that it makes of all values, which a compressed cache hasn't",
    "git": "computes its attention itself instead of looking it up in AttentionInterface",
    "inkling_text": "adds a bias of positions to its attention, which evicted keys would shift",
    "inkling2_text": "adds a bias of positions to its attention, which evicted keys would shift",
    "jetmoe": "repeats its keys and values between its cache and its attention",
    "minimax": "takes no cache but one of its own",
    "minimax_m3_vl_text": "chooses blocks of keys by an index of its own in every step",
    "recurrent_gemma": "keeps its states in its modules instead of in a cache",
    "mllama": "has cross-attention, whose keys are of images and not of the text",
    "mllama_text_model": "has cross-attention, whose keys are of images and not of the text",
}

#: Positions of first tokens, for model types that don't count from 0.
FIRST_POSITION = {"paligemma": 1}

#: Heads that there are kernels for: so many numbers, of which a head has a multiple of 8.
MAX_HEAD_DIM = 256


def check(model: Any, cache_layers: Sequence[object]) -> None:
    """Raises ``ValueError`` unless adakv works with a model and with the layers of its cache."""
    name, config = type(model).__name__, model.config
    reason = UNLIKE_ITS_CACHE.get(getattr(config, "model_type", ""))
    if reason is not None:
        raise ValueError(f"model: {name} {reason}")
    for setting, meaning in UNSUPPORTED.items():
        if getattr(config, setting, None):
            raise ValueError(f"model: {name} {meaning}")
    types = getattr(config, "layer_types", None) or ()
    others = {type(layer).__name__ for layer in cache_layers} - LAYERS
    # Versions that have no layers of their own for states take these types for attention.
    others |= {
        type_
        for type_, layer in zip(types, cache_layers, strict=False)
        if type(layer).__name__ == "DynamicLayer" and type_ not in WITH_KEYS
    }
    is_known = types or any("LinearAttention" in type(layer).__name__ for layer in cache_layers)
    if getattr(model, "_is_stateful", False) and cache_layers and not is_known:
        others.add("recurrent layers")  # whose states transformers' cache doesn't hold
    if others:
        raise ValueError(f"model: {name} has layers without common keys and values: {others}")
    if cache_layers and not any(isinstance(layer, CacheLayerMixin) for layer in cache_layers):
        raise ValueError(f"model: {name} has no attention, and so no cache to compress")
    check_heads(model, full_attention(cache_layers))


def num_kv_heads(config: Any) -> int:
    """As a decoder's config has it."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def full_attention(cache_layers: Sequence[object]) -> list[int]:
    """Which layers of transformers' own cache hold keys and values of all tokens."""
    return [i for i, layer in enumerate(cache_layers) if type(layer).__name__ in FULL_ATTENTION]


def check_heads(model: torch.nn.Module, full: Sequence[int]) -> None:
    """Raises ``ValueError`` unless the heads of the full-attention layers suit the kernels."""
    name, seen = type(model).__name__, set()
    for dims in filter(None, map(head_dims, attention_modules(model, full))):
        for dim in dims:
            if not 8 <= dim <= MAX_HEAD_DIM or dim % 8:
                raise ValueError(
                    f"model: {name} has full attention with heads of {dim} numbers; adakv has "
                    f"kernels for multiples of 8 up to {MAX_HEAD_DIM}"
                )
        seen.add(dims)
    if len(seen) > 1:
        raise ValueError(
            f"model: {name} has full-attention layers with different heads (of keys, of values): "
            f"{seen}"
        )


def head_dims(module: torch.nn.Module) -> tuple[int, int] | None:
    """Numbers of a key and of a value, if an attention module says them of itself."""
    dim = getattr(module, "head_dim", None)
    return (dim, int(getattr(module, "v_head_dim", dim))) if isinstance(dim, int) else None


def attention_modules(model: torch.nn.Module, layers: Sequence[int]) -> list[torch.nn.Module]:
    """Modules that attend in some of a decoder's layers, as far as they say it of themselves."""
    found: list[torch.nn.Module] = []
    ahead = [model] if layers else []
    while ahead:  # as model.modules(), which takes milliseconds
        module = ahead.pop()
        is_attention = type(module).__name__.endswith("Attention")
        if is_attention and getattr(module, "layer_idx", None) in layers and module not in found:
            found.append(module)
        ahead += [*module.children()][::-1]
    return found


def layer_devices(model: torch.nn.Module, layers: Sequence[int]) -> list[torch.device]:
    """Where some of a decoder's layers attend, if they all say it of themselves; else nothing.

    Weights that Accelerate loads when they are needed are where its hooks bring them.
    """
    found: dict[int, torch.device] = {}
    for module in attention_modules(model, layers):
        for part in module.modules():
            place = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
            if place is None:
                place = next((x.device for x in part.parameters() if not x.is_meta), None)
            if place is not None:
                found.setdefault(int(module.layer_idx), _device(place))  # type: ignore[arg-type]
                break
    return [found[layer] for layer in layers] if set(found) == set(layers) else []


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its tokens. Weights that Accelerate loads when they are needed are
    nowhere, and its hooks say where the first of them is going to be."""
    if model.device.type != "meta":
        return model.device
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    places = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((_device(place) for place in places if place is not None), model.device)


def loads_weights(model: torch.nn.Module) -> bool:
    """Whether Accelerate fetches weights in each forward, which a CUDA graph can't record."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    each = (one for hook in hooks for one in getattr(hook, "hooks", (hook,)))
    return any(getattr(hook, "offload", False) for hook in each)


def _device(place: torch.device | str | int) -> torch.device:
    """With its number: the number alone is a GPU's."""
    device = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    return with_number(device)


def check_writes(*models: PreTrainedModel) -> None:
    """Raises ``ValueError`` unless a model and its decoder write with a cache."""
    for model in models:
        if getattr(model.config, "use_cache", True) is False:
            raise ValueError(
                "model: its config has use_cache=False, so that it would feed its whole text again "
                "in every step; set model.config.use_cache = True"
            )
        if model.training:
            raise ValueError("model must be in eval mode: adakv.Cache is for inference")


def check_output_projections(model: torch.nn.Module, full: Sequence[int]) -> None:
    """Raises ``ValueError`` if an attention module of these layers shows no output projection."""
    for module in attention_modules(model, full):
        if not any(
            isinstance(getattr(module, name, None), torch.nn.Module) for name in OUTPUT_PROJECTIONS
        ):
            raise ValueError(_no_projection(module, "E, Hq * D"))


def output_projections(
    model: torch.nn.Module, full: Sequence[int], width: int, like: Tensor
) -> list[Callable[[], Tensor]]:
    """:func:`output_projection` of each of these layers."""
    modules = {int(x.layer_idx): x for x in attention_modules(model, full)}  # type: ignore[arg-type]
    return [partial(output_projection, modules[layer], width, like) for layer in full]


def _no_projection(module: torch.nn.Module, shape: str) -> str:
    return (
        f"model: the policy needs the weight [{shape}] of the output projection, and "
        f"{type(module).__name__} has none named {', '.join(OUTPUT_PROJECTIONS)}"
    )


def output_projection(module: torch.nn.Module, width: int, like: Tensor) -> Tensor:
    """``[E, width = Hq * D]`` in the dtype of ``like``: what an attention module's heads meet.

    A projection whose weight can't be read, being quantized or adapted, shows it by what it makes
    of unit vectors; that takes as long as projecting ``width`` tokens.
    """
    for name in OUTPUT_PROJECTIONS:
        projection = getattr(module, name, None)
        if isinstance(projection, torch.nn.Linear) and _is_plain(projection.weight):
            if projection.in_features == width:
                return projection.weight.detach().to(like.dtype)
        elif isinstance(projection, torch.nn.Module):
            units = torch.eye(width + 1, width, dtype=like.dtype, device=like.device)
            rows = projection(units).detach()  # the last one is the bias
            return (rows[:-1] - rows[-1]).mT.contiguous()
    raise ValueError(_no_projection(module, f"E, {width}"))


def _is_plain(weight: Tensor) -> bool:
    """Whether it holds the very numbers that are multiplied by, without scales elsewhere."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    is_there = not weight.is_meta  # offloaded weights come when the module is called
    return type(weight) in (Tensor, torch.nn.Parameter) and weight.dtype in dtypes and is_there


def rotation(decoder: torch.nn.Module) -> Rotate:
    """A decoder's RoPE without its scaling: turns ``[B, H, n, D]`` at positions ``[n]`` or
    ``[B, n]``."""
    name = getattr(decoder.config, "model_type", None)
    modules = [m for path, m in decoder.named_modules() if path.split(".")[-1] == "rotary_emb"]
    if name not in ROTARY or len(modules) != 1:
        raise ValueError(
            f"model: the policy foresees queries, for which RoPE must be known; it is for "
            f"{', '.join(sorted(ROTARY))}, not for {name}"
        )
    (embedding,) = modules
    turn = sys.modules[type(embedding).__module__].apply_rotary_pos_emb

    def rotate(x: Tensor, positions: Tensor) -> Tensor:
        angles = embedding(x, positions.view(-1, positions.shape[-1]))
        cos, sin = (part.to(x.device) for part in angles)  # it may lie on another device
        scale = embedding.attention_scaling
        turned: Tensor = turn(x, x, cos / scale, sin / scale)[0]
        return turned

    return rotate
