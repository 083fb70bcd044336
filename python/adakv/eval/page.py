"""One prompt on one page: what each head kept, which words that is, memory, agreement."""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import adakv
from adakv.eval.answers import FullAnswer, greedy
from adakv.eval.metrics import same_start
from adakv.eval.prefill import Prefill
from adakv.hf import Cache
from adakv.hf.layers import FullAttentionLayer


@dataclass(frozen=True)
class Piece:
    """A piece of the prompt's text and the share of all kv heads, 0 to 1, that kept it."""

    text: str
    share: float


@dataclass(frozen=True)
class Page:
    """What the page shows.

    Parameters
    ----------
    policy : str
    num_tokens : int
        Of the prompt.
    pieces : list of :class:`Piece`
        The prompt, mostly a token each.
    lengths : ``[L][Hkv]``
        Entries kept of the prompt in the full-attention layers.
    cache_bytes, full_bytes : int
        Of the compressed prompt and of the whole one.
    answer, full_answer : str
        Written greedily from the compressed and from the full cache.
    kl, agreement : float
        On the full cache's answer: see :class:`adakv.eval.metrics.Quality`.
    same_start : int
        Tokens before the first in which the answers differ.
    """

    policy: str
    num_tokens: int
    pieces: list[Piece] = field(repr=False)
    lengths: list[list[int]] = field(repr=False)
    cache_bytes: int
    full_bytes: int
    answer: str
    full_answer: str
    kl: float
    agreement: float
    same_start: int

    def facts(self) -> list[tuple[str, str]]:
        """Names and values."""
        return [
            ("policy", self.policy),
            ("prompt", f"{self.num_tokens} tokens"),
            (
                "KV cache",
                f"{self.cache_bytes / 2**20:.1f} MiB of {self.full_bytes / 2**20:.1f} MiB",
            ),
            ("of the full cache's bytes", f"{self.cache_bytes / self.full_bytes:.1%}"),
            ("same choice as the full cache", f"{self.agreement:.1%} of its tokens"),
            ("KL to the full cache", f"{self.kl:.3f} nats per token"),
            ("same start", f"{self.same_start} tokens"),
        ]

    def markdown(self, picture: str) -> str:
        """Facts, answers, the picture and the words that most heads kept, without the text."""
        rows = "\n".join(f"| {name} | {value} |" for name, value in self.facts())
        return (
            f"# What `{self.policy}` kept\n\n| | |\n| --- | --- |\n{rows}\n\n"
            f"![Entries kept per layer and kv head]({picture})\n\n"
            f"Full cache:\n\n{_quote(self.full_answer)}\n\n"
            f"Compressed cache:\n\n{_quote(self.answer)}\n\n"
            f"Kept by at least half of the kv heads:\n\n{_quote(self._most_kept())}\n"
        )

    def html(self, picture: bytes) -> str:
        """The whole page in one file; the darker a word, the more kv heads kept it."""
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
            for name, value in self.facts()
        )
        words = "".join(
            f'<span style="background:rgba(253,141,60,{piece.share:.2f})" '
            f'title="{piece.share:.0%} of the kv heads">{html.escape(piece.text)}</span>'
            for piece in self.pieces
        )
        source = base64.b64encode(picture).decode()
        return _HTML.format(
            title=html.escape(f"What {self.policy} kept"),
            rows=rows,
            picture=f"data:image/png;base64,{source}",
            full_answer=html.escape(self.full_answer),
            answer=html.escape(self.answer),
            words=words,
        )

    def _most_kept(self) -> str:
        parts: list[str] = []
        for piece in self.pieces:
            if piece.share >= 0.5:
                parts.append(piece.text)
            elif not parts or parts[-1] != _GAP:
                parts.append(_GAP)
        return "".join(parts)


_GAP = " … "

_HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto }}
th {{ text-align: left; font-weight: normal; padding-right: 2rem }}
img {{ max-width: 100% }}
pre {{ white-space: pre-wrap; font: 14px/1.6 ui-monospace, monospace }}
</style></head><body>
<h1>{title}</h1>
<table>{rows}</table>
<h2>Entries kept per layer and kv head</h2>
<img src="{picture}" alt="heat map: layers by kv heads">
<h2>Answer of the full cache</h2><pre>{full_answer}</pre>
<h2>Answer of the compressed cache</h2><pre>{answer}</pre>
<h2>The prompt: the darker, the more kv heads kept it</h2>
<pre>{words}</pre>
</body></html>
"""


def make_page(
    model: Any,
    tokenizer: Any,
    prompt: Tensor,
    policy: str,
    *,
    budget: int | None = None,
    ratio: float | None = None,
    budget_bytes: int | str | None = None,
    kv_dtype: str | None = None,
    max_new_tokens: int = 64,
) -> Page:
    """Reads a prompt ``[1, T]`` once and compares what follows from it.

    The model must not be attached. ``policy``, ``budget``, ``ratio``, ``budget_bytes`` and
    ``kv_dtype`` are those of :class:`adakv.Cache`; the answers have up to ``max_new_tokens``, at
    least 2.
    """
    if max_new_tokens < 2:
        raise ValueError(f"max_new_tokens must be at least 2, got {max_new_tokens}")
    with adakv.attach(model):
        prefill = Prefill(model, prompt)

        def compressed() -> Cache:
            return prefill.cache(
                policy,
                budget,
                ratio,
                budget_bytes=budget_bytes,
                kv_dtype=kv_dtype,
                max_new_tokens=max_new_tokens,
            )

        cache = compressed()
        stats, kept = cache.stats(), _kept(cache)
        full = FullAnswer(model, prefill, max_new_tokens)
        own = greedy(model, cache, prefill.logits, max_new_tokens)
        quality = full.quality_of(compressed())
    return Page(
        policy=policy,
        num_tokens=prompt.shape[1],
        pieces=_pieces(tokenizer, prompt[0].tolist(), kept),
        lengths=[[len(positions) for positions in heads] for heads in kept],
        cache_bytes=stats["bytes"],
        full_bytes=stats["full_bytes"],
        answer=tokenizer.decode(own, skip_special_tokens=True).strip(),
        full_answer=tokenizer.decode(full.tokens, skip_special_tokens=True).strip(),
        kl=quality.kl,
        agreement=quality.agreement,
        same_start=same_start(own, full.tokens),
    )


def _kept(cache: Cache) -> list[list[Tensor]]:
    """Per full-attention layer and kv head the positions that are held."""
    layers = [i for i, layer in enumerate(cache.layers) if isinstance(layer, FullAttentionLayer)]
    return [cache.kept(layer)[0] for layer in layers]


def _pieces(tokenizer: Any, tokens: list[int], kept: list[list[Tensor]]) -> list[Piece]:
    """The text of the tokens one by one; of several where only together they are a character."""
    rows = [positions for heads in kept for positions in heads]
    counts = torch.zeros(len(tokens))
    for positions in rows:
        counts[positions.long()] += 1
    shares = (counts / max(len(rows), 1)).tolist()

    def text(start: int, stop: int) -> str:
        return str(tokenizer.decode(tokens[start:stop], clean_up_tokenization_spaces=False))

    pieces: list[Piece] = []
    starts = [0]
    for stop in range(1, len(tokens) + 1):
        # Tokenizers drop a space at the start: decode with a few pieces before, and cut them off.
        start, before = starts[-1], starts[-4:][0]
        whole = text(before, stop)
        if whole.endswith("\ufffd") and stop < len(tokens):
            continue
        share = sum(shares[start:stop]) / (stop - start)
        pieces.append(Piece(whole[len(text(before, start)) :], share))
        starts.append(stop)
    return pieces


def _quote(text: str) -> str:
    """As it is, whatever HTML or Markdown is in it."""
    return f"<pre>{html.escape(text)}</pre>"
