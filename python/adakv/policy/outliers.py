"""Tokens that stand out in one number of their hidden states: attention sinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adakv.policy.base import Need
from adakv.policy.inputs import LayerInputs, check_range, check_scorer, pin_first


@dataclass(frozen=True)
class HiddenOutlier:
    """How far a token stands out in one channel of the hidden states (KVSink, COLM 2025).

    ``S[h, t] = |x[t, channel]|``, x what the layer's attention is fed, the same for all kv heads.
    Sinks have huge numbers in a channel that is the model's own, from the layer on in which they
    emerge; ``adakv calibrate`` finds both. In the layers before all entries score 0, so that the
    first ones win. With a small first tier these tokens keep their 16 bits, and stay out of the
    ranges that codes are made for: ``kv_dtype="auto:1/64 + int4:63/64"``.

    The paper finds the tokens once, behind the layer in which they emerge, from states that were
    not normalised. Raises ``ValueError`` if hidden states have no such channel.
    """

    channel: int
    layer: int = 0
    window: int = 32
    pinned: int = 0
    needs: ClassVar[frozenset[Need]] = frozenset({"hidden", "layer"})

    def __post_init__(self) -> None:
        check_scorer(self)
        check_range("channel", self.channel, 0)
        check_range("layer", self.layer, 0)

    def score(self, inputs: LayerInputs) -> Tensor:
        return self.finish(self.take(None, inputs), inputs)

    def take(self, taken: Tensor | None, part: LayerInputs) -> Tensor:
        """``[B, n]`` float32: the sizes of all positions so far."""
        hidden = part.hidden
        if hidden is None:
            raise ValueError("hidden must be given to a policy with a HiddenOutlier, got None")
        if self.channel >= hidden.shape[2]:
            raise ValueError(
                f"channel must be below {hidden.shape[2]}, the width of the model's hidden states, "
                f"got {self.channel}"
            )
        new = hidden[:, :, self.channel].float().abs()
        new = new if part.layer >= self.layer else torch.zeros_like(new)
        return new if taken is None else torch.cat([taken, new], 1)

    def finish(self, taken: Tensor, inputs: LayerInputs) -> Tensor:
        """``[B, Hkv, T]``: :meth:`score`, of a prompt whose parts were taken."""
        if taken.shape[1] != inputs.length:
            raise ValueError(
                f"hidden must be that of all {inputs.length} positions, got {taken.shape[1]}"
            )
        scores = taken[:, None].expand(inputs.shape).clone()
        return pin_first(scores, self.pinned)
