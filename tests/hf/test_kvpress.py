"""The presets and scorers named after kvpress' against its own classes, side by side.

kvpress is no dependency; `pip install --no-deps kvpress==0.5.5` and what its import asks for brings
these tests to life. Its classes are called directly, on the queries, keys and values of a model,
as its hooks don't run on every transformers that adakv runs on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adakv import policy
from adakv.hf import families
from adakv.policy import (
    ExpectedAttention,
    KeyDiff,
    KeyNorm,
    LastQuery,
    LayerInputs,
    PressScorer,
    PromptAttention,
)
from hf.families import LLAMA, VOCAB
from hf.test_hf import captured
from policy.helpers import kept_rows

kvpress = pytest.importorskip("kvpress")

pytestmark = pytest.mark.model

LENGTH, HEADS, WINDOW = 400, 2, 64


@dataclass
class Layer:
    """One attention layer's prefill, as kvpress and as adakv see it."""

    module: Any
    hidden_states: Tensor
    kwargs: dict[str, Any]
    inputs: LayerInputs  # with all queries

    def score(self, press: Any, attentions: Tensor | None = None) -> Tensor:
        """``[Hkv, T]`` of a ScorerPress."""
        scores: Tensor = press.score(*self._arguments(), attentions, self.kwargs)[0]
        return scores

    def kept(self, press: Any) -> list[list[int]]:
        """Positions that each kv head keeps under a press of per-head budgets."""
        press.compress(*self._arguments(), None, self.kwargs)
        kept = torch.ones(HEADS, LENGTH, dtype=torch.bool)
        _, heads, positions = self.module.masked_key_indices
        kept[heads, positions] = False
        return [row.nonzero().flatten().tolist() for row in kept]

    def window(self, size: int = WINDOW) -> LayerInputs:
        return replace(self.inputs, queries=self.inputs.queries[:, :, -size:])

    def _arguments(self) -> tuple[Any, ...]:
        return self.module, self.hidden_states, self.inputs.keys.clone(), self.inputs.values.clone()


def layers(seed: int) -> Iterator[Layer]:
    """The layers of a random prompt's prefill."""
    model, handed = LLAMA.model(), []
    torch.manual_seed(seed)
    rotate, embedding = families.rotation(model), model.model.rotary_emb

    def take(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        handed.append((module, kwargs["hidden_states"], kwargs["position_embeddings"]))

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(take, with_kwargs=True)
        layer.self_attn.rotary_emb = embedding  # as kvpress itself does
    with torch.no_grad(), captured(model) as calls:
        model(torch.randint(3, VOCAB, (1, LENGTH)), use_cache=False)
        for call, (module, hidden_states, embeddings) in zip(calls, handed, strict=True):
            inputs = LayerInputs(
                *(call[name] for name in ("query", "key", "value")),
                module.o_proj.weight.detach(),
                (LENGTH,),
                0,
                1,
                scale=call["scaling"],
                rotate=rotate,
            )
            yield Layer(module, hidden_states, {"position_embeddings": embeddings}, inputs)


def snapkv(ratio: float) -> Any:
    return kvpress.SnapKVPress(compression_ratio=ratio, window_size=WINDOW)


PAIRS = {
    "ada_snapkv@kvpress": lambda ratio: kvpress.AdaKVPress(snapkv(ratio)),
    "critical_ada_snapkv@kvpress": lambda ratio: kvpress.CriticalAdaKVPress(snapkv(ratio)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_kvpress_budgets_keep_what_the_preset_keeps(name: str) -> None:
    """Except where docs/lab/policies.md says that they differ, which must be the exception."""
    preset, compared = policy.get(name), 0
    for seed in range(3):
        for layer in layers(seed):
            for ratio in (0.3, 0.5, 0.7):
                budget = int(LENGTH * (1 - ratio))
                theirs = layer.kept(PAIRS[name](ratio))
                if differs_by_design(name, theirs, budget):
                    continue
                ours = kept_rows(preset.choose(layer.window(), budget), HEADS)[0]
                assert ours == theirs, (seed, ratio)
                compared += 1
    assert compared > 18


def test_kvpress_critical_keeps_what_the_preset_keeps() -> None:
    compared = 0
    for seed in range(3):
        for layer in layers(seed):
            for ratio in (0.3, 0.5, 0.7):
                budget = int(LENGTH * (1 - ratio))
                scores = layer.score(kvpress.CriticalKVPress(snapkv(ratio)))
                theirs = scores.topk(budget).indices.sort().values.tolist()
                if differs_by_design("critical_snapkv@kvpress", theirs, budget):
                    continue
                preset = policy.get("critical_snapkv@kvpress")
                assert kept_rows(preset.choose(layer.window(), budget), HEADS)[0] == theirs
                compared += 1
    assert compared > 18


def differs_by_design(name: str, rows: list[list[int]], budget: int) -> bool:
    """kvpress dropped a token of the window, or a guaranteed share is over half of a head's."""
    newest = set(range(LENGTH - WINDOW, LENGTH))
    dropped = any(not newest <= set(row) for row in rows)
    share = name.startswith("critical_ada") and any(len(row) < 0.4 * budget for row in rows)
    return dropped or share


def test_kvpress_scores_are_ours() -> None:
    """Where nothing is pinned; h2o's mean is kvpress' ObservedAttentionPress."""
    for layer in layers(0):
        inputs, sinks = layer.inputs, slice(4, None)
        snap = policy.get("snapkv@kvpress").scorer.score(layer.window(WINDOW))
        pairs = [
            (snap, snapkv(0.5), slice(-WINDOW)),
            (LastQuery().score(layer.window(1)), kvpress.TOVAPress(), slice(-1)),
            (KeyDiff().score(inputs), kvpress.KeyDiffPress(), slice(None)),
            (KeyNorm().score(inputs), kvpress.KnormPress(), slice(None)),
            (ExpectedAttention().score(inputs), kvpress.ExpectedAttentionPress(), sinks),
            (
                ExpectedAttention(epsilon=0.01).score(inputs),
                kvpress.ExpectedAttentionPress(epsilon=0.01),
                sinks,
            ),
        ]
        for ours, press, where in pairs:
            theirs = layer.score(press)
            torch.testing.assert_close(ours[0][:, where], theirs[:, where], rtol=2e-4, atol=1e-6)
        p = attention_weights(inputs)
        theirs = layer.score(kvpress.ObservedAttentionPress(), p)
        torch.testing.assert_close(PromptAttention(reduce="mean").score(inputs)[0], theirs)


def attention_weights(inputs: LayerInputs) -> Tensor:
    """``[1, Hq, T, T]``, as eager attention returns them."""
    keys = inputs.keys.repeat_interleave(inputs.queries.shape[1] // HEADS, 1)
    z = inputs.queries @ keys.mT * inputs.scale
    return z.masked_fill(~torch.ones(LENGTH, LENGTH).tril().bool(), -torch.inf).softmax(-1)


def test_press_scorer_gives_the_scores_of_the_press() -> None:
    cases = [
        (snapkv(0.5), ("all_queries",)),
        (kvpress.TOVAPress(), ("all_queries",)),
        (kvpress.KeyDiffPress(), ("all_queries",)),
        (kvpress.LagKVPress(), ("all_queries",)),
        (kvpress.ExpectedAttentionPress(), ("all_queries", "rotate")),
        (kvpress.CriticalKVPress(snapkv(0.5)), ("all_queries", "w_o")),
    ]
    for layer in layers(1):
        for press, needs in cases:
            inputs = layer.inputs if "rotate" in needs else replace(layer.inputs, rotate=None)
            scores = PressScorer(press, needs=needs).score(inputs)[0]
            torch.testing.assert_close(scores, layer.score(press), rtol=2e-4, atol=1e-6)
