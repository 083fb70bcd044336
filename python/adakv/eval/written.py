"""Texts instead of prompts: what follows a short prompt is evicted from while it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import PreTrainedModel

from adakv.hf import Cache
from adakv.hf.attachment import CACHE
from adakv.policy import EveryTokens, Policy


@dataclass(frozen=True)
class Written:
    """Takes all but the first tokens of a prompt for a text that the model has written.

    Parameters
    ----------
    prompt : int
        Tokens that are read as a prompt; all of them are kept.
    every, pin_prompt
        As in :class:`adakv.Cache`.
    """

    prompt: int
    every: int = EveryTokens.every
    pin_prompt: bool = True

    def cache(
        self,
        model: PreTrainedModel,
        tokens: Sequence[int],
        policy: Policy,
        share: float,
        kv_dtype: str | None,
    ) -> Cache:
        """A cache through which the model has read ``tokens``, keeping a share of the text.

        The text is read in pieces of ``every`` tokens that end where the cache chooses: nothing is
        evicted within one, so that this is the same as token by token.

        Raises ``ValueError`` if there is no text, or the policy can't choose from one.
        """
        length = len(tokens) - self.prompt
        if length < 1:
            raise ValueError(
                f"written: a prompt has {len(tokens)} tokens, and {self.prompt} of them are no text"
            )
        budget = max(round(share * length), policy.window + policy.scorer.pinned)
        cache = Cache(
            model,
            "full",
            kv_dtype=kv_dtype,
            decode_budget=budget,
            decode_policy=policy,
            every=self.every,
            pin_prompt=self.pin_prompt,
        )
        ends = range(self.prompt + budget % self.every, len(tokens), self.every)
        borders = sorted({0, self.prompt, self.prompt + 1, *ends, len(tokens)})
        ids = torch.tensor([tokens], device=model.device)
        with torch.inference_mode():
            for begin, end in pairwise(borders):
                model(ids[:, begin:end], logits_to_keep=1, use_cache=True, **{CACHE: cache})
        return cache
