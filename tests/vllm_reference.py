"""What an engine should have written, by adakv's own path through transformers.

Nothing is generated: the engine's own tokens are read again, and at each place the model's choice
is compared with what the engine wrote there.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

import adakv
from adakv.policy import LayerInputs, Policy
from adakv.vllm.config import Settings
from vllm_engine import BLOCK, Compression


def comparable(prompt: list[int], tokens: list[int], compressions: list[Compression]) -> list[int]:
    """The tokens of which it is known with what they were written.

    A request whose last step compressed it is gone when it is looked at.
    """
    last = compressions[-1]
    may_be_cut = not last.lengths.any() and last.boundary < len(prompt) + len(tokens) - 1
    return tokens[:-1] if may_be_cut else tokens


def preferred(logits: Tensor, tokens: list[int]) -> Tensor:
    """``[n]``: by how much a model that says ``logits`` ``[n, V]`` prefers its own choices to
    ``tokens``, in nats."""
    return logits.amax(-1) - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]


#: What float32 may cost a score, relative to it, on the way through some layers.
ROUNDING = 3e-6


def shaken(policy: Policy, number: int) -> Policy:
    """The same with scores that are rounded in another way. With an even number equal ones are
    equal still, as neighbours often are by pooling."""

    class Shaken(type(policy.scorer)):  # type: ignore[misc]
        def score(self, inputs: LayerInputs) -> Tensor:
            scores = super().score(inputs)
            noise = (scores.double() * 1e9 * (number + 1)).sin().nan_to_num()
            if number % 2:
                generator = torch.Generator().manual_seed(number)
                noise = torch.rand(scores.shape, generator=generator) * 2 - 1
            return (scores * (1 + ROUNDING * noise)).float()

    settings = {f.name: getattr(policy.scorer, f.name) for f in fields(policy.scorer)}
    return replace(policy, scorer=Shaken(**settings))


class Reference:
    """A model under adakv's adapter, with an engine's policy, or another one."""

    def __init__(
        self,
        folder: str,
        settings: Settings,
        policy: Policy | None = None,
        *,
        protect: tuple[tuple[int, int], ...] = (),
        images: tuple[tuple[int, int], ...] = (),
        dtype: torch.dtype = torch.float32,
        engine_dtype: torch.dtype = torch.float32,
    ) -> None:
        # "eager", as transformers' faster attention functions leave capped logits uncapped.
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        ).eval()
        # In 16 bits rounding decides which head gets how much.
        self._is_exact = engine_dtype == dtype == torch.float32
        self._policy = policy or settings.policy_for(BLOCK)
        self._budget, rule = settings.budget, settings.rule
        self._text = {} if rule is None else rule.arguments
        self._protect, self._classes = protect, {"image": list(images)}
        kinds = getattr(self._model.config, "layer_types", None) or []
        self._sliding = [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]

    def is_tied(
        self, prompt: list[int], tokens: list[int], compressions: list[Compression]
    ) -> bool:
        """Whether rounding alone decides that ``tokens`` are not the model's choices.

        An engine reads a text in other pieces than transformers, and so gets other last bits. Where
        two entries of a text matter equally but for these, another one of them stays, and a random
        model may write another token soon.
        """
        text = self._text
        try:
            for number in range(16):
                policy = shaken(text["decode_policy"], number)
                self._text = text | {"decode_policy": policy}
                if self.choices(prompt, tokens, compressions) == tokens:
                    return True
        finally:
            self._text = text
        return False

    def choices(
        self, prompt: list[int], tokens: list[int], compressions: list[Compression]
    ) -> list[int]:
        """The model's choice at the place of each of ``tokens``."""
        return self.logits(prompt, tokens, compressions).argmax(-1).tolist()

    def differences(
        self, prompt: list[int], tokens: list[int], compressions: list[Compression]
    ) -> list[tuple[int, float]]:
        """Places at which ``tokens`` aren't the model's choices, and by how much it prefers these,
        in nats."""
        logits = self.logits(prompt, tokens, compressions)
        written, gaps = torch.tensor(tokens), preferred(logits, tokens).tolist()
        places = (logits.argmax(-1) != written).nonzero()[:, 0].tolist()
        return [(place, gaps[place]) for place in places]

    def logits(
        self, prompt: list[int], tokens: list[int], compressions: list[Compression]
    ) -> torch.Tensor:
        """``[tokens, V]``, float32: what the model says at the place of each of ``tokens``.

        A request reads tokens up to its boundary whole, and then those behind it with what was
        kept; from the start again after a preemption. The first token behind a boundary is still
        the whole prompt's, if reading ended there.
        """
        text = torch.tensor([prompt + tokens])
        ends = [c.num_outputs for c in compressions[1:]] + [len(tokens)]
        logits: list[torch.Tensor] = []
        known = len(prompt) - 1
        for compression, end in zip(compressions, ends, strict=True):
            assert compression.boundary <= len(prompt) + compression.num_outputs
            logits.append(self._read(text[:, : len(prompt) + end - 1], compression)[known:])
            known += len(logits[-1])
        return torch.cat(logits).float()

    @torch.no_grad()
    def _read(self, text: torch.Tensor, compression: Compression) -> torch.Tensor:
        """Logits at all positions of a text that is compressed after its first part."""
        first = text[:, : compression.boundary]
        if compression.at is not None:
            return self._read_late(text, compression)
        policy = self._policy if compression.lengths.any() else adakv.policy.get("full")
        with adakv.attach(self._model):
            given = {"budget": self._budget, "protect": self._protect, **self._text}
            cache = adakv.Cache(self._model, policy, classes=self._classes, **given)
            logits = [self._model(first, past_key_values=cache).logits[0]]
            held = cache.stats()["lengths"][:, 0]
            held = held[[i for i in range(len(held)) if i not in self._sliding]]
            if compression.lengths.any():
                sums = held.sum(1), compression.lengths.sum(1)
                assert torch.equal(*((held, compression.lengths) if self._is_exact else sums))
            ends = [*compression.choices, text.shape[1]]
            begins = [compression.boundary, *compression.choices]
            for begin, end in zip(begins, ends, strict=True):
                if begin < end:
                    part = text[:, begin:end]
                    logits.append(self._model(part, past_key_values=cache).logits[0])
        return torch.cat(logits)

    def _read_late(self, text: torch.Tensor, compression: Compression) -> torch.Tensor:
        """Of a text whose first part is compressed when more of it has been read."""
        boundary, at = compression.boundary, compression.at
        with adakv.attach(self._model):
            given = {"budget": self._budget, "protect": self._protect}
            cache = adakv.Cache(self._model, self._policy, classes=self._classes, **given)
            self._model(text[:, :boundary], past_key_values=cache)
            kept = [cache.kept(layer)[0] for layer in range(len(compression.lengths))]
        assert [[len(x) for x in rows] for rows in kept] == compression.lengths.tolist()

        def attend(
            module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any
        ):
            length, groups = q.shape[2], q.shape[1] // k.shape[1]
            seen = torch.ones(k.shape[1], length, length, dtype=torch.bool).tril()
            for row, positions in zip(seen, kept[module.layer_idx], strict=True):
                is_kept = torch.zeros(boundary, dtype=torch.bool)
                is_kept[positions.long()] = True
                row[at:, :boundary] &= is_kept
            mask = seen.repeat_interleave(groups, 0)
            out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
            return out.transpose(1, 2), None

        AttentionInterface.register("late", attend)
        self._model.set_attn_implementation("late")
        try:
            return self._model(text, use_cache=False).logits[0]
        finally:
            self._model.set_attn_implementation("eager")
