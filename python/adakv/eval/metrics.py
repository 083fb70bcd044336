"""How far a compressed cache is from the full one, on the tokens of a given answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from adakv.hf.attachment import CACHE


@dataclass(frozen=True)
class Item:
    """A prompt, what is read after it was compressed, and the answer that is compared.

    Parameters
    ----------
    name : str
        Unique in its data set.
    group : str
        The same for items about the same text: their results aren't independent.
    prompt : tuple of int
        Tokens that are read with full attention, then compressed.
    query : tuple of int
        At least one token, read next, from the compressed cache.
    answer : tuple of int
        At least one token; the model is fed these, whatever it would say itself.
    depth : float in [0, 1], optional
        Where in the prompt the answer is found, if that is known.
    """

    name: str
    group: str
    prompt: tuple[int, ...]
    query: tuple[int, ...]
    answer: tuple[int, ...]
    depth: float | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "query", "answer"):
            if not getattr(self, name):
                raise ValueError(f"{name} of item {self.name!r} must hold at least one token")


@dataclass(frozen=True)
class Quality:
    """Means over the tokens of one answer; ``p`` is the full cache's, ``q`` the compressed one's.

    Parameters
    ----------
    kl : float
        ``KL(p || q) = sum_v p_v (log p_v - log q_v)`` in nats, over the vocabulary; 0 is best.
    agreement : float
        Share of tokens where both have the same first choice.
    exact : float
        1 if every token of the answer is the compressed cache's first choice, otherwise 0.
    loss : float
        ``-log q`` of the answer's tokens, in nats.
    exact_full, loss_full : float
        The same of the full cache.
    """

    kl: float
    agreement: float
    exact: float
    loss: float
    exact_full: float
    loss_full: float


def compare(full: Tensor, compressed: Tensor, answer: Tensor) -> Quality:
    """Quality from two times logits ``[S, V]`` and the answer's tokens ``[S]``, in float64."""
    if full.shape != compressed.shape or answer.shape != full.shape[:1]:
        raise ValueError(
            "full and compressed must both be [S, V] and answer [S], "
            f"got {list(full.shape)}, {list(compressed.shape)} and {list(answer.shape)}"
        )
    log_p, log_q = full.double().log_softmax(-1), compressed.double().log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    choices_p, choices_q = full.argmax(-1), compressed.argmax(-1)
    column = answer[:, None]
    return Quality(
        kl=kl.mean().item(),
        agreement=(choices_p == choices_q).double().mean().item(),
        exact=float(torch.equal(choices_q, answer)),
        loss=-log_q.gather(-1, column).mean().item(),
        exact_full=float(torch.equal(choices_p, answer)),
        loss_full=-log_p.gather(-1, column).mean().item(),
    )


def same_start(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    pairs = zip(tokens, others, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def follow(model: Any, cache: Any, tokens: Tensor, *, one_by_one: bool = False) -> Tensor:
    """Logits ``[S, V]`` after each of ``tokens`` ``[S]``, read from a cache that holds a prompt.

    The first token is read alone, because caches take several right after a prompt for more of it;
    ``one_by_one`` all are, as they are when they are written.
    """
    tokens = tokens.to(model.device)[None]
    width = 1 if one_by_one else max(tokens.shape[1] - 1, 1)
    with torch.inference_mode():
        logits = [
            model(piece, use_cache=True, **{CACHE: cache}).logits[0]
            for piece in (tokens[:, :1], *tokens[:, 1:].split(width, 1))
            if piece.shape[1]
        ]
    return torch.cat(logits)


def answer_logits(model: Any, cache: Any, item: Item, *, one_by_one: bool = False) -> Tensor:
    """Logits ``[S, V]`` that choose each token of an item's answer; the cache holds its prompt, and
    reads what follows as :func:`follow` does."""
    tokens = torch.tensor([*item.query, *item.answer[:-1]])
    return follow(model, cache, tokens, one_by_one=one_by_one)[-len(item.answer) :]
