"""What torch's attention knows of a prompt and doesn't tell: the log-sum-exp of each query.

Fused kernels compute it along the way, but ``scaled_dot_product_attention`` returns the outputs
alone. Scorers that read all of a prompt's queries save a pass over queries and keys by it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_Result = TypeVar("_Result")

_aten = torch.ops.aten
_CHOICE = _aten.scaled_dot_product_attention.default  # calls one of many kernels

#: Kernels whose second result it is, and where in their arguments it is asked for, if it has to be.
_KERNELS: dict[object, int | None] = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default: None,
    _aten._scaled_dot_product_flash_attention.default: None,
    _aten._scaled_dot_product_cudnn_attention.default: 4,
}


def with_log_sum_exp(attend: Callable[[], _Result]) -> tuple[_Result, Tensor | None]:
    """What ``attend()`` returns, and what its newest call of torch's attention knew.

    Returns
    -------
    result
    lse : ``[B, Hq, S]`` float32, optional
        Natural logarithms; None if the kernel that torch chose has none, if attention is not
        torch's, or while a graph is compiled.
    """
    if torch.compiler.is_compiling():
        return attend(), None
    with _Watch() as watch:
        return attend(), watch.lse


class _Watch(TorchDispatchMode):
    """Sees every operator, below autograd."""

    lse: Tensor | None = None

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if operator is _CHOICE:  # in inference mode it comes undecided
            with self:
                return operator.decompose(*args, **kwargs)
        if operator not in _KERNELS:
            return operator(*args, **kwargs)
        asks = _KERNELS[operator]
        if asks is not None:
            args = (*args[:asks], True, *args[asks + 1 :])
        result = operator(*args, **kwargs)
        self.lse = result[1].reshape(args[0].shape[:3]).contiguous()
        return result
