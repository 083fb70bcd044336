"""What leaves is folded into what stays: values are merged, and a bias makes up for the mass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from adakv.ops import Kept
from adakv.policy.inputs import LayerInputs, check_range, check_settings

_MOST_PAIRS = 1 << 24  # of entries whose keys are compared at a time


@dataclass(frozen=True)
class Folded:
    """What leaves is folded into the kept entry of its kv head that has the most similar key.

    All keys of a prompt less their mean, an entry t that leaves goes to the kept entry k with the
    largest ``cos(key[t], key[k])``, if that is at least ``cosine`` and ``mass[t] <= mass[k]``; else
    it leaves as it would without this. An entry's mass is the attention that it gets from the last
    ``window`` queries of the prompt, the mean over them and over the q heads of its group. With
    ``w[t] = mass[t] / mass[k]``::

        value[k] = (value[k] + sum of w[t] * value[t]) / (1 + sum of w[t])
        bias[k]  = log(1 + sum of w[t])

    attend adds the bias to the logit of k, which so weighs as much as all that is in it, and which
    takes 16 bits. Without ``biases`` only values are merged, which takes no memory. The rule is
    that of kvfold (github.com/jg-codes/kvfold); the mean and the two conditions are this library's.
    """

    cosine: float = 0.7
    window: int = 32
    biases: bool = True

    def __post_init__(self) -> None:
        check_settings(self)
        check_range("cosine", self.cosine, -1, 1)
        check_range("window", self.window, 1)

    def newest(self, queries: Tensor, before: Tensor | None = None) -> Tensor:
        """A copy of the last ``window`` of queries ``[B, Hq, S, D]``, behind those ``before``."""
        joined = queries if before is None else torch.cat([before, queries], 2)
        return joined[:, :, -self.window :].clone()

    def masses(self, inputs: LayerInputs) -> Tensor:
        """``[B, Hkv, T]`` float32: the attention that the entries of prompts of T tokens get from
        all queries of the inputs."""
        return inputs.attended(inputs.queries.shape[2], pool="none", window=0)

    def fold(
        self, keys: Tensor, values: Tensor, masses: Tensor, kept: Kept
    ) -> tuple[Tensor, Tensor | None]:
        """The values ``[B, Hkv, T, D]`` of what stays, and the biases ``[B, Hkv, T]`` float16.

        Parameters
        ----------
        keys, values : ``[B, Hkv, T, D]``
            Of prompts of T tokens.
        masses : ``[B, Hkv, T]`` float32
            The attention that each entry got; one that got none has nothing to fold, and nothing
            is folded into it.
        kept : :class:`adakv.ops.Kept`
            What stays. Values and biases of other entries mean nothing.
        """
        stays = kept.mask(masses.shape) & (masses > 0)
        target, cosine = _nearest(keys, stays)
        of_target = masses.gather(2, target)
        is_folded = ~kept.mask(masses.shape) & (cosine >= self.cosine) & (masses <= of_target)
        weights = (masses / of_target).where(is_folded, 0)  # [B, Hkv, T]
        sums = torch.zeros_like(weights).scatter_add_(2, target, weights)
        index = target[..., None].expand_as(values)
        merged = values.float().scatter_add(2, index, weights[..., None] * values.float())
        merged = (merged / (1 + sums)[..., None]).to(values.dtype)
        return merged, sums.log1p().half() if self.biases else None


def _nearest(keys: Tensor, may_be: Tensor) -> tuple[Tensor, Tensor]:
    """The entry among those that ``may_be`` ``[B, Hkv, T]`` whose key is most like that of each
    one, keys less their mean, and the cosine of the two; -inf if there is none."""
    unit = torch.nn.functional.normalize(keys.float() - keys.float().mean(2, keepdim=True), dim=3)
    batch, heads, length, _ = keys.shape
    step = max(_MOST_PAIRS // max(batch * heads * length, 1), 1)
    found = [
        (part @ unit.mT).masked_fill(~may_be[:, :, None], -torch.inf).max(3)
        for part in torch.split(unit, step, 2)
    ]
    return torch.cat([x.indices for x in found], 2), torch.cat([x.values for x in found], 2)


class Folding(NamedTuple):
    """How some prompts' entries are folded in a layer."""

    rule: Folded
    masses: Tensor  #: [B, Hkv, T] float32

    def fold(self, keys: Tensor, values: Tensor, kept: Kept) -> tuple[Tensor, Tensor | None]:
        """:meth:`Folded.fold`."""
        return self.rule.fold(keys, values, self.masses, kept)
