"""adakv: head-wise KV-cache eviction with real memory and real speed.

``adakv.ops`` holds the verbs, ``adakv.cache`` the cache memory, ``adakv.policy`` what to
keep, and ``adakv.attach`` and ``adakv.Cache`` put it all under a Hugging Face model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from adakv import _C, cache, ops, policy
from adakv._C import __version__, cpu_instruction_set, cuda_unavailable_reason
from adakv.errors import Error
from adakv.policy import Policy, spans_of

if TYPE_CHECKING:
    from adakv.eval.comparison import compare
    from adakv.hf import (
        BatchOptions,
        Cache,
        DraftModel,
        attach,
        classes_of,
        cuda_graph_sample,
        detach,
        generate_batch,
        generate_on,
        generate_stream,
    )

__all__ = [
    "BatchOptions",
    "Cache",
    "DraftModel",
    "Error",
    "Policy",
    "__version__",
    "attach",
    "backends",
    "cache",
    "classes_of",
    "compare",
    "cpu_instruction_set",
    "cuda_graph_sample",
    "cuda_unavailable_reason",
    "detach",
    "generate_batch",
    "generate_on",
    "generate_stream",
    "get_cmake_dir",
    "get_include",
    "match_layers",
    "ops",
    "policies",
    "policy",
    "spans_of",
]


def backends() -> tuple[str, ...]:
    """Names of the backends that run on this machine: ``("cpu",)`` or ``("cpu", "cuda")``."""
    return ("cpu",) if cuda_unavailable_reason() else ("cpu", "cuda")


def policies() -> tuple[str, ...]:
    """Names of the policies that :class:`adakv.Cache` knows."""
    return policy.names()


def get_include() -> str:
    """Folder of the headers, for ``#include <adakv/adakv.h>`` and ``<adakv/c.h>``.

    Raises
    ------
    adakv.Error
        If this adakv was not installed, but runs from a build folder.
    """
    return _installed("include")


def get_cmake_dir() -> str:
    """Folder for ``find_package(adakv CONFIG)``, to be given as ``-Dadakv_DIR=``.

    Raises
    ------
    adakv.Error
        If this adakv was not installed, but runs from a build folder.
    """
    return _installed("lib/cmake/adakv")


def _installed(folder: str) -> str:
    from pathlib import Path

    path = Path(_C.__file__).parent / folder  # where an editable install puts it too
    if not path.is_dir():
        raise Error(f"{path} is not there: install adakv, or run cmake --install on its build")
    return str(path)


def __getattr__(name: str) -> Any:
    # What needs transformers is loaded when it is first used.
    if name == "compare":
        return importlib.import_module("adakv.eval.comparison").compare
    if name in __all__:
        return getattr(importlib.import_module("adakv.hf"), name)
    raise AttributeError(f"module 'adakv' has no attribute {name!r}")
