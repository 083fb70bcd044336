"""adakv inside vLLM, as a plugin: compressed requests give their blocks back to the engine.

``pip install adakv[vllm]``, and in the engine's configuration::

    LLM(model, additional_config={"adakv": {"policy": "ada_snapkv", "budget": 1024}})

Without that entry vLLM runs as it is. docs/vllm.md says how it works and what is refused.

    scheduler process     plan.py -> spec.py          which blocks go back, and when
    workers               plan.py -> engine_cache.py  what is kept: the verbs on the engine's pages
                          backend_cpu.py, backend_cuda.py: vLLM's names for it
    between them          ledger.py                   both halves agree, or it is an error
"""

from __future__ import annotations


def register() -> None:
    """Entry point ``vllm.general_plugins``, called in every process of vLLM, maybe repeatedly.

    Raises
    ------
    ImportError
        If vLLM is of a version whose hooks this plugin doesn't know.
    """
    import vllm
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs

    from adakv.vllm.config import check_version

    check_version(vllm.__version__)
    # vLLM registers its own specs only while there are none.
    register_all_kvcache_specs(None)
    from adakv.vllm import spec  # noqa: F401  registers itself

    # On the CPU vLLM knows one backend and takes no other name.
    register_backend(AttentionBackendEnum.CPU_ATTN, "adakv.vllm.backend_cpu.CpuBackend")
    register_backend(AttentionBackendEnum.CUSTOM, "adakv.vllm.backend_cuda.CudaBackend")
