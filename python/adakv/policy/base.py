"""What a policy is: a scorer, an allocator and a selector, and the function that runs them.

    scores  = scorer.score(inputs)                     how much each entry matters      [B, Hkv, T]
    budgets = allocator.allocate(scores, inputs, ...)  how many each kv head may keep   [B, Hkv]
    kept    = selector.select(scores, budgets, ...)    which ones                       ragged

A model-wide allocator shares one budget out among the kv heads of all layers: then all layers are
scored first, and their scores are allocated together, ``[B, L * Hkv, T]``.

The parts are frozen dataclasses of settings. They hold no tensors and no state, so that one policy
serves any number of models, layers and threads. Nothing here waits for the device: all sizes follow
from integers that the host knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from adakv import ops, shown
from adakv.ops import Kept
from adakv.policy import written
from adakv.policy.folded import Folded
from adakv.policy.inputs import LayerInputs, check_range, check_settings
from adakv.policy.more_tokens import MoreTokens
from adakv.tensors import on_device

__all__ = [
    "Allocator",
    "EveryTokens",
    "Kept",
    "LayerBudget",
    "LayerInputs",
    "LayerSchedule",
    "Need",
    "PartwiseScorer",
    "Policy",
    "Scorer",
    "Selector",
    "TopScore",
    "needs_of",
]

#: What a part of a policy may read beyond keys, values and the window's queries. It says so in an
#: attribute ``needs``, a frozenset. "w_o": the output projection, and with it the norms of values;
#: "all_queries": those of all positions; "rotate": the model's RoPE; "repeat": queries and keys of
#: a repetition; "budget": how many entries stay; "classes": which tokens are of an image, or of
#: what else; "hidden": what the layer's attention is fed; "queries", of an allocator or a selector:
#: those of the window, which else the scorer alone reads; "layer": which layer it is, without which
#: layers may come as prompts of one. An allocator that is model-wide needs nothing.
Need = Literal[
    "w_o", "all_queries", "rotate", "repeat", "budget", "classes", "hidden", "queries", "layer"
]


def needs_of(*parts: object) -> frozenset[Need]:
    """What some parts of a policy need together; a part without ``needs`` needs nothing."""
    return frozenset[Need]().union(*(getattr(part, "needs", ()) for part in parts))


class Scorer(Protocol):
    """How much each entry of a layer matters."""

    @property
    def window(self) -> int:
        """The last ``window`` entries, at least one, are always kept and don't compete."""
        ...

    @property
    def pinned(self) -> int:
        """How many of the first entries the scorer pins by a score of ``+inf``."""
        ...

    def score(self, inputs: LayerInputs) -> Tensor:
        """``[B, Hkv, T]`` float32, higher is better; not read in the window and in padding.

        If it has an attribute ``of_first_layer`` that is true, it is asked of the first layer
        alone, whose scores are then those of all others.

        Of a text that is chosen from again (``inputs.positions`` is there) a scorer with an
        attribute ``carries`` that is true is handed all new queries. Its method ``carry(inputs)``
        is called instead of this one, and gives the scores and what it wants to be handed the
        next time, ``[B, Hkv, T, ...]`` float32: ``inputs.carried``.
        """
        ...


@runtime_checkable
class PartwiseScorer(Scorer, Protocol):
    """A scorer of all queries that can do without most: it takes a prompt part by part."""

    def take(self, taken: Any, part: LayerInputs) -> Any:
        """What to remember of the queries up to now, which a caller hands back and never reads.

        Parameters
        ----------
        taken
            What came of the parts before; None of the first.
        part : :class:`LayerInputs`
            The prompt as far as it has been read, all sequences of one length; its queries, and its
            hidden states if there are any, are the new ones, those of its last positions.
        """
        ...

    def finish(self, taken: Any, inputs: LayerInputs) -> Tensor:
        """:meth:`score` of a whole prompt, all of whose parts were taken: doesn't read queries."""
        ...


class LayerSchedule(Protocol):
    """How much each layer gets, before any score is known."""

    def budget(
        self, mean: int, *, window: int, prompt_len: int, layer: int, num_layers: int
    ) -> int:
        """Mean entries per kv head of ``layer``, window included, of ``mean`` over all layers."""
        ...


class Allocator(Protocol):
    """How a layer's budget is shared out among its kv heads."""

    @property
    def layers(self) -> LayerSchedule:
        """What each layer gets."""
        ...

    @property
    def is_model_wide(self) -> bool:
        """Whether the layers are allocated together, as one layer of ``L * Hkv`` kv heads."""
        ...

    def allocate(
        self, scores: Tensor, inputs: LayerInputs, budgets: tuple[int, ...], *, window: int
    ) -> Tensor:
        """``[B, Hkv]`` int32, window included, from this layer's mean budget of each sequence.

        Model-wide it is ``[B, L * Hkv]`` from scores ``[B, L * Hkv, T]``, layer by layer, and the
        inputs of any layer.
        """
        ...

    def total(self, budget: int, *, window: int, prompt_len: int, num_kv_heads: int) -> int:
        """Most entries that :meth:`allocate` gives to all heads of one sequence together."""
        ...


class Selector(Protocol):
    """Which entries a kv head keeps within its budget."""

    def select(
        self, scores: Tensor, budgets: Tensor, inputs: LayerInputs, *, window: int, total: int
    ) -> Kept:
        """The kept positions; ``total`` is at least the sum of the budgets."""
        ...


@dataclass(frozen=True)
class TopScore:
    """The highest scores."""

    def select(
        self, scores: Tensor, budgets: Tensor, inputs: LayerInputs, *, window: int, total: int
    ) -> Kept:
        seq_lens = inputs.sequence_lens
        return ops.select(scores, budgets, window=window, seq_lens=seq_lens, total=total)


class LayerBudget(NamedTuple):
    """How much a layer keeps of one prompt: integers that the host knows before any score."""

    mean: int  #: entries per kv head, window included
    total: int  #: most entries of all its kv heads together
    keeps_everything: bool  #: the prompt fits into it


@dataclass(frozen=True)
class EveryTokens:
    """The text behind a prompt is chosen from after every ``every`` of its tokens."""

    every: int = 128

    def __post_init__(self) -> None:
        check_settings(self)
        check_range("every", self.every, 1)


@dataclass(frozen=True)
class Policy:
    """Which entries of a prompt stay in the cache: scorer x allocator x selector.

    ``choose`` runs the three over one layer, ``choose_all`` over all layers. ``budget`` is the mean
    number of entries per kv head over all layers, window included; the allocator's layer schedule
    turns it into each layer's.

    Prompts are chosen from at their end. ``when`` says how often the text behind one is, if it is
    (docs/texts.md). ``bits`` has the budget counted in bytes (docs/bits.md). ``fold`` has what
    leaves a prompt folded into what stays of it (docs/folding.md).
    """

    scorer: Scorer
    allocator: Allocator
    selector: Selector
    when: EveryTokens | None = None
    bits: MoreTokens | None = None
    fold: Folded | None = None

    def __post_init__(self) -> None:
        check_settings(self)

    def __str__(self) -> str:
        """As :func:`adakv.policy.get` reads it."""
        return written.expression(self._parts)

    def __repr__(self) -> str:
        return f"Policy({self})"

    def _repr_html_(self) -> str:
        return shown.table(written.rows(self._parts))

    @property
    def _parts(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def window(self) -> int:
        """The last ``window`` entries are always kept."""
        return self.scorer.window

    @cached_property
    def is_model_wide(self) -> bool:
        """Whether nothing can be chosen before the last layer is there."""
        return self.allocator.is_model_wide

    @cached_property
    def needs(self) -> frozenset[Need]:
        """What the three parts together read of :class:`LayerInputs` beyond what all read."""
        return needs_of(self.scorer, self.allocator, self.selector)

    def keeps_everything(self, inputs: LayerInputs, budget: int) -> bool:
        """Whether all prompts fit into their budget in this layer: then nothing is scored."""
        return all(x.keeps_everything for x in self.layer_budgets(inputs, budget))

    def totals(self, inputs: LayerInputs, budget: int) -> tuple[int, ...]:
        """Most entries that each sequence keeps in this layer: see :meth:`layer_budget`."""
        return tuple(x.total for x in self.layer_budgets(inputs, budget))

    def layer_budgets(self, inputs: LayerInputs, budget: int) -> list[LayerBudget]:
        """:meth:`layer_budget` of each sequence in this layer."""
        heads, layer, num_layers = inputs.num_kv_heads, inputs.layer, inputs.num_layers
        return [
            self.layer_budget(n, budget, num_kv_heads=heads, layer=layer, num_layers=num_layers)
            for n in inputs.prompt_lens
        ]

    def layer_budget(
        self, prompt_len: int, budget: int, *, num_kv_heads: int, layer: int, num_layers: int
    ) -> LayerBudget:
        """How much a layer keeps of a prompt.

        Its ``total`` is exactly what :meth:`choose` keeps, except under the safeguard
        ``official_round``, whose sums depend on the scores: there it is an upper bound.

        How a model-wide policy divides its total among the layers is known to the device alone: the
        whole of it is counted for layer 0, and nothing for the others.
        """
        window, pinned = self.window, self.scorer.pinned
        if budget < window + pinned:
            raise ValueError(
                f"budget must be at least {window + pinned} entries per kv head "
                f"(window {window}, pinned {pinned}), got {budget}"
            )
        mean = self.allocator.layers.budget(
            budget, window=window, prompt_len=prompt_len, layer=layer, num_layers=num_layers
        )
        mean = min(mean, max(prompt_len, window))
        if self.is_model_wide:
            num_kv_heads *= num_layers if layer == 0 else 0
        total = self.allocator.total(
            mean, window=window, prompt_len=prompt_len, num_kv_heads=num_kv_heads
        )
        return LayerBudget(mean, total, prompt_len <= mean)

    def choose(
        self,
        inputs: LayerInputs,
        budget: int | Sequence[LayerBudget],
        *,
        scores: Tensor | None = None,
    ) -> Kept:
        """The entries of a layer to keep; for policies that are not model-wide.

        Parameters
        ----------
        inputs : :class:`LayerInputs`
        budget : int
            Mean entries per kv head over all layers, at least the window and the pinned entries; or
            what :meth:`layer_budgets` made of it.
        scores : ``[B, Hkv, T]`` floating point, optional
            Scores from elsewhere, taken instead of the scorer's; ``+inf`` pins an entry.

        Returns
        -------
        kept : :class:`adakv.ops.Kept`
            The window is always among them. Sequences that fit into their budget keep everything,
            and if all do, nothing is scored.
        """
        if self.is_model_wide and inputs.num_layers > 1:
            raise ValueError(
                f"{type(self.allocator).__name__} needs the scores of all {inputs.num_layers} "
                "layers: use choose_all"
            )
        return self._choose([inputs], budget, None if scores is None else [scores])[0]

    def choose_all(
        self,
        layers: Sequence[LayerInputs],
        budget: int | Sequence[LayerBudget],
        *,
        scores: Sequence[Tensor] | None = None,
    ) -> list[Kept]:
        """:meth:`choose` for all layers of a model.

        Parameters
        ----------
        layers : one :class:`LayerInputs` for each layer, in order, all of the same prompts
        budget : int
            As for :meth:`choose`; layer budgets for a model-wide policy alone, those of layer 0.
        scores : one ``[B, Hkv, T]`` for each layer, optional

        Returns
        -------
        kept : one :class:`adakv.ops.Kept` for each layer
            Model-wide, ``positions`` of each have room for the most that a layer may keep.
        """
        order = [x.layer for x in layers]
        if not order or order != list(range(layers[0].num_layers)):
            raise ValueError(f"layers must be those of the whole model in order, got {order}")
        if scores is not None and len(scores) != len(layers):
            raise ValueError(
                f"scores must be one tensor for each of {len(layers)} layers, got {len(scores)}"
            )
        if scores is None and self.scores_once:
            scores = self._scores_of_first(layers, budget)
        if self.is_model_wide:
            return self._choose(layers, budget, scores)
        given = [None] * len(layers) if scores is None else scores
        return [self.choose(x, budget, scores=s) for x, s in zip(layers, given, strict=True)]

    def _scores_of_first(
        self, layers: Sequence[LayerInputs], budget: int | Sequence[LayerBudget]
    ) -> list[Tensor] | None:
        """The scores of the first layer, for each layer; None if nothing is to be scored."""
        if isinstance(budget, Sequence):
            budgets = [list(budget)]
        else:
            budgets = [self.layer_budgets(x, budget) for x in layers]
        if all(x.keeps_everything for of_layer in budgets for x in of_layer):
            return None
        first = self.score(layers[0], budgets[0])
        return [on_device(first, x.keys.device) for x in layers]

    def score(self, inputs: LayerInputs, budgets: Sequence[LayerBudget]) -> Tensor:
        """The scorer's scores ``[B, Hkv, T]`` of a layer with such budgets, one a sequence."""
        if "budget" in self.needs:
            inputs = replace(inputs, budgets=tuple(x.mean for x in budgets))
        return self.scorer.score(inputs)

    @cached_property
    def scores_once(self) -> bool:
        """Whether what the first layer's entries score is what those of all layers score."""
        return bool(getattr(self.scorer, "of_first_layer", False))

    @property
    def has_biases(self) -> bool:
        """Whether what stays has biases, which attend adds to logits."""
        return self.fold is not None and self.fold.biases

    @property
    def reserves(self) -> bool:
        """Whether layers drop a part of their prompts before the last one is there."""
        return getattr(self.allocator, "reserve", None) is not None

    def reserved(self, budget: int, prompt_len: int) -> int:
        """Mean entries per kv head that :meth:`reserve` holds of a prompt."""
        share: float = getattr(self.allocator, "reserve", None) or 1.0
        return min(round(share * budget), max(prompt_len, budget))

    def reserve(
        self,
        inputs: LayerInputs,
        budget: int | Sequence[LayerBudget],
        *,
        scores: Tensor | None = None,
    ) -> tuple[Kept, Tensor, Tensor]:
        """The entries of a layer that are held until the last one is there.

        Returns
        -------
        kept : :class:`adakv.ops.Kept`
        scores : ``[B, Hkv, T]`` float32
            For :meth:`choose_all`: ``-inf`` where an entry is not held.
        places : ``[B, Hkv, T]`` int32
            :meth:`adakv.ops.Kept.places` of those that are.
        """
        budgets = budget if isinstance(budget, Sequence) else self.layer_budgets(inputs, budget)
        if all(x.keeps_everything for x in budgets):
            kept = _keep_everything(inputs)
            scores = torch.zeros(inputs.shape, device=inputs.device) if scores is None else scores
            return kept, scores, kept.places(inputs.shape)
        heads, lengths, window = inputs.num_kv_heads, inputs.prompt_lens, self.window
        means = tuple(self.reserved(x.mean, n) for n, x in zip(lengths, budgets, strict=True))
        scores = self.score(inputs, budgets) if scores is None else scores
        if inputs.protected is not None:
            scores = inputs.pin_protected(scores)
        shares = self.allocator.allocate(scores, inputs, means, window=window)
        total = sum(
            self.allocator.total(mean, window=window, prompt_len=n, num_kv_heads=heads)
            for mean, n in zip(means, lengths, strict=True)
        )
        kept = self.selector.select(scores, shares, inputs, window=window, total=total)
        places = kept.places(inputs.shape)
        return kept, scores.where(places >= 0, -torch.inf), places

    def _choose(
        self,
        layers: Sequence[LayerInputs],
        budget: int | Sequence[LayerBudget],
        scores: Sequence[Tensor] | None,
    ) -> list[Kept]:
        """What to keep of layers that are allocated together."""
        first = layers[0]
        if scores is not None:
            scores = [_outside_scores(s, x) for s, x in zip(scores, layers, strict=True)]
        budgets = budget if isinstance(budget, Sequence) else self.layer_budgets(first, budget)
        if all(x.keeps_everything for x in budgets):
            return [_keep_everything(x) for x in layers]
        scores = scores or [self.score(x, budgets) for x in layers]
        if first.protected is not None:
            scores = [x.pin_protected(s) for s, x in zip(scores, layers, strict=True)]
        there = scores[0].device  # layers may lie on several devices
        joined = scores[0]
        if len(layers) > 1:
            joined = torch.cat([on_device(s, there) for s in scores], dim=1)
        means = tuple(x.mean for x in budgets)
        shares = self.allocator.allocate(joined, first, means, window=self.window)
        heads = first.num_kv_heads
        most = sum(min(x.total, heads * n) for x, n in zip(budgets, first.prompt_lens, strict=True))
        return [
            self.selector.select(s, share.to(s.device), x, window=self.window, total=most)
            for s, share, x in zip(scores, torch.split(shares, heads, dim=1), layers, strict=True)
        ]


def _outside_scores(scores: Tensor, inputs: LayerInputs) -> Tensor:
    expected = list(inputs.keys.shape[:3])
    if list(scores.shape) != expected or not scores.is_floating_point():
        raise ValueError(
            f"scores must be floating point [B, Hkv, T] = {expected}, "
            f"got {scores.dtype} {list(scores.shape)}"
        )
    if scores.device != inputs.keys.device:
        raise ValueError(
            f"scores must be on the keys' device {inputs.keys.device}, got {scores.device}"
        )
    return scores.float()


def _keep_everything(inputs: LayerInputs) -> Kept:
    """All entries of all rows: ``select`` clamps budgets of T, and scores don't matter."""
    batch, num_kv_heads, length = inputs.keys.shape[:3]
    device = inputs.keys.device
    budgets = torch.full((batch, num_kv_heads), length, dtype=torch.int32, device=device)
    scores = torch.zeros((batch, num_kv_heads, length), dtype=torch.float32, device=device)
    total = num_kv_heads * sum(inputs.prompt_lens)
    return ops.select(scores, budgets, window=0, seq_lens=inputs.seq_lens, total=total)
