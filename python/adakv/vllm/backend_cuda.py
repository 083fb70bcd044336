"""A backend for CUDA, under vLLM's name for those of others: ``attention_backend="CUSTOM"``.

It is one for layers that attend to all tokens. vLLM takes another one for layers with sliding
windows, and gives them caches of their own, if ``backend_per_kind`` names this one for the former.

Blocks are head-major, so that one block of one kv head is one page. Prompts are read by vLLM's
FlashAttention where it can, decode steps by adakv, also from CUDA graphs. The tables of a step are
made in ``build``, outside of any graph, where prompts that have ended are compressed, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from adakv.vllm import hooks
from adakv.vllm.engine_cache import EngineCache
from adakv.vllm.metadata import batch_of, decode_batch_of, is_decode
from adakv.vllm.prompt_attention import FlashAttention
from adakv.vllm.steps import Buffers, Step


class CudaBackend(AttentionBackend):
    """For layers that are compressed."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", "float32"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(8)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 8 == 0 and head_size <= 256

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_dcp(cls) -> bool:
        return False

    @classmethod
    def supports_pcp(cls) -> bool:
        return False

    @classmethod
    def validate_configuration(
        cls, *args: Any, has_sliding_window: bool = False, **kwargs: Any
    ) -> list[str]:
        """Also says what to ask for where some layers have sliding windows."""
        reasons = super().validate_configuration(*args, **kwargs)
        if has_sliding_window:
            reasons.append(
                "adakv leaves layers with sliding windows to another backend: instead of "
                f'attention_backend="CUSTOM" give the engine {hooks.BACKEND_OF_FULL_ATTENTION}'
            )
        return reasons

    @staticmethod
    def get_impl_cls() -> type[CudaAttention]:
        if hooks.current_settings() is None:
            raise ValueError('attention_backend="CUSTOM" needs additional_config={"adakv": {...}}')
        return CudaAttention

    @staticmethod
    def get_builder_cls() -> type[CudaBuilder]:
        return CudaBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        customized = hooks.customized(spec)
        if customized is spec:
            raise ValueError(
                'adakv can\'t compress a layer with the backend "CUSTOM": it must attend to all '
                f"tokens, got {spec}"
            )
        return customized


@dataclass
class CudaMetadata:
    """A step of a compressed group."""

    cache: EngineCache
    step: Step
    num_actual_tokens: int


class CudaBuilder(AttentionMetadataBuilder[CudaMetadata]):
    """Describes a step to a group of layers."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )
    reorder_batch_threshold: int | None = 1

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.cache: EngineCache | None = None
        self._buffers: Buffers | None = None
        self._max_seq_len = vllm_config.model_config.max_model_len
        self._layers = hooks.layers_of(vllm_config, layer_names)
        hooks.begin_group(kv_cache_spec, self._layers, vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> CudaMetadata:
        m = common_attn_metadata
        if self.cache is None or self._buffers is None:
            config = self.vllm_config
            flash = flash_attention(self._layers[0], self.kv_cache_spec.block_size)
            self.cache = hooks.make_cache(self.kv_cache_spec, self._layers, config, flash)
            most, heads = hooks.most_requests(config), self._layers[0].impl.num_heads
            self._buffers = self.cache.buffers(most, self._max_seq_len, heads)
        if is_decode(m):
            step = self.cache.begin_step(decode_batch_of(m, self._max_seq_len), self._buffers)
        else:
            step = self.cache.begin_step(batch_of(m))
        return CudaMetadata(self.cache, step, m.num_actual_tokens)


def flash_attention(layer: Any, block_size: int) -> FlashAttention | None:
    """vLLM's FlashAttention, if it reads prompts of such layers on this device."""
    from vllm.v1.attention.backends import fa_utils

    impl, dtype = layer.impl, layer.kv_cache_torch_dtype
    version = fa_utils.get_flash_attn_version(
        head_size=impl.head_size,
        has_sinks=impl.sinks is not None,
        requires_softcap=bool(impl.logits_soft_cap),
    )
    reads_pages = dtype in (torch.float16, torch.bfloat16) and block_size % 16 == 0
    if version not in (2, 3) or not reads_pages or (version == 2 and impl.sinks is not None):
        return None
    one = torch.ones((), device="cuda")  # what scales are where nothing is quantized

    def write(
        keys: Tensor, values: Tensor, into_keys: Tensor, into_values: Tensor, slots: Tensor
    ) -> None:
        fa_utils.reshape_and_cache_flash(
            keys, values, into_keys, into_values, slots, "auto", one, one
        )

    return FlashAttention(fa_utils.flash_attn_varlen_func, write, version)


class CudaAttention(hooks.Compressing, AttentionImpl[CudaMetadata]):
    """A layer of an engine that asks for adakv."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap
        self.attn_type = attn_type
        self.sinks = sinks
        hooks.check_layer(
            self,
            alibi_slopes=alibi_slopes,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
        )

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CudaMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("adakv's attention gives no quantized output")
        if attn_metadata is None:  # vLLM is measuring memory
            return output.zero_()
        tokens = slice(0, attn_metadata.num_actual_tokens)
        attn_metadata.cache.attend(
            self.index,
            attn_metadata.step,
            query[tokens],
            key[tokens],
            value[tokens],
            output[tokens],
        )
        return output
