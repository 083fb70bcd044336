"""vLLM's CPU backend, with compressed rows where the engine asks for them.

A compressed layer's blocks have adakv's page format, which none of vLLM's kernels reads; other
layers (sliding windows) and engines without adakv are left to vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from adakv.vllm import hooks
from adakv.vllm.engine_cache import EngineCache
from adakv.vllm.metadata import batch_of
from adakv.vllm.spec import CompressedSpec
from adakv.vllm.steps import Step


class CpuBackend(CPUAttentionBackend):
    """Under the name of the backend that it extends, as vLLM's CPU platform takes no other."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return CPUAttentionBackendImpl if hooks.current_settings() is None else CpuAttention

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return CpuBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return hooks.customized(super().customize_spec(spec))


@dataclass(kw_only=True)
class CpuMetadata(CPUAttentionMetadata):
    """A step of a compressed group; what its layers don't read is as vLLM has it."""

    cache: EngineCache
    step: Step


class CpuBuilder(CPUAttentionMetadataBuilder):
    """Describes a step to a group of layers, compressed or not."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], *args: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, *args)
        self.cache: EngineCache | None = None
        self._is_compressed = isinstance(kv_cache_spec, CompressedSpec)
        self._layers = hooks.layers_of(self.vllm_config, layer_names)
        if self._is_compressed:
            hooks.begin_group(kv_cache_spec, self._layers, self.vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        m = common_attn_metadata
        if not self._is_compressed:
            return super().build(common_prefix_len, m, fast_build)
        if self.cache is None:
            self.cache = hooks.make_cache(self.kv_cache_spec, self._layers, self.vllm_config)
        step = self.cache.begin_step(batch_of(m))
        return CpuMetadata(
            num_actual_tokens=m.num_actual_tokens,
            max_query_len=m.max_query_len,
            query_start_loc=m.query_start_loc,
            max_seq_len=m.max_seq_len,
            seq_lens=m.seq_lens,
            block_table=m.block_table_tensor,
            slot_mapping=m.slot_mapping,
            scheduler_metadata=None,
            cache=self.cache,
            step=step,
        )


class CpuAttention(hooks.Compressing, CPUAttentionBackendImpl):
    """A layer of an engine that asks for adakv."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hooks.check_layer(
            self,
            alibi_slopes=self.alibi_slopes,
            kv_sharing_target_layer_name=self.kv_sharing_target_layer_name,
        )

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """A compressed layer's tokens are appended when it attends."""
        if self.index < 0:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if not isinstance(attn_metadata, CpuMetadata):
            return super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        attn_metadata.cache.attend(self.index, attn_metadata.step, query, key, value, output)
        return output
