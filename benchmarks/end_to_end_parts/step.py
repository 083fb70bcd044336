"""One decode step of many sequences: eagerly, from a CUDA graph, compiled and from a graph.

Their caches are filled with random entries, as many as a policy keeps, spread over the heads as
Ada-KV spreads them. The floor: weights and kept entries, read once, at the rate of a large copy in
the same run.
"""

from __future__ import annotations

import functools
import statistics
import time

import torch
from torch import Tensor

import adakv
from adakv import ops
from adakv.cache import KVCache
from adakv.hf.cuda_graph import Steps
from adakv.hf.sampling import Sampling
from adakv.hf.slots import Decoder
from adakv.policy import get_read
from adakv.shape import Shape
from cuda_timing import device_times, wall_times
from end_to_end_parts.bench import NEW_TOKENS, SPARE_BYTES, STEPS, Bench, free_memory

FLOOR_SHARE, SKEW = 0.2, 0.7  # of a head's budget that is even; of the Dirichlet draw of the rest


def first_entries(lengths: Tensor) -> ops.Kept:
    """The first positions of every row, as many as ``lengths`` ``[rows]`` says."""
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    positions = torch.arange(int(ends[-1])) - ends[:-1].repeat_interleave(lengths)
    return ops.Kept(positions.int().cuda(), ends.int().cuda())


def filled_decoder(bench: Bench, batch: int, length: int, mean: int) -> Decoder:
    """Sequences of ``length`` tokens, of which each head holds ``mean`` on average."""
    free_memory()
    config, layers = bench.config, bench.config.num_hidden_layers
    heads = config.num_key_value_heads
    kv = memory(bench, batch, pages_of(bench, mean) * batch, length)
    shape = (1, heads, length, bench.head_dim)
    keys, values = (
        torch.randn(shape, dtype=bench.model.dtype, device="cuda").expand(batch, -1, -1, -1)
        for _ in "kv"
    )
    even = int(FLOOR_SHARE * mean)
    draw = torch.distributions.Dirichlet(torch.full((heads,), SKEW))
    for layer in range(layers):
        rest = (draw.sample((batch,)) * (mean - even) * heads).int()
        lengths = (even + rest).clamp(max=length)
        if mean == length:  # a full cache
            lengths.fill_(length)
        totals = lengths.sum(1).tolist()
        ids, indptr = kv.begin(layer, totals, [length] * batch)
        ops.compact(keys, values, first_entries(lengths.flatten()), kv.layer(layer), ids, indptr)
    read = None if bench.args.read is None else get_read(bench.args.read)
    decoder = Decoder(bench.model, kv, Sampling(), read=read)
    logits = torch.randn(bench.config.vocab_size, device="cuda")
    for slot in range(batch):
        decoder.begin(slot, logits, length)
    return decoder


def memory(bench: Bench, batch: int, num_pages: int, length: int) -> KVCache:
    """Pages for the model's layers, in the format under test."""
    config, page_size = bench.config, bench.page_size
    shape = Shape(
        config.num_hidden_layers,
        config.num_key_value_heads,
        bench.head_dim,
        bench.model.dtype,
        torch.device("cuda"),
        bench.args.kv_dtype,
    )
    cache = shape.cache(batch, num_pages, (length + NEW_TOKENS) // page_size + 2, page_size)
    assert isinstance(cache, KVCache)
    return cache


def pages_of(bench: Bench, mean: int) -> int:
    """Those of one sequence, in all layers."""
    heads = bench.config.num_key_value_heads
    pages = KVCache.pages_for(
        mean * heads, NEW_TOKENS, num_kv_heads=heads, page_size=bench.page_size
    )
    return pages * int(bench.config.num_hidden_layers)


def measure(bench: Bench, batch: int, length: int, mean: int) -> None:
    """A step of ``batch`` sequences, by all ways to run it, against the floor."""
    decoder = filled_decoder(bench, batch, length, mean)
    times: dict[str, list[float]] = {}

    def run(steps: Steps) -> list[int]:
        decoder.grow()
        steps.run(batch)
        return decoder.slots.tokens[:, 0].tolist()

    derived: dict[str, float] = {}
    with adakv.attach(bench.model):
        for name in bench.args.steps:
            begin = time.perf_counter()
            steps = Steps(decoder, cuda_graph=name != "eager", compile=name == "compiled")
            run(steps)
            derived[f"first_step_s/{name}"] = time.perf_counter() - begin
            times[f"{name}/wall"] = wall_times(functools.partial(run, steps), STEPS)
            times[f"{name}/device"] = device_times(functools.partial(run, steps), STEPS)
    page = decoder.kv.page_bytes / bench.page_size - 4  # of an entry, without its position
    rows = batch * bench.config.num_hidden_layers * bench.config.num_key_value_heads
    kept = rows * mean * page
    floor = (bench.weight_bytes + kept) / bench.bandwidth * 1e6
    best = min(statistics.median(samples) for samples in times.values())
    derived |= {
        "floor_us": floor,
        "over_floor": best / floor,
        "tokens_per_s": batch / best * 1e6,
        "kept_GB": kept / 1e9,
        "weights_GB": bench.weight_bytes / 1e9,
        "copy_TB_per_s": bench.bandwidth / 1e12,
    }
    sizes = {"batch": batch, "tokens": length, "mean": mean, "kv_dtype": bench.args.kv_dtype}
    if bench.args.read is not None:
        sizes["read"] = bench.args.read
    bench.report("step", sizes, times, **derived)


def largest(bench: Bench, mean: int) -> int:
    """Sequences whose pages, tails and tables fit beside the model."""
    one = memory(bench, 1, 1, mean)
    sequence = pages_of(bench, mean) * one.page_bytes + one.tail_bytes + one.table_bytes
    return int((free_memory() - SPARE_BYTES) // sequence)
