"""Refuses requests that ask for what their engine can't do, when they come.

vLLM asks every logits processor, in the process that takes requests, whether a request's parameters
are right. This one does nothing else, under both model runners.

Entry point ``vllm.logits_processors``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor as FirstRunners

from adakv.vllm.requests import Limits, Wishes

SecondRunners: Any
try:
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

    SecondRunners = LogitsProcessor
except ImportError:  # a version without that runner, whose engines load this, too
    SecondRunners = object

#: Of this process's engine, as far as it is known here.
_limits: Limits | None = None


def set_limits(limits: Limits | None) -> None:
    """Says what requests of this process may ask for."""
    global _limits
    _limits = limits


class Admission(FirstRunners, SecondRunners):
    """Leaves logits as they are."""

    def __init__(self, *args: Any) -> None:
        pass

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises ``ValueError`` if a request asks for something else than it may."""
        wishes = Wishes.of(sampling_params.extra_args)
        if _limits is not None:
            wishes.check(_limits)

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        return False

    def apply(self, logits: Tensor, *args: Any) -> Tensor:
        return logits
