"""What the backends of both devices share: from vLLM's objects to :class:`EngineCache`.

A backend is asked for its classes while the model's layers are made, which is when the engine's
configuration is known: there everything is checked. Metadata builders come later, caches are bound
after them; so a builder makes the :class:`EngineCache` at its first step.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.config import (
    VllmConfig,
    get_current_vllm_config_or_none,
    get_layers_from_vllm_config,
)
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import Attention as AttentionLayer
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import FullAttentionSpec

from adakv.formats import check_kv_dtype
from adakv.step import Attention
from adakv.vllm.admission import set_limits
from adakv.vllm.config import Settings, check_engine
from adakv.vllm.engine_cache import EngineCache
from adakv.vllm.ledger import Ledger, LedgerScheduler, ledger_name
from adakv.vllm.page_memory import Pages, entry_bytes
from adakv.vllm.pages import spans_layers
from adakv.vllm.prompt_attention import FlashAttention
from adakv.vllm.ranks import Across, OneReader
from adakv.vllm.rotation import rotation
from adakv.vllm.spec import CompressedSpec

_logger = logging.getLogger("adakv")

#: What a CUDA engine needs where only some layers are compressed; vLLM chooses for the others.
BACKEND_OF_FULL_ATTENTION = 'attention_config={"backend_per_kind": {"full_attention": "CUSTOM"}}'

#: Of the engine whose layers were made last: customize_spec() is called without a configuration.
_engine: tuple[VllmConfig, Settings] | None = None

_parents: weakref.WeakKeyDictionary[AttentionLayer, weakref.ref[torch.nn.Module]] = (
    weakref.WeakKeyDictionary()
)

#: Weights of output projections that the engine doesn't hold as they are.
_unpacked: weakref.WeakKeyDictionary[RowParallelLinear, Tensor] = weakref.WeakKeyDictionary()


@functools.cache
def _warn(message: str) -> None:
    """Once in a process."""
    _logger.warning("adakv: %s", message)


class Compressing:
    """What attention layers of both devices are besides vLLM's own."""

    index = -1  # in its compressed group; -1: vLLM's own


def current_settings() -> Settings | None:
    """Settings of the engine whose layers are being made; None if it doesn't ask for adakv.

    Raises
    ------
    ValueError
        If it asks for something that can't be done.
    """
    global _engine
    config = get_current_vllm_config_or_none()
    settings = None if config is None else Settings.of(config.additional_config)
    if config is None or settings is None:
        _engine = None
        set_limits(None)
        return None
    check_engine(config)
    settings.check_ranks(config)
    check_kv_dtype(settings.kv_dtype, config.model_config.dtype)
    if settings.when == "pressure" and config.speculative_config is not None:
        raise ValueError('adakv: drafts need "when": "always", got "pressure"')
    if settings.rule is not None and config.speculative_config is not None:
        raise ValueError("adakv: decode_budget must not be given with drafts")
    if settings.kv_dtype == "int4" and config.speculative_config is not None:
        raise ValueError(
            "adakv: drafts must not be used with blocks of int4: what they fill can't be taken back"
        )
    if config.cache_config.enable_prefix_caching and settings.window is None:
        _warn(f"prefix caching finds nothing: {settings.policy} hears all queries of a prompt")
    _engine = config, settings
    set_limits(settings.limits)
    return settings


def layer_is_made(parent: torch.nn.Module, layer: torch.nn.Module) -> None:
    """A module with an attention backend was put into its parent.

    Raises
    ------
    ValueError
        If it should be compressed, but its backend is not ours, or the policy can't work with it.
    """
    settings = current_settings() if isinstance(layer, AttentionLayerBase) else None
    if settings is None or _engine is None:
        return
    if isinstance(layer, AttentionLayer):
        _parents[layer] = weakref.ref(parent)
        if layer.sliding_window is not None:
            _check_sliding_window(*_engine)
        elif not isinstance(layer.impl, Compressing):
            raise ValueError(
                "adakv needs its own attention backend here: give the engine "
                f'attention_backend="CUSTOM" instead of {layer.attn_backend.get_name()}, or, where '
                f"some layers have sliding windows, {BACKEND_OF_FULL_ATTENTION}"
            )
        if "rotate" in settings.preset.needs:
            rotation(parent, _model_type(_engine[0]), torch.device("cpu"))


def _check_sliding_window(config: VllmConfig, settings: Settings) -> None:
    """Raises ``ValueError`` if layers with sliding windows can't have blocks beside ours."""
    if settings.kv_dtype != "auto":
        raise ValueError(
            "adakv leaves layers with sliding windows to vLLM, whose blocks must be as large as "
            f'ours: kv_dtype must be "auto" for such models, got {settings.kv_dtype!r}'
        )
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise ValueError(
            "adakv leaves layers with sliding windows to vLLM, and they need blocks of their own: "
            "disable_hybrid_kv_cache_manager must be off, got on"
        )


def customized(spec: Any) -> Any:
    """A layer's cache spec, compressed if the engine asks for it and the layer attends to all."""
    is_whole = (
        type(spec) is FullAttentionSpec
        and spec.sliding_window is None
        and spec.attention_chunk_size is None
        and not spec.non_causal
    )
    if _engine is None or not is_whole:
        return spec
    config, settings = _engine
    if spec.head_size != spec.head_size_v or spec.head_size % 8 or spec.head_size > 256:
        raise ValueError(
            "adakv can't compress this model: head size must be a multiple of 8, at most 256, and "
            f"that of values the same, got {spec.head_size} and {spec.head_size_v}"
        )
    num_ranks = config.parallel_config.tensor_parallel_size
    if settings.kv_dtype == "int4" and spec.block_size != 32:
        raise ValueError(f"adakv: block_size must be 32 for int4, got {spec.block_size}")
    if settings.kv_dtype != "auto":
        size = entry_bytes(settings.kv_dtype, spec.head_size, spec.dtype)
        spec = replace(spec, dtype=torch.uint8, state_content_bytes=size)
    rule = settings.rule
    if rule is not None and rule.every < 2 * spec.block_size:
        raise ValueError(
            f"adakv: every must be at least two blocks of {spec.block_size} tokens each, "
            f"got {rule.every}"
        )
    return CompressedSpec.of(
        spec,
        budget=settings.budget,
        ledger=ledger_name(config, config.parallel_config.data_parallel_rank),
        reads_outputs_again=config.use_v2_model_runner,
        under_pressure=settings.when == "pressure",
        least=settings.limits.least,
        protects=settings.limits.protects,
        reads_classes=settings.limits.reads_classes,
        window=settings.window,
        spans_layers=spans_layers(settings.preset) or settings.crosses(num_ranks),
        decode_budget=rule and rule.budget,
        every=0 if rule is None else rule.every,
        decode_window=0 if rule is None else rule.policy.window,
    )


def check_layer(impl: Any, *, alibi_slopes: Any, kv_sharing_target_layer_name: str | None) -> None:
    """Raises ``ValueError`` if a layer attends in a way that the verbs don't know."""
    refused = {
        "ALiBi": alibi_slopes is not None,
        "layers that share another's cache": kv_sharing_target_layer_name is not None,
        "attention other than a decoder's": impl.attn_type != AttentionType.DECODER,
        "more than 16 q heads per kv head": impl.num_heads > 16 * impl.num_kv_heads,
    }
    for reason, holds in refused.items():
        if holds:
            raise ValueError(f"adakv can't compress this model: it has {reason}")


def make_cache(
    spec: CompressedSpec,
    layers: Sequence[AttentionLayer],
    config: VllmConfig,
    flash: FlashAttention | None = None,
) -> EngineCache:
    """The cache of a group of layers whose memory has been bound."""
    settings = Settings.of(config.additional_config)
    if settings is None:
        raise ValueError('additional_config must have an entry "adakv"')
    block, heads = spec.block_size, spec.num_kv_heads
    pages = [_pages(layer, spec, settings.kv_dtype) for layer in layers]
    ledger = Ledger.open(spec.ledger, len(pages[0].entries) // heads)
    attentions = [_attention(layer.impl) for layer in layers]
    if "rotate" in settings.preset.needs:
        model_type, device = _model_type(config), pages[0].entries.device
        attentions = [
            attention._replace(rotate=rotation(_parents[layer](), model_type, device))
            for attention, layer in zip(attentions, layers, strict=True)
        ]
    group = get_tp_group()
    scheduler = LedgerScheduler(ledger, counts=group.rank_in_group == 0)
    across = None
    if settings.crosses(group.world_size):
        across = Across(group.rank_in_group, lambda scores: group.all_gather(scores[None], dim=0))
        tell = partial(torch.distributed.broadcast, src=group.first_rank, group=group.cpu_group)
        scheduler = OneReader(ledger, reads=group.rank_in_group == 0, tell=tell)
    return EngineCache(
        settings.policy_for(block, across),
        settings.budget,
        pages,
        num_kv_heads=heads,
        attentions=attentions,
        w_o=lambda index: _output_weight(layers[index]),
        scheduler=scheduler,
        flash=flash,
        rule=settings.rule,
        num_requests=most_requests(config),
    )


def most_requests(config: VllmConfig) -> int:
    """Most requests that a step works on, padding included."""
    recorded = config.compilation_config.max_cudagraph_capture_size or 0
    return max(config.scheduler_config.max_num_seqs, recorded)


def _pages(layer: AttentionLayer, spec: CompressedSpec, kv_dtype: str) -> Pages:
    """A layer's part of the engine's memory ``[blocks, Hkv, P, bytes of an entry]``."""
    memory, head_dim = layer.kv_cache, spec.head_size
    if kv_dtype == "auto":
        return Pages(memory.view(-1, 2, spec.block_size, head_dim))
    memory, dtype = memory.view(-1, *memory.shape[2:]), layer.kv_cache_torch_dtype
    return Pages.within(memory, kv_dtype, head_dim=head_dim, dtype=dtype)


def layers_of(config: VllmConfig, names: list[str]) -> list[AttentionLayer]:
    """The attention layers of a group, in order."""
    found = get_layers_from_vllm_config(config, AttentionLayer, names)
    return [found[name] for name in names]


def begin_group(spec: CompressedSpec, layers: Sequence[AttentionLayer], config: VllmConfig) -> None:
    """Numbers the layers of a compressed group.

    Raises
    ------
    ValueError
        If there are others, and the policy chooses from all layers together.
    """
    for index, layer in enumerate(layers):
        layer.impl.index = index
    everywhere = get_layers_from_vllm_config(config, AttentionLayer).values()
    impls = [layer.impl for layer in everywhere]
    compressed = sum(isinstance(impl, Compressing) and impl.index >= 0 for impl in impls)
    if spec.spans_layers and compressed != len(layers):
        raise ValueError(
            "adakv: a policy whose layers keep unequally much needs all of them in one group of "
            f"the engine's caches, got one of {len(layers)} of {compressed} layers"
        )


def _attention(impl: Any) -> Attention:
    sinks = None if impl.sinks is None else impl.sinks.float()
    return Attention(impl.scale, impl.logits_soft_cap or None, sinks)


def _model_type(config: VllmConfig) -> str:
    return str(config.model_config.hf_text_config.model_type)


def _output_weight(layer: AttentionLayer) -> Tensor:
    """``[E, Hq * D]``, in the layer's dtype, also where the engine packs or quantizes it."""
    parent = _parents[layer]()
    width = layer.num_heads * layer.head_size
    found = [
        child
        for child in (() if parent is None else parent.children())
        if isinstance(child, RowParallelLinear) and child.input_size_per_partition == width
    ]
    if len(found) != 1:
        raise ValueError(
            f"a policy that weighs values needs the one output projection of {layer.layer_name}, "
            f"got {len(found)}"
        )
    return _weight(found[0], width, layer.dtype)


def _weight(linear: RowParallelLinear, width: int, dtype: torch.dtype) -> Tensor:
    weight = linear.weight
    if weight.shape == (linear.output_size, width) and weight.dtype == dtype:
        return weight.data
    if linear not in _unpacked:
        eye = torch.eye(width, dtype=dtype, device=weight.device)
        _unpacked[linear] = linear.quant_method.apply(linear, eye).T.contiguous()
    return _unpacked[linear]
