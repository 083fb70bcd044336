"""Time to the first token of one prompt and the peak of memory, full and compressed."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers import DynamicCache

import adakv
from end_to_end_parts.bench import NEW_TOKENS, Bench, free_memory


def measure(bench: Bench, length: int) -> None:
    """No cache, a full one and compressed ones in turn; memory above the model's."""
    prompt, ratio = bench.prompt(length), bench.args.ratios[0]
    caches: dict[str, Callable[[], Any]] = {
        "none": lambda: None,
        "full": lambda: DynamicCache(config=bench.config),
        **{
            name: functools.partial(
                adakv.Cache, bench.model, name, ratio=ratio, max_new_tokens=NEW_TOKENS
            )
            for name in bench.args.policies
        },
    }
    times: dict[str, list[float]] = {name: [] for name in caches}
    derived: dict[str, float] = {}
    for _ in range(bench.args.prefills):
        for name, make in caches.items():
            before = free_memory()
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
            begin = time.perf_counter()
            cache = make()
            with adakv.attach(bench.model) if name in bench.args.policies else nullcontext():
                bench.model(
                    prompt, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1
                ).logits.argmax()
            torch.cuda.synchronize()
            times[name].append(1e6 * (time.perf_counter() - begin))
            peak = torch.cuda.max_memory_allocated() - base
            held = before - free_memory()  # pages are not torch's
            torch_held = torch.cuda.memory_allocated() - base
            derived[f"peak_GB/{name}"] = (peak + max(held - torch_held, 0)) / 1e9
            derived[f"held_GB/{name}"] = held / 1e9
            del cache
    for name in bench.args.policies:
        added = statistics.median(times[name]) / statistics.median(times["full"]) - 1
        derived[f"added/{name}"] = added
    bench.report("prefill", {"tokens": length, "ratio": ratio}, times, **derived)
