"""plan, append and compact on a GPU: launch by launch, and in a graph of many calls."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import harness
from adakv import ops
from adakv.cache import KVCache
from cuda_timing import graph_times, launch_times

KV_HEADS, HEAD_DIM, PAGE_SIZE = 8, 128, 16


def empty_cache(layers: int, sequences: int, entries: int) -> KVCache:
    """Room for ``entries`` per row and some hundred tokens more."""
    row_pages = entries // PAGE_SIZE + 40
    return KVCache(
        num_layers=layers,
        num_sequences=sequences,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_pages=layers * sequences * KV_HEADS * row_pages,
        max_row_pages=4 * row_pages,
        device="cuda",
    )


def random_entries(batch: int, length: int) -> Tensor:
    return torch.randn(batch, KV_HEADS, length, HEAD_DIM, device="cuda").bfloat16()


def random_kept(length: int, budget: int) -> ops.Kept:
    """Random positions in rows of unequal budgets, as Ada-KV gives them."""
    floor, rest = budget // 5, (budget - budget // 5) * KV_HEADS
    share = torch.distributions.Dirichlet(torch.full((KV_HEADS,), 2.0)).sample()
    counts = (floor + share * rest).int().clamp(max=length)
    counts[0] += KV_HEADS * budget - counts.sum()
    rows = [torch.randperm(length)[:n].sort().values for n in counts.tolist()]
    indptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return ops.Kept(torch.cat(rows).int().cuda(), indptr.int().cuda())


def plan(options: object) -> None:
    for layers, sequences in ((32, 64), (32, 1), (1, 64)):
        floor, rest = 205, 819 * KV_HEADS
        share = torch.distributions.Dirichlet(torch.full((KV_HEADS,), 0.7))
        lengths = (floor + share.sample((layers, sequences)) * rest).int().cuda()
        columns = int(lengths.max()) // PAGE_SIZE + 2
        table = torch.randint(1 << 20, (*lengths.shape, columns), device="cuda").int()
        fresh = torch.randint(1 << 20, (*lengths.shape, 32), device="cuda").int()
        call = functools.partial(ops.plan, lengths, table, fresh)
        timings = {"launch": launch_times({"plan": lambda _, call=call: call()})["plan"]}
        timings["graph"] = graph_times({"plan": [call] * 20})["plan"]
        sizes = {"layers": layers, "sequences": sequences, "mean_length": 1024}
        harness.report("plan", sizes, timings, {}, options.save)


def append(options: object) -> None:
    for sequences in (1, 64):
        cache = empty_cache(1, sequences, 16)
        keys, values = random_entries(sequences, 1), random_entries(sequences, 1)
        one = ops.Kept(
            torch.zeros(sequences * KV_HEADS, dtype=torch.int32, device="cuda"),
            torch.arange(sequences * KV_HEADS + 1, dtype=torch.int32, device="cuda"),
        )
        pages = cache.begin(0, [KV_HEADS] * sequences, [1] * sequences)
        ops.compact(keys, values, one, cache.layer(0), *pages)
        room = cache.grow([256] * sequences, 256)
        assert room == 256  # more than is appended here
        call = functools.partial(ops.append, keys, values, cache.layer(0))
        timings = {"launch": launch_times({"append": lambda _, call=call: call()})["append"]}
        timings["graph"] = graph_times({"append": [call] * 4})["append"]
        harness.report("append", {"sequences": sequences}, timings, {}, options.save)


def compact(options: object) -> None:
    for length, budget in ((32768, 3277), (32768, 6554), (131072, 13107)):
        cache = empty_cache(1, 1, length)
        layers = 8  # prompts in turn, more than the L2 cache holds
        prompts = [(random_entries(1, length), random_entries(1, length)) for _ in range(layers)]
        kept = random_kept(length, budget)
        pages = cache.begin(0, [KV_HEADS * budget], [length])
        layer = cache.layer(0)

        def call(i: int, prompts: list = prompts, given: tuple = (kept, layer, *pages)) -> None:
            ops.compact(*prompts[i % len(prompts)], *given)

        index = kept.positions.view(-1).long()
        rows = torch.arange(KV_HEADS, device="cuda").repeat_interleave(kept.indptr.diff().long())

        def by_torch(i: int, prompts: list = prompts, at: tuple = (rows, index)) -> None:
            for x in prompts[i % len(prompts)]:
                x[0][at]

        timings = launch_times({"adakv_launch": call, "torch_launch": by_torch})
        calls = [functools.partial(call, i) for i in range(layers)]
        timings |= graph_times({"adakv_graph": calls})
        moved = 2 * KV_HEADS * budget * HEAD_DIM * 2 * 2
        derived = {"graph_TB_per_s": moved / timings["adakv_graph"].median_us / 1e6}
        sizes = {"length": length, "budget": budget}
        harness.report("compact", sizes, timings, derived, options.save)


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    if options.device != "cuda":
        return
    torch.manual_seed(0)
    for bench in (plan, append, compact):
        bench(options)


if __name__ == "__main__":
    main()
