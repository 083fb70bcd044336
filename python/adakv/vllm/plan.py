"""Which blocks of a request go back to the engine: the one thing that its scheduler and its workers
have to agree on.

A block is the engine's unit: ``block_size`` tokens of all layers and kv heads; for adakv it is one
page for each kv head of each layer. A request that has read its prompt of ``boundary`` tokens is
cut down to ``budget`` entries per kv head on average. They take at most ``kept_blocks`` of its
first blocks, however they are spread over the heads::

    blocks    0 .. kept_blocks - 1    kept_blocks .. tail - 1    tail ..
    hold      what is kept            nothing: they go back      new tokens

A text that is chosen from while it is written goes on so. What is kept of it follows what is kept
of the prompt, in the first blocks that are there, which are the same at every choice::

    blocks    0 .. kept_blocks - 1    tail .. end - 1    end .. last - 1           last ..
    hold      what is kept            the same           nothing: they go back     new tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Order(NamedTuple):
    """What the scheduler wants workers to do with a request.

    Its first ``boundary`` tokens, its prompt, are cut down to ``budget`` entries per kv head at the
    beginning of the step before which it has ``at`` tokens. Those behind its prompt stay.
    """

    at: int
    boundary: int
    budget: int | None = None  #: None: the engine's; 0: not now, but maybe later
    protected: tuple[tuple[int, int], ...] = ()  #: spans of tokens that every head keeps
    due: int = 0  #: tokens from which on its text is chosen from; 0: all of it stays
    #: begin, end and number of the class of spans of tokens that are no text
    classes: tuple[tuple[int, int, int], ...] = ()


class Scheduler:
    """What the engine's scheduler wants, and is told; see :class:`adakv.vllm.ledger.Ledger`.

    This one has each prompt compressed as soon as it has ended.
    """

    @property
    def has_orders(self) -> bool:
        """Whether there may be any for requests whose prompt ended before the last step."""
        return True

    def look(self, first_blocks: Sequence[int]) -> Scheduler:
        """What answers for some requests whose prompts are not dealt with yet, by their first
        blocks. Where ranks have to do the same, all look at once, and the answers are the same."""
        return self

    def is_running(self, first_block: int) -> bool:
        """Whether the scheduler has a request with that first block; otherwise it is gone, or one
        that only warms the engine up."""
        return True

    def order(self, first_block: int, boundary: int, computed: int) -> Order | None:
        """What to do with the request whose prompt of ``boundary`` tokens has ended, which has
        ``computed`` tokens before this step; None: it stays whole. Raises if the scheduler knows of
        another boundary."""
        return Order(computed, boundary)

    def done(self, first_block: int, boundary: int) -> None:
        """All layers have been dealt with."""

    def compressed(self, entries_read: int, entries_kept: int) -> None:
        """Entries of all layers and heads, before and after."""


class Plan(NamedTuple):
    """See the module."""

    kept_blocks: int
    tail: int


def most_kept_blocks(*, budget: int, block_size: int, num_kv_heads: int | None) -> int:
    """First blocks that a compressed request keeps, however long its prompt was.

    A row of n entries takes ``ceil(n / block_size)`` pages. Over H rows of ``H * budget`` entries
    these are at most ``floor(H * (budget + block_size - 1) / block_size)``.
    """
    if num_kv_heads is None:
        return -(-(budget + block_size - 1) // block_size)
    pages = num_kv_heads * (budget + block_size - 1) // block_size
    return -(-pages // num_kv_heads)


def plan(boundary: int, *, budget: int, block_size: int, num_kv_heads: int | None) -> Plan | None:
    """The blocks of a request whose first ``boundary`` tokens are compressed.

    Later each row takes its next pages from the blocks behind ``tail``, which come at least as
    often as it needs them.

    Parameters
    ----------
    boundary : int
        Tokens of the request when it was first scheduled behind its prompt.
    budget : int
        Mean entries per kv head.
    block_size : int
    num_kv_heads : int, or None
        The rows of a layer, of one rank, among which its pages are dealt. None: the pages of all
        layers are dealt among all of their rows, however many these are.

    Returns
    -------
    plan : :class:`Plan`, or None
        None if no block would go back: then the request stays as it is.
    """
    if boundary <= budget:
        return None
    tail = boundary // block_size
    kept_blocks = most_kept_blocks(budget=budget, block_size=block_size, num_kv_heads=num_kv_heads)
    return Plan(kept_blocks, tail) if kept_blocks < tail else None


def end_of_text(
    boundary: int,
    planned: Plan | None,
    *,
    decode_budget: int,
    block_size: int,
    num_kv_heads: int | None,
) -> int:
    """The first block behind all that is kept of a prompt of ``boundary`` tokens, which was
    ``planned`` so, and of the text behind it, ``decode_budget`` entries per kv head.

    A row of p entries of the prompt and s of the text takes at most ``ceil(p / block_size) + ceil(s
    / block_size)`` pages. When a text of ``decode_budget`` and two blocks of tokens has been
    written, this many blocks have been filled, so that new tokens have others.
    """
    budget = decode_budget + (boundary if planned is None else 0)
    kept_blocks = most_kept_blocks(budget=budget, block_size=block_size, num_kv_heads=num_kv_heads)
    return kept_blocks + (0 if planned is None else planned.tail)
