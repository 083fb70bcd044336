"""How many requests vLLM runs at once in a small pool of blocks, with and without adakv.

    .venv-vllm/bin/python benchmarks/end_to_end_vllm.py --model FOLDER --save cpu-vllm

(`make vllm` makes that environment.) The prompts are random tokens: what is measured doesn't depend
on what they say. All requests come at once, and the engine is stepped by hand, so that after each
step one can see who runs and what the pool has left. One JSON line for each variant, and with
``--plot FILE`` a picture of both over time.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import time
from typing import Any

import torch
from tqdm import tqdm

from harness import Timing, report

#: One engine in this process, with all its threads.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a folder, or a name that vLLM knows")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=900, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=160, help="tokens that each request writes")
    parser.add_argument("--fit", type=int, default=4, help="whole requests that the pool holds")
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--policy", default="ada_snapkv")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--save", metavar="NAME", help="append to benchmarks/results/NAME.json")
    parser.add_argument("--plot", metavar="FILE", help="draw requests and blocks over time")
    return parser.parse_args()


def run(args: argparse.Namespace, compression: dict[str, Any] | None) -> list[dict[str, float]]:
    """After each step: seconds since the start, of the clock and of all threads; requests running,
    blocks used, tokens written."""
    from vllm.distributed import cleanup_dist_env_and_memory

    from vllm import LLM, SamplingParams

    length = args.prompt + args.new
    engine = LLM(
        args.model,
        dtype=args.dtype,
        block_size=args.block_size,
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        max_model_len=length,
        max_num_seqs=args.requests,
        max_num_batched_tokens=512,
        num_gpu_blocks_override=args.fit * -(-length // args.block_size) + 1,
        additional_config={"adakv": compression} if compression else {},
    ).llm_engine
    core = engine.engine_core.engine_core
    scheduler, pool = core.scheduler, core.scheduler.kv_cache_manager.block_pool
    params = SamplingParams(max_tokens=args.new, temperature=0, ignore_eos=True, detokenize=False)
    rng = random.Random(0)
    for number in range(args.requests):
        prompt = [rng.randrange(1000, 10000) for _ in range(args.prompt)]
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
    steps, written, total = [], dict.fromkeys(map(str, range(args.requests)), 0), args.new
    begin, begin_cpu = time.perf_counter(), time.process_time()
    with tqdm(total=args.requests * total, unit="token", desc=str(compression)) as bar:
        while engine.has_unfinished_requests():
            for output in engine.step():
                count = len(output.outputs[0].token_ids)
                bar.update(count - written[output.request_id])
                written[output.request_id] = count
            steps.append(
                {
                    "seconds": time.perf_counter() - begin,
                    "cpu_seconds": time.process_time() - begin_cpu,
                    "running": len(scheduler.running),
                    "blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
                    "tokens": sum(written.values()),
                }
            )
    core.shutdown()
    del engine, core, scheduler, pool
    gc.collect()
    cleanup_dist_env_and_memory()
    return steps


def plot(runs: dict[str, list[dict[str, float]]], path: str) -> None:
    """Requests that run and blocks that are used, over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained")
    for axes, key, label in zip(
        both, ("running", "blocks"), ("requests running", "blocks used"), strict=True
    ):
        for name, steps in runs.items():
            axes.step([s["seconds"] for s in steps], [s[key] for s in steps], label=name)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    both[0].legend()
    both[1].set_xlabel("seconds")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs both, one after the other."""
    args = options()
    os.environ.update(ENVIRONMENT)
    variants = {
        "vLLM": None,
        f"with adakv, budget {args.budget}": {"policy": args.policy, "budget": args.budget},
    }
    runs = {}
    for name, compression in variants.items():
        steps = runs[name] = run(args, compression)
        times = [a["seconds"] for a in steps]
        spent = sorted(1e6 * (b - a) for a, b in zip([0.0, *times], times, strict=False))
        quartiles = (spent[len(spent) * i // 4] for i in (2, 1, 3))
        report(
            "end_to_end_vllm",
            {
                "variant": name,
                "model": os.path.basename(args.model.rstrip("/")),
                "engine_threads": os.environ.get("OMP_NUM_THREADS", "all"),
                **{k: getattr(args, k) for k in ("requests", "prompt", "new", "fit", "dtype")},
                "block_size": args.block_size,
                "policy": args.policy if compression else None,
            },
            {"step": Timing(*(round(q, 2) for q in quartiles), len(steps))},
            {
                "seconds": times[-1],
                "cpu_seconds": steps[-1]["cpu_seconds"],
                "steps": len(steps),
                "most_running": max(s["running"] for s in steps),
                "most_blocks": max(s["blocks"] for s in steps),
                "tokens_per_second": steps[-1]["tokens"] / times[-1],
            },
            args.save,
        )
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
