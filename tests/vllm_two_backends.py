"""Engines on the CPU that choose attention backends as those on CUDA do: by the kind of a layer,
and vLLM's own where none is asked for. So the backend for CUDA can be looked at beside another."""

from __future__ import annotations

import os
from typing import Any

from adakv.vllm.config import Settings
from vllm_engine import ENVIRONMENT, Engine, Run, engine

#: vLLM's own one for sliding windows.
FULL_ATTENTION = {"attention_config": {"backend_per_kind": {"full_attention": "CUSTOM"}}}


def run_with_two_backends(
    cases: list[tuple[str, Settings | None, dict[str, Any]]],
    prompts: list[list[int]],
    new_tokens: int,
) -> list[tuple[Run, dict[str, int]] | str]:
    """What comes of requests in engines of some models, settings and options, and how many layers
    have each backend; or why an engine did not start.

    It is for a process of its own, in which vLLM has not been imported: its modules keep the
    platform that they find.
    """
    os.environ.update(ENVIRONMENT)
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform
    from vllm.platforms.interface import DeviceCapability

    class Choosing(CpuPlatform):
        @classmethod
        def get_attn_backend_cls(
            cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
        ) -> str:
            if selected_backend is None:
                return "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"
            reasons = selected_backend.get_class().validate_configuration(
                device_capability=DeviceCapability(9, 0), **attn_selector_config._asdict()
            )
            if reasons:
                raise ValueError(f"backend {selected_backend} is not valid: {reasons}")
            return str(selected_backend.get_path())

    vllm.platforms._current_platform = Choosing()
    results: list[tuple[Run, dict[str, int]] | str] = []
    for model, settings, options in cases:
        try:
            with engine(model, settings, max_num_batched_tokens=100, **options) as it:
                results.append((it.run(prompts, new_tokens), _backends(it)))
                assert it.num_free == it.manager.block_pool.num_gpu_blocks - 1
        except ValueError as error:
            results.append(str(error))
    return results


def _backends(it: Engine) -> dict[str, int]:
    runner = it.core.model_executor.driver_worker.worker.model_runner
    counts: dict[str, int] = {}
    for group in (g for groups in runner.attn_groups for g in groups):
        name = group.backend.get_name()
        counts[name] = counts.get(name, 0) + len(group.layer_names)
    return counts
