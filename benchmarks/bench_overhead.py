"""What is spent before any work is done: each verb on tiny tensors, a step of a tiny model.

    python benchmarks/bench_overhead.py [cuda]

Times the direct call, which is what models use, and the same through torch.ops; then eager steps
of a model whose layers are so small that the host is what takes time, per layer, with transformers'
own cache and with adakv's taking turns. Bar: 15 us a layer more.
"""

from __future__ import annotations

import statistics
import sys
import time
import timeit
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import adakv
from adakv import ops
from adakv.cache import KVCache


def microseconds(call: Callable[[], Any]) -> float:
    """Median of 9 runs of 2,000 calls."""
    call()
    runs = timeit.repeat(call, number=2000, repeat=9)
    return sorted(runs)[4] / 2000 * 1e6


def calls() -> None:
    """Prints a table: verb, direct call, call through the dispatcher."""
    cache = KVCache(
        num_layers=1,
        num_sequences=1,
        num_kv_heads=1,
        head_dim=8,
        num_pages=8,
        max_row_pages=4,
        dtype=torch.float32,
    )
    layer = cache.layer(0)
    page_ids, page_indptr = cache.begin(0, [4], [4])
    x = torch.zeros(1, 1, 4, 8)
    kept = ops.Kept(torch.arange(4, dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32))
    ops.compact(x, x, kept, layer, page_ids, page_indptr)
    scores = ops.score(x[:, :, :2], x)
    budgets = ops.allocate(scores, 3, window=2)
    schedule = ops.plan(*cache.plan_inputs, new_tokens=0)
    one = x[:, :, :1]
    empty = torch.zeros(1, dtype=torch.int32)
    print(f"torch {torch.__version__}\n{'verb':12}{'direct, us':>12}{'torch.ops, us':>15}")
    op = torch.ops.adakv
    for verb, direct, dispatched in [
        (
            "score",
            lambda: ops.score(x[:, :, :2], x),
            lambda: op.score(x[:, :, :2], x),
        ),
        (
            "allocate",
            lambda: ops.allocate(scores, 3, window=2),
            lambda: op.allocate(scores, 3, window=2),
        ),
        (
            "select",
            lambda: ops.select(scores, budgets, window=2, total=3),
            lambda: op.select(scores, budgets, window=2, total=3),
        ),
        (
            "plan",
            lambda: ops.plan(*cache.plan_inputs),
            lambda: op.plan(*cache.plan_inputs),
        ),
        (
            "append",
            lambda: ops.append(one, one, layer, num_new=empty),
            lambda: op.append(one, one, *layer, num_new=empty),
        ),
        (
            "attend",
            lambda: ops.attend(one, layer, schedule[0]),
            lambda: op.attend(one, *layer, schedule[0]),
        ),
    ]:
        print(f"{verb:12}{microseconds(direct):12.2f}{microseconds(dispatched):15.2f}")


@torch.no_grad()
def steps(device: str, num_layers: int = 32) -> None:
    """Prints a table: cache, host time of a layer, what is added to transformers' own."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=num_layers, vocab_size=64,
        num_attention_heads=8, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device).eval()
    prompt = torch.randint(64, (1, 64), device=device)
    per_layer: dict[str, list[float]] = {"transformers": [], "adakv": []}

    def run(cache: Any, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            model(prompt[:, :1], past_key_values=cache, use_cache=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count / num_layers * 1e6

    with adakv.attach(model):
        caches = {"transformers": DynamicCache(), "adakv": adakv.Cache(model, budget=40)}
        for cache in caches.values():
            model(prompt, past_key_values=cache, use_cache=True)
            run(cache, 5)
        for _ in range(21):
            for name, cache in caches.items():
                per_layer[name].append(run(cache, 10))
    pairs = zip(per_layer["adakv"], per_layer["transformers"], strict=True)
    added = statistics.median(ours - theirs for ours, theirs in pairs)
    print(f"{'a step on ' + device:24}{'us per layer':>14}")
    for name, times in per_layer.items():
        print(f"{name:24}{statistics.median(times):14.1f}")
    print(f"{'added':24}{added:14.1f}")


def main() -> None:
    torch.set_num_threads(1)
    calls()
    steps(*sys.argv[1:] or ["cpu"])


if __name__ == "__main__":
    main()
