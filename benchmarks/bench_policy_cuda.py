"""score, value_norm, allocate and select on a GPU, at the sizes of Llama-3.1-8B's layers.

In a graph of many calls over rotating buffers, and launch by launch with the L2 cache flushed; the
peers are what other libraries do in torch. "sm_80 path" is what runs on older GPUs, timed here: for
score a negative scale selects it, for value_norm a head dim of 120, which it pads to 128.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import bench_score
import bench_value_norm
import harness
from adakv import ops
from cuda_timing import graph_times, launch_times

KV_HEADS, GROUP, HEAD_DIM, WINDOW, WIDTH = 8, 4, 128, 32, 4096
LENGTHS = (4096, 32768, 131072)
PARTS = ("score", "columns", "choose", "value_norm")
Calls = dict[str, Callable[[int], object]]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def report(bench: str, sizes: dict[str, int | str], ours: Calls, peers: Calls, save: str) -> None:
    """Our calls in a graph and alone; the peers' torch alone, as it can't all be recorded."""
    recorded = {name: [lambda i=i, f=f: f(i) for i in range(12)] for name, f in ours.items()}
    timings = {f"{name}, graph": t for name, t in graph_times(recorded).items()}
    alone = launch_times({**ours, **peers}, rounds=20)
    timings |= {f"{name}, launch": t for name, t in alone.items()}
    harness.report(bench, sizes, timings, {}, save)


def score(length: int, save: str) -> None:
    copies = 3 if length > 40000 else 4 if length > 8000 else 10
    queries = [2 * random(1, KV_HEADS * GROUP, WINDOW, HEAD_DIM) for _ in range(copies)]
    keys = [random(1, KV_HEADS, length, HEAD_DIM) for _ in range(copies)]
    lse = torch.full(queries[0].shape[:3], 12.0, device="cuda")

    def call(**options: object) -> Callable[[int], object]:
        return lambda i: ops.score(queries[i % copies], keys[i % copies], **options)

    ours = {
        "adakv": call(),
        "adakv, lse given": call(lse=lse),
        "adakv, sm_80 path": call(scale=-(HEAD_DIM**-0.5)),
        "adakv, maxima over the window": call(window_reduce="max"),
    }
    torch_peer = {"torch": lambda i: bench_score.plain_torch(queries[i % copies], keys[i % copies])}
    report("score", {"length": length}, ours, torch_peer, save)


def columns(length: int, save: str) -> None:
    """All of a prompt's attention; "prefill attention" is torch's, whose scores these are."""
    queries = [2 * random(1, KV_HEADS * GROUP, length, HEAD_DIM) for _ in range(2)]
    keys = [random(1, KV_HEADS, length, HEAD_DIM) for _ in range(2)]
    lse = torch.full(queries[0].shape[:3], 12.0, device="cuda")

    def call(stride: int = 1, **options: object) -> Callable[[int], object]:
        options = {"window_reduce": "max", "group_reduce": "max", "pool": "none"} | options

        def run(i: int) -> Tensor:
            rows = queries[i % 2][:, :, (length - 1) % stride :: stride]
            return ops.score(
                rows, keys[i % 2], window=WINDOW, stride=stride, distance=16, **options
            )

        return run

    def prefill_attention(i: int) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            queries[i % 2], keys[i % 2], keys[i % 2], is_causal=True, enable_gqa=True
        )

    ours = {
        "column maxima": call(),
        "column maxima, lse given": call(lse=lse),
        "column maxima, every 4th query": call(stride=4),
        "column sums": call(window_reduce="sum", group_reduce="mean"),
    }
    peers: Calls = {"prefill attention": prefill_attention}
    if length < 10000:
        peers["torch, in pieces"] = lambda i: bench_score.plain_torch_columns(
            queries[i % 2], keys[i % 2]
        )
    report("columns", {"length": length}, ours, peers, save)


def scores_like(kind: str, length: int) -> Tensor:
    if kind == "equal":
        return torch.full((1, KV_HEADS, length), 0.25, device="cuda")
    sharpness = torch.linspace(1, 4, KV_HEADS, device="cuda")[:, None]
    scores = (torch.randn(1, KV_HEADS, length, device="cuda") * sharpness).softmax(-1)
    if kind == "bfloat16":
        return scores.bfloat16().float()
    return torch.nn.functional.max_pool1d(scores, 7, 1, 3)


def torch_choice(scores: Tensor, budget: int) -> list[Tensor]:
    """Budgets by one top-k over all heads, as read on the host, then a top-k for each head."""
    candidates = scores[0, :, :-WINDOW]
    total = KV_HEADS * (budget - WINDOW)
    best = candidates.flatten().topk(total).indices // candidates.shape[-1]
    counts = torch.bincount(best, minlength=KV_HEADS)
    counts = (0.8 * counts + 0.2 * (budget - WINDOW)).round().int().tolist()
    return [row.topk(k).indices for row, k in zip(candidates, counts, strict=True)]


def choose(length: int, kind: str, budget: int, save: str) -> None:
    copies = 4
    scores = [scores_like(kind, length) for _ in range(copies)]
    norms = torch.rand_like(scores[0])
    budgets = [ops.allocate(x, budget, window=WINDOW) for x in scores]
    total = KV_HEADS * budget

    def select(i: int, budgets: Tensor, **options: Tensor) -> object:
        return ops.select(scores[i % copies], budgets, window=WINDOW, total=total, **options)

    def allocate(i: int) -> Tensor:
        return ops.allocate(scores[i % copies], budget, window=WINDOW)

    ours = {
        "allocate": allocate,
        "select": lambda i: select(i, budgets[i % copies]),
        "select, two stages": lambda i: select(i, budgets[i % copies], norms=norms),
        "allocate + select": lambda i: select(i, allocate(i)),
    }
    sizes = {"length": length, "scores": kind, "budget": budget}
    report(
        "choose", sizes, ours, {"torch": lambda i: torch_choice(scores[i % copies], budget)}, save
    )


def value_norm(length: int, save: str) -> None:
    values = [random(1, KV_HEADS, length, HEAD_DIM) for _ in range(3)]
    w_o = 0.02 * random(WIDTH, KV_HEADS * GROUP * HEAD_DIM)
    narrow = [v[..., :120].contiguous() for v in values]
    narrow_w_o = w_o[:, : KV_HEADS * GROUP * 120].contiguous()
    ours = {
        "adakv l1": lambda i: ops.value_norm(values[i % 3], w_o),
        "adakv l1, sm_80 path": lambda i: ops.value_norm(narrow[i % 3], narrow_w_o),
        "adakv l2_gram": lambda i: ops.value_norm(values[i % 3], w_o, norm="l2_gram"),
    }
    peer = {"torch l1": lambda i: bench_value_norm.plain_torch(values[i % 3], w_o)}
    report("value_norm", {"length": length}, ours, peer, save)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    options = parser.parse_args()
    only = {options.only} if options.only else set(PARTS)
    for length in options.lengths:
        if "score" in only:
            score(length, options.save)
        if "columns" in only and length < 100000:
            columns(length, options.save)
        if "choose" in only:
            for kind in ("float32", "bfloat16", "equal"):
                choose(length, kind, 1024, options.save)
            choose(length, "float32", length // 5, options.save)
        if "value_norm" in only and length < 100000:
            value_norm(length, options.save)


if __name__ == "__main__":
    main()
