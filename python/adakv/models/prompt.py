"""What a layer hands over of its prompts, until they are compacted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from adakv.policy import LayerInputs


class Attention(NamedTuple):
    """What a layer's attention has besides queries, keys and values."""

    scale: float | None
    softcap: float | None
    sinks: Tensor | None  # [Hq] float32
    rotate: Callable[[Tensor, Tensor], Tensor] | None = None  # as LayerInputs.rotate


class Prompt(NamedTuple):
    """One layer's prompt until it is compacted, padded on the left."""

    queries: Tensor  # [B, Hq, W, D] of the window; [B, Hq, T, D] if the policy needs all
    keys: Tensor  # [B, Hkv, T, D]
    values: Tensor  # [B, Hkv, T, D]
    w_o: Tensor | None  # [E, Hq * D]
    attention: Attention
    lse: Tensor | None = None  # [B, Hq, T] float32, as LayerInputs.lse; none of prompts in chunks
    scores: Tensor | None = None  # [B, Hkv, T] float32, if there are any before the policy's turn

    def inputs(self, group: slice, seen: Sequence[int], layer: int, num_layers: int) -> LayerInputs:
        """Prompts of one length, ``seen``, as a policy takes them: views, without padding."""
        start = self.keys.shape[2] - seen[0]
        window = max(self.queries.shape[2] - seen[0], 0)
        scale, softcap, sinks, rotate = self.attention
        return LayerInputs(
            self.queries[group, :, window:],
            self.keys[group, :, start:],
            self.values[group, :, start:],
            self.w_o,
            tuple(seen),
            layer,
            num_layers,
            scale=scale,
            softcap=softcap,
            sink_logits=sinks,
            lse=None if self.lse is None else self.lse[group],
            rotate=rotate,
        )
