"""Several policies on one text and question, as a small table: :func:`adakv.compare`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import adakv
from adakv import shown
from adakv.eval import plot
from adakv.eval.answers import FullAnswer, greedy
from adakv.eval.chat import encode_prompt
from adakv.eval.prefill import Prefill
from adakv.policy import DEFAULT, Policy, get
from adakv.policy.base import needs_of

_HEADS = ("policy", "MiB", "of full", "KL", "agreement", "answer")


@dataclass(frozen=True)
class Row:
    """What one policy held of the prompt, and what followed from it."""

    policy: str
    cache_bytes: int  #: of the prompt
    full_bytes: int  #: of all of the prompt's entries
    kl: float  #: to the full cache, in nats a token of its answer
    agreement: float  #: share of the full cache's answer that is the first choice here, too
    answer: str

    def cells(self) -> tuple[str, ...]:
        """For people."""
        size, share = self.cache_bytes / 2**20, self.cache_bytes / self.full_bytes
        numbers = f"{size:.2f}", f"{share:.1%}", f"{self.kl:.3f}", f"{self.agreement:.0%}"
        return (self.policy, *numbers, self.answer)


@dataclass(frozen=True)
class Comparison:
    """A row for the full cache, and one for each policy; a notebook shows it as a table."""

    rows: tuple[Row, ...]

    def __repr__(self) -> str:
        """A text table; answers are on one line."""
        lines = [_HEADS, *((*cells, repr(last)) for *cells, last in (x.cells() for x in self.rows))]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

    def _repr_html_(self) -> str:
        return shown.table([row.cells() for row in self.rows], _HEADS)

    def plot(self) -> Any:
        """A matplotlib figure: memory, KL and agreement of each row as bars.

        Raises ``adakv.Error`` where matplotlib is missing.
        """
        return plot.bars(self.rows)


def compare(
    model: Any,
    tokenizer: Any,
    text: str,
    question: str,
    *,
    policies: Sequence[str | Policy] = (DEFAULT, "critical_ada_snapkv", "ada_snapkv", "snapkv"),
    budget: int | None = None,
    ratio: float | None = None,
    budget_bytes: int | str | None = None,
    max_new_tokens: int = 32,
) -> Comparison:
    """Asks one question about one text with the full cache and with several policies.

    The prompt is read once for all of them. The question stands behind the text, in the chat
    template if the tokenizer has one.

    ``budget``, ``ratio`` and ``budget_bytes`` are those of :class:`adakv.Cache`; ``policies`` are
    names or :class:`adakv.Policy`; answers have up to ``max_new_tokens``, at least 2.
    """
    if isinstance(policies, (str, Policy)) or not policies:
        raise ValueError(f"policies must be a list of policies, got {policies!r}")
    if max_new_tokens < 2:
        raise ValueError(f"max_new_tokens must be at least 2, got {max_new_tokens}")
    settings: dict[str, Any] = {"budget_bytes": budget_bytes, "max_new_tokens": max_new_tokens}
    for policy in policies:  # what makes no sense is refused before the prompt is read
        adakv.Cache(model, policy, budget, ratio, **settings)

    def decoded(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    with adakv.attach(model):
        needs = needs_of(*map(get, policies))
        prefill = Prefill(model, encode_prompt(tokenizer, text, question), needs=needs)
        full = FullAnswer(model, prefill, max_new_tokens)
        rows = []
        for policy in _with_bar(policies):
            cache = prefill.cache(policy, budget, ratio, **settings)
            stats = cache.stats()
            answer = decoded(greedy(model, cache, prefill.logits, max_new_tokens))
            far = full.quality_of(prefill.cache(policy, budget, ratio, **settings))
            sizes = stats["bytes"], stats["full_bytes"]
            rows.append(Row(_name(policy), *sizes, far.kl, far.agreement, answer))
    whole = rows[0].full_bytes
    return Comparison((Row("full", whole, whole, 0.0, 1.0, decoded(full.tokens)), *rows))


def _name(policy: str | Policy) -> str:
    if isinstance(policy, str):
        return policy
    parts = (policy.scorer, policy.allocator, policy.selector)
    return " * ".join(type(part).__name__ for part in parts)


def _with_bar(policies: Sequence[str | Policy]) -> Iterable[str | Policy]:
    """The same, with a bar that says how far it is, in notebooks and terminals that have tqdm."""
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError:
        return policies
    bar: Iterable[str | Policy] = tqdm(policies, "comparing", leave=False, disable=None)
    return bar
