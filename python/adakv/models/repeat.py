"""The forward in which a model repeats its prompts: scored, and forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from adakv.errors import Error
from adakv.models.store import Store


@contextmanager
def repeating(store: Store, batch: int) -> Iterator[None]:
    """For one forward, of ``batch`` sequences: its queries score the prompts that a store holds.

    Raises ``ValueError`` or ``adakv.Error``, and changes nothing, if there is nothing to repeat.
    """
    if "repeat" not in store.policy.needs:
        raise ValueError("policy: it doesn't score what a repetition looks at")
    prompt = store.prompt(0)
    if prompt is None:
        raise Error("a prompt can be repeated once, right after it was read")
    if batch != len(store.seen) or {*store.seen} != {prompt.keys.shape[2]}:
        raise ValueError(
            f"input_ids must repeat the {len(store.seen)} prompts, all of one length and without "
            f"padding, got {batch} for prompts of {store.seen} tokens"
        )
    store.is_repeating = True
    try:
        yield
    finally:
        store.is_repeating = False
