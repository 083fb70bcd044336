"""A model class for lm-eval (github.com/EleutherAI/lm-evaluation-harness), registered as ``adakv``.

    python -m adakv.eval --model adakv --model_args pretrained=MODEL,policy=ada_snapkv,ratio=0.25 \\
        --tasks hellaswag

is ``lm_eval`` with that class known to it. lm-eval hands a task's text and question over as one
prompt, so that the policy's window sees the question.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import DynamicCache

import adakv
from adakv.eval.metrics import follow
from adakv.eval.prefill import Prefill
from adakv.hf.attachment import CACHE
from adakv.policy import get

_Request = tuple[tuple[str, str], list[int], list[int]]


@register_model("adakv")
class CompressedLM(HFLM):
    """transformers' models as lm-eval runs them, with compressed caches.

    Parameters
    ----------
    pretrained : str or PreTrainedModel
        As of lm-eval's ``hf``, like all other options that aren't named here.
    policy : str
    budget : int, optional
    ratio : float in (0, 1], optional
        As of :class:`adakv.Cache`.
    """

    def __init__(
        self,
        pretrained: Any,
        policy: str = adakv.policy.DEFAULT,
        budget: int | None = None,
        ratio: float | None = None,
        **options: Any,  # lm-eval gives whatever stands in --model_args
    ) -> None:
        super().__init__(pretrained=pretrained, **options)
        self._setting = (policy, budget, ratio)
        self._needs = get(policy).needs
        adakv.Cache(self.model, *self._setting)  # what is wrong shows before the long work
        adakv.attach(self.model)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Refused: rolling windows have no prompt that could be compressed."""
        raise adakv.Error("loglikelihood_rolling: such tasks have no prompt to compress")

    def _loglikelihood_tokens(
        self,
        requests: list[_Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether all of it comes first.

        Each context is read once, compressed without its last token and followed from there by that
        token and the continuation, so that every token of it depends on what was kept.
        """
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda i: requests[i][1])
        with tqdm(total=len(requests), disable=disable_tqdm) as bar:
            for context, indices in groupby(order, key=lambda i: requests[i][1]):
                prefill = None
                if len(context) > 1:
                    read = torch.tensor([context[:-1]])
                    prefill = Prefill(self.model, read, needs=self._needs)
                for i in indices:
                    found[i] = self._continuation(prefill, context, requests[i][2])
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
                    bar.update()
        return [found[i] for i in range(len(requests))]

    def _continuation(
        self, prefill: Prefill | None, context: list[int], continuation: list[int]
    ) -> tuple[float, bool]:
        total = len(context) + len(continuation)
        if total > self.max_length:
            raise ValueError(f"a request has {total} tokens, but the model takes {self.max_length}")
        cache: Any = DynamicCache(config=self.model.config)
        if prefill is not None:
            cache = prefill.cache(*self._setting, max_new_tokens=len(continuation))
        tokens = torch.tensor(continuation, device=self.device)
        logits = follow(self.model, cache, torch.tensor(context[-1:] + continuation[:-1]))
        chosen = logits.float().log_softmax(-1).gather(-1, tokens[:, None])
        return chosen.sum().item(), torch.equal(logits.argmax(-1), tokens)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Any:
        more = max_length - context.shape[1]
        cache = adakv.Cache(self.model, *self._setting, max_new_tokens=more)
        options[CACHE] = cache
        return super()._model_generate(context, max_length, stop, **options)
