"""What an engine should have written, by adakv's own path through transformers.

Nothing is generated: the engine's own tokens are read again, and at each place the model's choice
is compared with what the engine wrote there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoModelForCausalLM

import adakv
from adakv.policy import Policy
from adakv.vllm.config import Settings
from vllm_engine import BLOCK, Compression


def comparable(prompt: list[int], tokens: list[int], compressions: list[Compression]) -> list[int]:
    """The tokens of which it is known with what they were written.

    A request whose last step compressed it is gone when it is looked at.
    """
    last = compressions[-1]
    may_be_cut = not last.lengths.any() and last.boundary < len(prompt) + len(tokens) - 1
    return tokens[:-1] if may_be_cut else tokens


class Reference:
    """A model under adakv's adapter, with an engine's policy, or another one."""

    def __init__(
        self,
        folder: str,
        settings: Settings,
        policy: Policy | None = None,
        *,
        protect: tuple[tuple[int, int], ...] = (),
    ) -> None:
        # "eager", as transformers' faster attention functions leave capped logits uncapped.
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._policy = policy or settings.policy_for(BLOCK)
        self._budget, rule = settings.budget, settings.rule
        self._text = {} if rule is None else rule.arguments
        self._protect = protect
        kinds = getattr(self._model.config, "layer_types", None) or []
        self._sliding = [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]

    def choices(
        self, prompt: list[int], tokens: list[int], compressions: list[Compression]
    ) -> list[int]:
        """The model's choice at the place of each of ``tokens``.

        A request reads tokens up to its boundary whole, and then those behind it with what was
        kept; from the start again after a preemption. The first token behind a boundary is still
        the whole prompt's, if reading ended there.
        """
        text = torch.tensor([prompt + tokens])
        ends = [c.num_outputs for c in compressions[1:]] + [len(tokens)]
        choices: list[int] = []
        for compression, end in zip(compressions, ends, strict=True):
            boundary = compression.boundary
            logits = self._read(text[:, : len(prompt) + end - 1], compression)
            known = len(prompt) + len(choices) - 1
            choices += logits[known:].argmax(-1).tolist()
            assert boundary <= len(prompt) + compression.num_outputs
        return choices

    @torch.no_grad()
    def _read(self, text: torch.Tensor, compression: Compression) -> torch.Tensor:
        """Logits at all positions of a text that is compressed after its first part."""
        first = text[:, : compression.boundary]
        if compression.at is not None:
            return self._read_late(text, compression)
        policy = self._policy if compression.lengths.any() else adakv.policy.get("full")
        with adakv.attach(self._model):
            given = {"budget": self._budget, "protect": self._protect, **self._text}
            cache = adakv.Cache(self._model, policy, **given)
            logits = [self._model(first, past_key_values=cache).logits[0]]
            held = cache.stats()["lengths"][:, 0]
            held = held[[i for i in range(len(held)) if i not in self._sliding]]
            if compression.lengths.any():
                assert torch.equal(held, compression.lengths)
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
            cache = adakv.Cache(self._model, self._policy, **given)
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
