"""A whole model on a GPU: prefill, decode step and tokens per second, against transformers' caches.

    python benchmarks/end_to_end.py --device cuda
    python benchmarks/end_to_end.py --device cuda --model DIR --parts step --batches 32

Without --model it is Llama-3.1-8B's shape with random weights. Each part is a module of
end_to_end_parts: prefill, step, full (transformers' own step), throughput (generate_batch) and text
(long answers under a decode budget).
With --plot the decode steps are drawn, too; plot_end_to_end.py does it from saved results.
"""

from __future__ import annotations

import argparse
import statistics

import torch

import plot_end_to_end
from adakv.cli.inputs import DTYPES, load_model
from cuda_timing import device_times
from end_to_end_parts import full, prefill, step, text, throughput
from end_to_end_parts.bench import Bench, free_memory, random_model


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    times = device_times(lambda: target.copy_(source), 10)
    return 2 * source.numel() / (statistics.median(times) * 1e-6)


def add_options(options: argparse.ArgumentParser) -> None:
    """Those of a GPU."""
    group = options.add_argument_group("on a GPU")
    parts = ["prefill", "step", "full", "throughput", "text"]
    group.add_argument("--parts", nargs="+", choices=parts, default=parts[:-1])
    group.add_argument("--layers", type=int, default=32, help="of the random model")
    group.add_argument("--lengths", nargs="+", type=int, default=[4096, 32768, 131072])
    group.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.05, 0.2])
    group.add_argument(
        "--batches", nargs="+", type=int, default=[1, 8, 32, 0], help="0: the largest that fits"
    )
    names = ["eager", "graph", "compiled"]
    group.add_argument("--steps", nargs="+", choices=names, default=names)
    group.add_argument(
        "--entries", nargs="*", type=int, default=[1024], help="more budgets, in entries a head"
    )
    group.add_argument(
        "--prompts", type=int, default=8, help="of the part throughput; 0: the most that fit"
    )
    group.add_argument(
        "--new-tokens", type=int, default=64, help="of the parts throughput and text"
    )
    group.add_argument(
        "--kv-dtype",
        choices=["auto", "int8", "fp8", "int4", "int2"],
        default="auto",
        help="of the part step",
    )
    group.add_argument("--read", help="what steps read, of the part step: 'Quest(share=0.125)'")
    group.add_argument("--plot", metavar="FILE.png", help="draw the decode steps")


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    dtype = DTYPES[args.dtype[-1]]
    if args.model:
        model = load_model(args.model, dtype=dtype, device=torch.device("cuda"))[0]
    else:
        model = random_model(dtype, args.layers)
    bench = Bench(model, args, copy_bandwidth())
    if "prefill" in args.parts:
        model(bench.prompt(256))  # warms up
        for length in args.lengths:
            prefill.measure(bench, length)
    if "step" in args.parts:
        for length in args.lengths:
            for mean in [*(int(ratio * length) for ratio in args.ratios), *args.entries]:
                most = step.largest(bench, mean)
                for batch in sorted({batch or most for batch in args.batches}):
                    if batch <= most:
                        step.measure(bench, batch, length, mean)
    if "full" in args.parts:
        for length in args.lengths:
            most = full.largest(bench, length)
            for batch in sorted({batch or most for batch in args.batches if batch <= most}):
                free_memory()
                full.measure(bench, batch, length, compiled=True)
                torch.compiler.reset()
            free_memory()
            full.measure(bench, max(most // 2, 1), length, compiled=False)
    if "throughput" in args.parts:
        for length in args.lengths:
            for ratio in args.ratios:
                prompts = args.prompts or step.largest(bench, int(ratio * length))
                throughput.measure(
                    bench, prompts, length, ratio, args.new_tokens, args.steps == ["compiled"]
                )
    if "text" in args.parts:
        for budget in args.entries:
            for batch in args.batches:
                text.measure(bench, batch or step.largest(bench, budget), budget, args.new_tokens)
    if args.plot:
        plot_end_to_end.draw(bench.records, args.plot)
