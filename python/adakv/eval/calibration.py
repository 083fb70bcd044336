"""What policies and formats have to know of a model, found by reading a text: one JSON file."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

import adakv
from adakv.basis import mean_size
from adakv.hf.attachment import CACHE
from adakv.policy import LayerInputs, MassShare, Need, Policy, PromptAttention, TopScore
from adakv.policy.profile import CALIBRATION_VERSION

KIND = "adakv calibration"  # what a file says of itself

#: Times that a layer's largest number is that of the layer before, where sinks emerge.
_JUMP = 4.0


class Outlier(NamedTuple):
    """Where tokens stand out."""

    layer: int  #: the first one whose input has them
    channel: int  #: of the hidden states
    tokens: tuple[int, ...]  #: the 5 that stand out most, by position
    largest: tuple[float, ...]  #: number in the input of each layer


def outlier_of(model: Any, ids: Tensor) -> Outlier:
    """The layer in which the largest number of the hidden states grows most, and its channel, for
    tokens ``[T]`` int64. Raises ``ValueError`` if it grows nowhere by a factor of four."""
    with torch.no_grad():
        states = model(ids[None].to(model.device), output_hidden_states=True).hidden_states
    sizes = [state[0].float().abs() for state in states[:-1]]  # [T, E], the input of each layer
    largest = [float(size.max()) for size in sizes]
    jumps = [b / a for a, b in itertools.pairwise(largest)]
    if not jumps or max(jumps) < _JUMP:
        raise ValueError(
            f"model: no token stands out: no layer's largest hidden number is {_JUMP:g} times that "
            "of the layer before"
        )
    layer = jumps.index(max(jumps)) + 1
    channel = int(sizes[layer].amax(0).argmax())
    tokens = sizes[layer][:, channel].topk(min(5, len(ids))).indices.tolist()
    return Outlier(layer, channel, tuple(tokens), tuple(largest))


class Channels(NamedTuple):
    """Sizes of queries and keys, dimension by dimension, after RoPE."""

    query: Tensor  #: [L, Hkv, D] float32, the mean of |q| over all tokens and a group's q heads
    range: Tensor  #: [L, Hkv, D] float32, the largest key's number minus the smallest one's


class _Watching:
    """A scorer that writes down what another one is handed of one prompt."""

    needs: ClassVar[frozenset[Need]] = frozenset({"all_queries"})

    def __init__(self, scorer: PromptAttention) -> None:
        self._scorer = scorer
        self.window, self.pinned = scorer.window, scorer.pinned
        self.query: list[Tensor] = []
        self.range: list[Tensor] = []

    def score(self, inputs: LayerInputs) -> Tensor:
        self.query.append(mean_size(inputs.queries, inputs.num_kv_heads)[0].cpu())
        keys = inputs.keys[0].float()
        self.range.append((keys.amax(1) - keys.amin(1)).cpu())
        return self._scorer.score(inputs)


def channels_and_shares(model: Any, ids: Tensor, ratio: float) -> tuple[Channels, Tensor]:
    """What the layers of a model with full attention do with a text of tokens ``[T]`` int64.

    The shares ``[L, Hkv]`` int64 are the entries that each kv head keeps, of ``ratio`` of all, so
    that every head has the same share of the attention that its entries get (``prefixkv_heads``):
    what PrefixKV (arXiv 2412.03409) measures beforehand, for :class:`adakv.policy.Profile`.
    """
    watching = _Watching(PromptAttention(window=1))
    policy = Policy(watching, MassShare(of_heads=True), TopScore())
    with adakv.attach(model), torch.no_grad():
        cache = adakv.Cache(model, policy, ratio=ratio)
        model(ids[None].to(model.device), use_cache=True, **{CACHE: cache})
        kept = cache.stats()["lengths"][:, 0].long()
    return Channels(torch.stack(watching.query), torch.stack(watching.range)), kept - 1


def calibration(model: Any, ids: Tensor, ratio: float, *, name: str = "") -> dict[str, Any]:
    """The contents of a file, for a model, a text of tokens ``[T]`` int64 and the share of its
    entries that the shares of heads are for.

    ``outlier`` is None where no token stands out.
    """
    try:
        outlier = outlier_of(model, ids)._asdict()
    except ValueError:
        outlier = None
    channels, shares = channels_and_shares(model, ids, ratio)
    return {
        "kind": KIND,
        "version": CALIBRATION_VERSION,
        "model": name,
        "tokens": len(ids),
        "ratio": ratio,
        "outlier": outlier,
        "shares": shares.tolist(),
        "query": _rounded(channels.query),
        "range": _rounded(channels.range),
    }


def _rounded(x: Tensor) -> list[Any]:
    """Nested lists of numbers with 4 digits."""
    if x.dim() > 1:
        return [_rounded(part) for part in x]
    return [float(f"{number:.4g}") for number in x.tolist()]
