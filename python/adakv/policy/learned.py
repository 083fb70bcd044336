"""A scorer that was trained to foresee what an entry will be needed for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adakv.policy.attention import attention
from adakv.policy.base import Need
from adakv.policy.inputs import LayerInputs, check_range, check_settings, pin_first
from adakv.policy.weights import Weights, read, set_file

NUM_STATISTICS = 8
_ROWS = 8  # queries whose attention is there at a time; the shortest sum is of so many
_DECAY = 0.9
_WINDOW = 128  # of the authors' code


@dataclass(frozen=True)
class LearnedScorer:
    """How much an entry will be needed, foreseen from what it is and what it was given
    (ForesightKV, arXiv 2602.03203).

    ``S[h, t] = -f[h](k[h, t], v[h, t], a[h, t])``: a are the eight statistics of :func:`features`,
    of each q head of the group, and f is two linear maps with a GELU between, of a kv head's own,
    trained to say how well the model does without the entry.

    ``file`` is a safetensors file with, for each layer l from 0 on, ``layers.{l}.fc1.weight``
    ``[Hkv, 2 * D + 8 * G, M]``, ``layers.{l}.fc1.bias`` ``[Hkv, M]``, ``layers.{l}.fc2.weight``
    ``[Hkv, M, 1]`` and ``layers.{l}.fc2.bias`` ``[Hkv, 1]``, which are the shapes and the sign of
    the authors' code; and with ``window``, a number: the newest entries, which always stay and
    whose queries the statistics are of. Without it that is the 128 of their code.
    ``examples/train_learned.py`` writes such files.

    It is made for texts: choose after every ``window`` tokens. Of a prompt it looks at the window's
    queries alone.

    Raises ``ValueError`` if the file is no such file, or is of another model.
    """

    file: str
    pinned: int = 0
    needs: ClassVar[frozenset[Need]] = frozenset({"layer"})
    carries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self)
        set_file(self)
        check_range("pinned", self.pinned, 0)
        assert self.window  # so that the file is read

    @cached_property
    def window(self) -> int:
        """As the file says."""
        return read(self.file, torch.device("cpu"), _trained).window

    def score(self, inputs: LayerInputs) -> Tensor:
        return self.carry(inputs)[0]

    def carry(self, inputs: LayerInputs) -> tuple[Tensor, Tensor]:
        """Scores ``[B, Hkv, T]``, and the running sums ``[B, Hkv, T, 2, G]`` of attention."""
        layer = self._layer(inputs)
        known, carried = features(inputs, self.window)
        return pin_first(-layer(known), self.pinned), carried

    def _layer(self, inputs: LayerInputs) -> _Layer:
        """What the file has for a layer, which it was trained for."""
        layers = read(self.file, inputs.device, _trained).layers
        heads, head_dim = inputs.num_kv_heads, inputs.queries.shape[3]
        entry = head_dim + inputs.values.shape[3]
        width = entry + NUM_STATISTICS * (inputs.queries.shape[1] // heads)
        found = len(layers), *layers[0].fc1.shape[:2]
        expected = inputs.num_layers, heads, width
        if found != expected:
            raise ValueError(
                f"file must be of a scorer for {_sizes(expected)}, and {self.file!r} is of one for "
                f"{_sizes(found)}, another model"
            )
        return layers[inputs.layer]


def features(inputs: LayerInputs, window: int) -> tuple[Tensor, Tensor]:
    """What is known of the entries of a layer.

    Parameters
    ----------
    inputs : :class:`LayerInputs`
        With the queries of the newest tokens, and the running sums of before as ``carried``.
    window : int
        How many of the newest queries the statistics are of, a multiple of 8 and at least 32.

    Returns
    -------
    features : ``[B, Hkv, T, D + Dv + 8 * G]`` float32
        An entry's key and value, and behind them of its attention from each q head of the group:
        the largest, the smallest and the sum over the window's queries, the sums over the last 16,
        8 and 32, the sum over all queries so far, and the same with all that was there before
        worth 0.9 of it at each choice.
    carried : ``[B, Hkv, T, 2, G]`` float32
        The last two, for the next choice.
    """
    batch, heads, length = inputs.shape
    group, count = inputs.queries.shape[1] // heads, inputs.queries.shape[2]
    total = torch.zeros(batch, heads, group, length, device=inputs.device)
    largest, smallest = total, torch.ones_like(total)
    newest: dict[int, Tensor] = {}  # sums over so many rows, or all if there are fewer
    for end in range(count, 0, -_ROWS):
        start = max(end - _ROWS, 0)
        p = attention(inputs, slice(start, end))  # [B, Hkv, G, R, T]
        total = total + p.sum(3)
        newest |= dict.fromkeys((n for n in (8, 16, 32, window) if count - start <= n), total)
        if count - start <= window:
            largest, smallest = largest.maximum(p.amax(3)), smallest.minimum(p.amin(3))
    running = torch.stack([total, total], -2)  # [B, Hkv, G, 2, T]
    if inputs.carried is not None:
        running += inputs.carried.permute(0, 1, 4, 3, 2) * running.new_tensor([1, _DECAY])[:, None]
    sums = [newest[n] for n in (window, 16, 8, 32)]
    found = torch.stack([largest, smallest, *sums, *running.unbind(-2)], 2)  # [B, Hkv, 8, G, T]
    entries = inputs.keys.float(), inputs.values.float()
    return torch.cat([*entries, found.flatten(2, 3).mT], -1), running.permute(0, 1, 4, 3, 2)


class _Layer(NamedTuple):
    """A layer's scorer: what of an entry's features says that it may leave."""

    fc1: Tensor  # [Hkv, F, M]
    fc1_bias: Tensor  # [Hkv, M]
    fc2: Tensor  # [Hkv, M, 1]
    fc2_bias: Tensor  # [Hkv, 1]

    def __call__(self, features: Tensor) -> Tensor:
        """``[B, Hkv, T]`` of ``[B, Hkv, T, F]``."""
        hidden = F.gelu(features @ self.fc1 + self.fc1_bias[:, None])
        return (hidden @ self.fc2 + self.fc2_bias[:, None])[..., 0]


class _Trained(NamedTuple):
    window: int
    layers: tuple[_Layer, ...]


def _sizes(sizes: tuple[int, int, int]) -> str:
    return f"{sizes[0]} layers of {sizes[1]} kv heads and {sizes[2]} features of an entry"


def _trained(weights: Weights) -> _Trained:
    """What a file holds."""
    window = float(weights.tensors["window"].sum()) if "window" in weights.tensors else _WINDOW
    if window % _ROWS or not 4 * _ROWS <= window < 2**20:
        raise ValueError(
            f"file must hold a window that is a multiple of {_ROWS} and at least {4 * _ROWS}, and "
            f"that of {weights.path!r} is {window:g}"
        )
    layers: list[_Layer] = []
    for number in range(weights.num_layers()):
        name = f"layers.{number}"
        parts = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
        layer = _Layer(*(weights.of(f"{name}.{part}") for part in parts))
        heads, width, middle = layer.fc1.shape if layer.fc1.dim() == 3 else (0, 0, 0)
        wanted = [(heads, width, middle), (heads, middle), (heads, middle, 1), (heads, 1)]
        first = (layers or [layer])[0].fc1.shape
        if [tuple(x.shape) for x in layer] != wanted or 0 in wanted[0] or layer.fc1.shape != first:
            raise ValueError(
                f"file must hold layers of one size with {name}.fc1.weight [Hkv, F, M], fc1.bias "
                f"[Hkv, M], fc2.weight [Hkv, M, 1] and fc2.bias [Hkv, 1], and in {weights.path!r} "
                f"they are {', '.join(str(list(x.shape)) for x in layer)}"
            )
        layers.append(layer)
    return _Trained(int(window), tuple(layers))
