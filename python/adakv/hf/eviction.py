"""What :class:`adakv.Cache` evicts after a prompt, or after each of its chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from adakv.cache import KVCache
from adakv.devices import AnyCache
from adakv.policy import Budget, Protection, get
from adakv.recent import Recent
from adakv.reselection import Ask, Reselection, Rule
from adakv.step import Attention

_ANY = 2**31 - 1  # tokens: how long a prompt in chunks will be is not known


def check_chunks(chunked_prefill: bool, chunk_budget: int | None, keep_scores: bool) -> None:
    """Raises ``ValueError`` for what a :class:`adakv.Cache` can't do with prompts in chunks."""
    if not isinstance(chunked_prefill, bool):
        raise ValueError(f"chunked_prefill must be True or False, got {chunked_prefill!r}")
    if chunked_prefill and chunk_budget is not None:
        raise ValueError("chunk_budget must not be given with chunked_prefill, which waits")
    if not isinstance(keep_scores, bool):
        raise ValueError(f"keep_scores must be True or False, got {keep_scores!r}")
    if keep_scores and chunk_budget is not None:
        raise ValueError(
            "keep_scores must not be given with chunk_budget, by which entries of a prompt are "
            "scored again with each chunk"
        )


class Eviction:
    """Which entries a cache evicts, once its prompts, or the first chunks of them, are in pages.

    Parameters
    ----------
    budget : :class:`adakv.policy.Budget`
        Of the prompts.
    chunk_budget : int, optional
        Mean entries per kv head to which every chunk of a prompt brings the cache back. Without it
        prompts are chosen from when all of them is there.
    decode : :class:`adakv.reselection.Rule`, optional
        For the texts behind them.
    ask : callable
        Has an instruction read behind a chunk, for policies that need it.
    """

    def __init__(
        self, budget: Budget, chunk_budget: int | None, decode: Rule | None, ask: Ask
    ) -> None:
        self.decode = decode
        self.text: Reselection | None = None
        """What is chosen from now."""
        self.reads_chunks = False
        """Whether more of the prompts may come."""
        self.budget = budget
        """That of the prompts; one in bytes is replaced when their lengths are known."""
        self._chunks: Rule | None = None
        self._ask = ask if "repeat" in budget.policy.needs else None
        if chunk_budget is not None:
            name = "chunk_budget"
            self._chunks = Rule(budget.policy, chunk_budget, 1, pins_prompt=False, name=name)

    @property
    def first_budget(self) -> Budget:
        """The budget of what comes first: the prompts, or their first chunks."""
        if self._chunks is None:
            return self.budget
        # An instruction can't be read before all layers have the first chunk.
        policy = self.budget.policy if self._ask is None else get("full")
        return Budget(policy, self._chunks.budget)

    @property
    def watcher(self) -> Recent | None:
        """What hears of the queries of steps."""
        return None if self.text is None else self.text.recent

    def begin(
        self,
        lengths: Sequence[int],
        attention: Sequence[Attention],
        protection: Protection,
    ) -> None:
        """Prompts of so many tokens, or their first chunks, are in pages."""
        self._attention, self._protection = attention, protection
        if self._chunks is not None:
            self.reads_chunks = True
            self.text = Reselection(
                self._chunks,
                [0] * len(lengths),
                attention,
                written=lengths,
                protected=protection.spans([_ANY] * len(lengths)),
                ask=self._ask,
            )
        else:
            self._begin_text(lengths)

    def end_prompt(self, kv: AnyCache, slots: slice, seen: Sequence[int]) -> None:
        """The first token behind the prompts comes: the last choice from these."""
        if not self.reads_chunks:
            return
        assert self.text is not None
        self.reads_chunks = False
        rule, of_prompts = self.text.rule, self.budget.of_all(seen)
        self.text.rule = replace(rule, budget=min(of_prompts, rule.budget))
        if self.text.is_due:
            assert isinstance(kv, KVCache)  # Cache refuses to evict on several devices
            self.text.choose(kv, slots)
        self._begin_text(seen)

    def _begin_text(self, prompt_lens: Sequence[int]) -> None:
        self.text = None
        if self.decode is not None:
            protected = self._protection.spans(prompt_lens)
            self.text = Reselection(self.decode, prompt_lens, self._attention, protected=protected)

    def begin_step(self, num_new: Sequence[int], columns: int) -> None:
        """A step comes, which the :attr:`watcher` hears of."""
        if self.text is not None:
            self.text.begin_step(num_new, columns)
