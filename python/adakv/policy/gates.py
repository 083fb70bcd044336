"""Scorers that were trained: a file holds what they know."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adakv.policy.base import Need
from adakv.policy.inputs import LayerInputs, check_scorer, pin_first
from adakv.policy.weights import Weights, read, set_file


@dataclass(frozen=True)
class Gate:
    """How much the model will look at an entry, foretold from its hidden state (KVzap, arXiv
    2601.07891).

    ``S[h, t] = exp(g[h](x[t]))``: x is what the layer's attention is fed at position t, and g a
    linear map or two of them with a GELU between, trained to give the logarithm of another scorer's
    scores, KVzip's as a rule. Costs one small product with the hidden states.

    ``file`` is a safetensors file with, for each layer l from 0 on, ``layers.{l}.weight`` ``[Hkv,
    E]`` and ``layers.{l}.bias`` ``[Hkv]``, or ``layers.{l}.0.weight`` ``[M, E]``,
    ``layers.{l}.0.bias`` ``[M]``, ``layers.{l}.2.weight`` ``[Hkv, M]`` and ``layers.{l}.2.bias``
    ``[Hkv]``: as the paper's authors publish theirs, and as ``examples/train_gate.py`` writes them.
    It is read once, and again when it has changed.

    With a ``threshold`` entries leave whose score is under it, however much room there is, if the
    allocator is :class:`adakv.policy.Capped`: the paper's rule, which has no budget and counts in
    logarithms; its -4 is ``threshold=0.018``.

    Raises ``ValueError`` if the file is no such file, or is of another model.
    """

    file: str
    window: int = 32
    pinned: int = 4
    threshold: float | None = None
    needs: ClassVar[frozenset[Need]] = frozenset({"hidden", "layer"})

    def __post_init__(self) -> None:
        check_scorer(self)
        if self.threshold is not None and not 0 < self.threshold < math.inf:
            raise ValueError(f"threshold must be above 0 and finite, got {self.threshold}")
        set_file(self)
        read(self.file, torch.device("cpu"), _layers)

    def score(self, inputs: LayerInputs) -> Tensor:
        return self.finish(self.take(None, inputs), inputs)

    def take(self, taken: Tensor | None, part: LayerInputs) -> Tensor:
        """``[B, Hkv, n]`` float32: ``g`` of all positions so far."""
        hidden = part.hidden
        if hidden is None:
            raise ValueError("hidden must be given to a policy with a Gate, got None")
        new = self._layer(part)(hidden)
        return new if taken is None else torch.cat([taken, new], 2)

    def finish(self, taken: Tensor, inputs: LayerInputs) -> Tensor:
        """``[B, Hkv, T]``: :meth:`score`, of a prompt whose parts were taken."""
        if taken.shape[2] != inputs.length:
            raise ValueError(
                f"hidden must be that of all {inputs.length} positions, got {taken.shape[2]}"
            )
        scores = taken.exp()
        if self.threshold is not None:
            scores = scores.masked_fill(scores < self.threshold, -torch.inf)
        return pin_first(scores, self.pinned)

    def _layer(self, inputs: LayerInputs) -> _Layer:
        """What the file has for a layer, which it was trained for."""
        layers = read(self.file, inputs.device, _layers)
        assert inputs.hidden is not None
        found = len(layers), layers[0].last.shape[0], layers[0].width
        expected = inputs.num_layers, inputs.num_kv_heads, inputs.hidden.shape[2]
        if found != expected:
            raise ValueError(
                f"file must be of a gate for {_sizes(expected)}, and {self.file!r} is of one for "
                f"{_sizes(found)}, another model"
            )
        return layers[inputs.layer]


class _Layer(NamedTuple):
    """A layer's gate: ``last`` ``[Hkv, E]``, or ``first`` ``[M, E]`` before ``last`` ``[Hkv, M]``,
    with biases as long as they are high."""

    last: Tensor
    last_bias: Tensor
    first: Tensor | None = None
    first_bias: Tensor | None = None

    @property
    def width(self) -> int:
        """E."""
        return (self.last if self.first is None else self.first).shape[1]

    def __call__(self, hidden: Tensor) -> Tensor:
        """``[B, Hkv, n]`` float32 of hidden states ``[B, n, E]``.

        The wide product is in the hidden states' own dtype; the last one in float32, as 16 bits
        would make many entries equal.
        """
        if self.first is not None and self.first_bias is not None:
            kind = hidden.dtype
            hidden = F.gelu(F.linear(hidden, self.first.to(kind), self.first_bias.to(kind)))
        return F.linear(hidden.float(), self.last, self.last_bias).mT.contiguous()


def _sizes(sizes: tuple[int, int, int]) -> str:
    return f"{sizes[0]} layers of {sizes[1]} kv heads and hidden states of {sizes[2]} numbers"


def _layers(weights: Weights) -> tuple[_Layer, ...]:
    layers = [_layer(weights, f"layers.{layer}") for layer in range(weights.num_layers())]
    if len({(layer.width, len(layer.last)) for layer in layers}) > 1:
        raise ValueError(f"file must hold layers of one size, and {weights.path!r} holds several")
    return tuple(layers)


def _layer(weights: Weights, name: str) -> _Layer:
    def pair(place: str) -> tuple[Tensor, Tensor]:
        names = f"{place}.weight", f"{place}.bias"
        weight, bias = map(weights.of, names)
        if weight.dim() != 2 or bias.shape != weight.shape[:1] or 0 in weight.shape:
            raise ValueError(
                f"file must hold {names[0]} [out, in] and {names[1]} [out], and in "
                f"{weights.path!r} they are {list(weight.shape)} and {list(bias.shape)}"
            )
        return weight, bias

    if f"{name}.weight" in weights.tensors:
        return _Layer(*pair(name))
    layer = _Layer(*pair(f"{name}.2"), *pair(f"{name}.0"))
    assert layer.first is not None
    if layer.last.shape[1] != len(layer.first):
        raise ValueError(
            f"file must hold {name}.2.weight that takes the {len(layer.first)} numbers of "
            f"{name}.0.weight, and in {weights.path!r} it takes {layer.last.shape[1]}"
        )
    return layer
