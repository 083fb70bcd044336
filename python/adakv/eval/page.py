"""One prompt on one page: what each head kept, which words that is, memory, agreement.

The page is ``page.html``, a template that Jinja fills and escapes. It holds all it needs, and asks
nobody for anything.
"""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.resources import files
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from torch import Tensor

import adakv
from adakv.eval.answers import FullAnswer, greedy
from adakv.eval.metrics import same_start
from adakv.eval.prefill import Prefill
from adakv.hf import Cache
from adakv.hf.layers import FullAttentionLayer
from adakv.policy import get


@dataclass(frozen=True)
class Piece:
    """A piece of the prompt's text and the share of all kv heads, 0 to 1, that kept it."""

    text: str
    share: float
    num_tokens: int = 1


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
    layers : list of int
        The full-attention layers.
    kept : bool ``[L, Hkv, T]``
        Which tokens of the prompt these hold.
    cache_bytes, full_bytes : int
        Of the compressed prompt and of the whole one.
    answer, full_answer : str
        Written greedily from the compressed and from the full cache.
    kl, agreement : float
        On the full cache's answer: see :class:`adakv.eval.metrics.Quality`.
    same_start : int
        Tokens before the first in which the answers differ.
    question : str, optional
        What was asked after the text.
    about : tuple of str
        What else the head of the page says: the model, the type of its cache.
    """

    policy: str
    num_tokens: int
    pieces: list[Piece] = field(repr=False)
    layers: list[int] = field(repr=False)
    kept: Tensor = field(repr=False)
    cache_bytes: int
    full_bytes: int
    answer: str
    full_answer: str
    kl: float
    agreement: float
    same_start: int
    question: str | None = None
    about: tuple[str, ...] = ()

    @cached_property
    def lengths(self) -> list[list[int]]:
        """``[L][Hkv]``: entries that are kept of the prompt."""
        lengths: list[list[int]] = self.kept.sum(2).tolist()
        return lengths

    @property
    def num_heads(self) -> int:
        """kv heads of a layer."""
        return self.kept.shape[1]

    @property
    def num_rows(self) -> int:
        """kv heads of all full-attention layers."""
        return len(self.layers) * self.num_heads

    @property
    def least(self) -> int:
        """The fewest entries that a kv head keeps."""
        return min(map(min, self.lengths))

    @property
    def most(self) -> int:
        """The most entries that a kv head keeps."""
        return max(map(max, self.lengths))

    @property
    def mean_length(self) -> float:
        """Entries that a kv head keeps on average."""
        return sum(map(sum, self.lengths)) / self.num_rows

    @property
    def entries_share(self) -> float:
        """Share of all entries that is kept, 0 to 1."""
        return self.mean_length / self.num_tokens

    @property
    def bytes_share(self) -> float:
        """What the cache takes, as a share of the full cache."""
        return self.cache_bytes / self.full_bytes

    def packed(self) -> str:
        """``kept`` in base64: rows of bytes, eight tokens each, of which the first is lowest."""
        bits = torch.nn.functional.pad(self.kept, (0, -self.num_tokens % 8)).unflatten(2, (-1, 8))
        packed = (bits << torch.arange(8, dtype=torch.uint8)).sum(3, dtype=torch.uint8)
        return base64.b64encode(bytes(packed.flatten().tolist())).decode()

    def facts(self) -> list[tuple[str, str]]:
        """Names and values."""
        return [
            ("policy", self.policy),
            ("prompt", f"{self.num_tokens} tokens"),
            ("KV cache", f"{_mebibytes(self.cache_bytes)} of {_mebibytes(self.full_bytes)}"),
            ("of the full cache's bytes", f"{self.bytes_share:.1%}"),
            ("same choice as the full cache", f"{self.agreement:.1%} of its tokens"),
            ("KL to the full cache", f"{self.kl:.3f} nats per token"),
            ("same start", f"{self.same_start} tokens"),
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"kept": self.packed(), "lengths": self.lengths}

    def html(self) -> str:
        """The whole page in one file."""
        environment = Environment(autoescape=True, undefined=StrictUndefined)
        environment.filters["mib"] = _mebibytes
        template = environment.from_string(files("adakv.eval").joinpath("page.html").read_text())
        sizes = _Map(len(self.layers), self.num_heads)
        return template.render(page=self, map=sizes, version=adakv.__version__)


class _Map:
    """Sizes of the heat map, in CSS pixels."""

    left = 26  # of it stand the numbers of the layers

    def __init__(self, num_layers: int, num_heads: int) -> None:
        self.row = max(6, min(18, 420 // num_layers))
        self.column = max(5, min(22, 144 // num_heads))
        self.every = -(-12 // self.row)  # rows from one number to the next
        self.width = self.left + num_heads * self.column
        self.height = num_layers * self.row


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
    question: str | None = None,
    name: str = "",
) -> Page:
    """Reads a prompt ``[1, T]`` once and compares what follows from it.

    The model must not be attached. ``policy``, ``budget``, ``ratio``, ``budget_bytes`` and
    ``kv_dtype`` are those of :class:`adakv.Cache`; the answers have up to ``max_new_tokens``, at
    least 2. ``question``, which the prompt ends with, and the model's ``name`` are shown.
    """
    if max_new_tokens < 2:
        raise ValueError(f"max_new_tokens must be at least 2, got {max_new_tokens}")
    with adakv.attach(model):
        prefill = Prefill(model, prompt, needs=get(policy).needs)

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
        layers = [i for i, own in enumerate(cache.layers) if isinstance(own, FullAttentionLayer)]
        if not layers:
            raise ValueError(f"model: {type(model).__name__} has no layers with full attention")
        stats, kept = cache.stats(), _kept(cache, layers, prompt.shape[1])
        full = FullAnswer(model, prefill, max_new_tokens)
        own = greedy(model, cache, prefill.logits, max_new_tokens)
        quality = full.quality_of(compressed())
    about = [name, f"{prompt.shape[1]} tokens", f"{len(layers)} layers × {kept.shape[1]} kv heads"]
    bits = {"auto": str(model.dtype).removeprefix("torch.")}.get(stats["kv_dtype"])
    return Page(
        policy=policy,
        num_tokens=prompt.shape[1],
        pieces=_pieces(tokenizer, prompt[0].tolist(), kept),
        layers=layers,
        kept=kept,
        cache_bytes=stats["bytes"],
        full_bytes=stats["full_bytes"],
        answer=tokenizer.decode(own, skip_special_tokens=True).strip(),
        full_answer=tokenizer.decode(full.tokens, skip_special_tokens=True).strip(),
        kl=quality.kl,
        agreement=quality.agreement,
        same_start=same_start(own, full.tokens),
        question=question,
        about=tuple(filter(None, [*about, f"cache in {bits or stats['kv_dtype']}"])),
    )


def _kept(cache: Cache, layers: list[int], num_tokens: int) -> Tensor:
    """bool ``[L, Hkv, T]``: which tokens some layers hold."""
    rows = [[positions.long().cpu() for positions in cache.kept(layer)[0]] for layer in layers]
    kept = torch.zeros(len(rows), len(rows[0]), num_tokens, dtype=torch.bool)
    for layer, heads in enumerate(rows):
        for head, positions in enumerate(heads):
            kept[layer, head, positions] = True
    return kept


def _pieces(tokenizer: Any, tokens: list[int], kept: Tensor) -> list[Piece]:
    """The text of the tokens one by one; of several where only together they are a character."""
    shares = kept.float().mean((0, 1)).tolist()

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
        pieces.append(Piece(whole[len(text(before, start)) :], share, stop - start))
        starts.append(stop)
    return pieces


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
