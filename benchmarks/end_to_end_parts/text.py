"""Answers that outgrow their budget: every ``EVERY`` tokens the text is chosen from again.

A step costs the same however long the text is, so that some rounds of it tell about any length.
What a full cache's step costs at a length is the part step with so many ``--entries``.
"""

from __future__ import annotations

import time

import adakv
from end_to_end_parts.bench import Bench

EVERY = 128


def measure(bench: Bench, batch: int, budget: int, new_tokens: int) -> None:
    """Tokens per second of ``batch`` texts, once all have outgrown ``budget`` entries a head."""
    stream = adakv.generate_stream(
        bench.model,
        [bench.prompt(budget)[0] for _ in range(batch)],
        policy="snapkv",
        budget=budget,
        decode_budget=budget,
        every=EVERY,
        pin_prompt=False,
        max_new_tokens=new_tokens,
        options=adakv.BatchOptions(max_batch=batch, eos_token_id=(), compile=True),
    )
    times = [time.perf_counter() for _ in stream]
    # All texts are written side by side: the last tokens are whole rounds of all of them.
    rounds = (new_tokens - EVERY) // EVERY
    tokens = rounds * EVERY * batch
    seconds = times[-1] - times[-1 - tokens]
    bench.report(
        "text",
        {"batch": batch, "budget": budget, "every": EVERY, "new_tokens": new_tokens},
        {"step": [1e6 * seconds / (rounds * EVERY)] * 2},
        tokens_per_s=tokens / seconds,
    )
