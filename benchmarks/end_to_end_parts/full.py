"""transformers' own step over random entries, at those batches that fit.

Its dynamic cache eagerly, its static cache compiled as its generate does.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from cuda_timing import wall_times
from end_to_end_parts.bench import SPARE_BYTES, STEPS, Bench, free_memory


def measure(bench: Bench, batch: int, length: int, compiled: bool) -> None:
    """A step of transformers' cache over random entries."""
    shape = (batch, bench.config.num_key_value_heads, length, bench.head_dim)
    most = length + 2 * STEPS + 8
    cache: Any = (
        StaticCache(config=bench.config, max_cache_len=most)
        if compiled
        else DynamicCache(config=bench.config)
    )
    entries = torch.randn(shape, dtype=bench.model.dtype, device="cuda")
    for layer in range(bench.config.num_hidden_layers):
        cache.update(entries, entries, layer)
    del entries
    tokens = bench.prompt(batch).T.contiguous()
    mode: dict[str, Any] = {"mode": "reduce-overhead", "fullgraph": False}
    call = torch.compile(bench.model.__call__, **mode) if compiled else bench.model
    at = torch.full((batch, 1), length, device="cuda")

    def run() -> list[int]:
        output = call(
            input_ids=tokens,
            position_ids=at,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        tokens.copy_(output.logits[:, -1].argmax(-1, keepdim=True))
        at.add_(1)
        return tokens[:, 0].tolist()

    name = "static, compiled" if compiled else "dynamic, eager"
    begin = time.perf_counter()
    for _ in range(3):
        run()
    first = time.perf_counter() - begin
    times = {f"{name}/wall": wall_times(run, STEPS)}
    rate = batch / statistics.median(times[f"{name}/wall"]) * 1e6
    sizes = {"batch": batch, "tokens": length, "cache": name}
    bench.report("full", sizes, times, tokens_per_s=rate, first_steps_s=first)


def largest(bench: Bench, length: int) -> int:
    """Sequences whose full cache fits beside the model, and beside a layer's keys and values
    with every head repeated for its group, which SDPA is given where there is a mask."""
    group = bench.config.num_attention_heads // bench.config.num_key_value_heads
    entry = bench.entry_bytes * (1 + group / bench.config.num_hidden_layers)
    return int((free_memory() - SPARE_BYTES) // ((length + 2 * STEPS + 8) * entry))
