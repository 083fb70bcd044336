"""adakv inside vLLM, as a plugin: compressed requests give their blocks back to the engine.

``pip install adakv[vllm]``, and in the engine's configuration::

    LLM(model, additional_config={"adakv": {"policy": "ada_snapkv", "budget": 1024}})

Without that entry vLLM runs as it is. docs/vllm.md says how it works and what is refused.

    scheduler process     plan.py -> spec.py          which blocks go back, and when
    workers               plan.py -> engine_cache.py  what is kept: the verbs on the engine's pages
                          rows.py, pages.py           where rows of requests lie
                          prompts.py                  prompts while they are read
                          texts.py                    texts while they are written
                          backend_cpu.py, backend_cuda.py: vLLM's names for it
    between them          ledger.py                   orders to compress, and that both halves agree
    where requests come   admission.py, requests.py   what single requests ask for
"""

from __future__ import annotations

import functools


def register() -> None:
    """Entry point ``vllm.general_plugins``, called in every process of vLLM, maybe repeatedly.

    Raises
    ------
    ImportError
        If vLLM is of a version whose hooks this plugin doesn't know.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    import vllm
    from adakv.vllm.config import check_version

    check_version(vllm.__version__)
    from adakv.vllm import spec  # noqa: F401  registers itself

    _watch_layers()
    _clean_up()
    # On the CPU vLLM knows one backend and takes no other name.
    register_backend(AttentionBackendEnum.CPU_ATTN, "adakv.vllm.backend_cpu.CpuBackend")
    register_backend(AttentionBackendEnum.CUSTOM, "adakv.vllm.backend_cuda.CudaBackend")


@functools.cache
def _watch_layers() -> None:
    """Has torch tell of every attention layer that a model gets: the one moment at which an engine
    that asks for what can't be done is heard of, whatever backend it has."""
    from torch.nn import Module
    from torch.nn.modules.module import register_module_module_registration_hook

    def look(parent: Module, name: str, child: Module | None) -> None:
        if child is not None and hasattr(child, "attn_backend"):
            from adakv.vllm import hooks

            hooks.layer_is_made(parent, child)

    register_module_module_registration_hook(look)


@functools.cache
def _clean_up() -> None:
    """Leaves no ledger behind: vLLM's front process ends after its engines, killed or not."""
    from adakv.vllm.ledger import remove_unused_at_exit

    remove_unused_at_exit()
