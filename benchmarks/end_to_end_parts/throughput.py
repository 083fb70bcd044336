"""generate_batch from end to end: prompts read, decoded together, given back."""

from __future__ import annotations

import itertools
import statistics
import time

import adakv
from end_to_end_parts.bench import Bench


def measure(
    bench: Bench, prompts: int, length: int, ratio: float, new_tokens: int, compiled: bool
) -> None:
    """All of it: prompts in, tokens out."""
    begin = time.perf_counter()
    stream = adakv.generate_stream(
        bench.model,
        [bench.prompt(length)[0] for _ in range(prompts)],
        ratio=ratio,
        max_new_tokens=new_tokens,
        options=adakv.BatchOptions(max_batch=prompts, eos_token_id=(), compile=compiled),
    )
    # As many prompts are read as there is memory for, then decoded together, one token of each
    # at a time, until all of them end at once.
    times, together = [], 0
    for new in stream:
        times.append(time.perf_counter())
        if new.result is not None and not together:
            together = (len(times) - 1) // (new_tokens - 1)
    waves = times[together - 1 : together * new_tokens : together]
    steps = [1e6 * (b - a) for a, b in itertools.pairwise(waves)][2:]
    bench.report(
        "throughput",
        {
            "prompts": prompts,
            "together": together,
            "tokens": length,
            "ratio": ratio,
            "new_tokens": new_tokens,
            "compiled": compiled,
        },
        {"step": steps, "all": [1e6 * (times[-1] - begin)] * 2},
        tokens_per_s=prompts * new_tokens / (times[-1] - begin),
        decode_tokens_per_s=together / statistics.median(steps) * 1e6,
        prefill_s=waves[0] - begin,
    )
