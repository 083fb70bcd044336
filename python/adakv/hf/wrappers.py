"""Models that come wrapped: by ``torch.compile``, by PEFT, by what spreads them over devices."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

#: Attributes by which modules hold the model they wrap: OptimizedModule; DDP, FSDP.
_INNER = ("_orig_mod", "module")


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model in ``model``, most often itself.

    Raises
    ------
    ValueError
        If there is none, or if what is around it puts entries into caches, or copies the model.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        if isinstance(inner, torch.nn.DataParallel):
            raise ValueError(
                "model: DataParallel copies it in every forward; give its .module, and run that"
            )
        if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
            _check_peft(inner)
            inner = inner.get_base_model()
            continue
        held = (getattr(inner, name, None) for name in _INNER)
        inner = next((module for module in held if isinstance(module, torch.nn.Module)), None)
        if inner is None:
            raise ValueError(f"model must be a transformers model, got {type(model).__name__}")
    return inner


def _check_peft(model: Any) -> None:
    """Raises ``ValueError`` for adapters that are no part of the layers."""
    for name, config in model.peft_config.items():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"model: its adapter {name!r} is {type(config).__name__}, which gives the model "
                "entries or embeddings of its own before the prompt; adakv works with adapters of "
                "weights, such as LoRA"
            )
