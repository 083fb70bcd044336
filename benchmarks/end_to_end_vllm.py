"""vLLM with and without adakv: first tokens, decode steps, and many requests in a short pool.

    .venv-vllm/bin/python benchmarks/end_to_end_vllm.py --model FOLDER --save cpu-vllm
    python benchmarks/end_to_end_vllm.py --device cuda --variants plain ada_snapkv --save h200-vllm

(`make vllm` makes the environment of the first command.) Without ``--model`` the weights are random
and of Llama-3.1-8B's shape. The prompts are random tokens: what is measured does not depend on what
they say. A load may be of conversations: then each prompt goes on with what was written and more
random tokens, when all have been answered; see ``--prefix-caching``. Every variant runs in a
process of its own, and each load of it in the same engine, whose pool is made as small as the load
asks. All requests of a load come at once, and the engine is stepped by hand, so that after each
step one can see who runs and what the pool has left. One JSON line for each variant and load;
``--plot FILE`` draws both over time for the last load.

What compression costs a request is the time from its arrival to its eighth token, which the step
that compresses lies in, less that of the same prompt with ``"policy": "off"`` in the same engine,
in turn; decode steps are taken off both, as they are faster over fewer entries. That is the GPU's
work and what it waits for the host. ``--profile`` adds what the GPU did in the last round of each
load, by kinds of kernels, and so what of that is the GPU's work.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from harness import device, report, timing

#: One engine in the process that measures, with all its threads.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class Load(NamedTuple):
    """Requests that come at once; or conversations, whose next turns come when all have answers."""

    name: str
    requests: int
    prompt: int  # tokens of each
    new: int  # tokens that each writes
    fit: int  # whole requests that the pool holds
    rounds: int = 1  # how often it is repeated; the fastest counts
    turns: int = 1  # how often prompts go on by as many tokens, behind what was written
    shared: int = 0  # tokens in front of all prompts
    compares: bool = False  # with requests that stay whole: what does compression cost?

    @property
    def longest(self) -> int:
        """Tokens of a request at its end."""
        return self.shared + self.turns * (self.prompt + self.new)


#: Measured by default.
LOADS = {
    "cpu": [
        Load("chats", 8, 60, 16, 8, turns=4, shared=1500),
        Load("short_pool", 16, 900, 160, 4),
        Load("compression", 1, 900, 40, 1, 6, compares=True),
    ],
    "cuda": [
        Load("first_token_8k", 1, 8192, 1, 1, 3),
        Load("first_token_32k", 1, 32768, 1, 1, 3),
        Load("compression_8k", 1, 8192, 40, 1, 6, compares=True),
        Load("compression_32k", 1, 32768, 40, 1, 4, compares=True),
        Load("decode_1_x_8k", 1, 8192, 128, 1, 2),
        Load("decode_6_x_8k", 6, 8192, 128, 6, 2),
        Load("chats", 8, 60, 16, 8, turns=4, shared=1500),
        Load("chats_32", 32, 500, 200, 32, turns=4, shared=4000),
        Load("ample_pool_8k", 16, 8192, 256, 16),
        Load("long_answers", 16, 512, 1500, 16),
        Load("short_pool_8k", 48, 8192, 256, 6),
        Load("short_pool_2k", 48, 2048, 2048, 6),
        Load("short_pool_32k", 48, 32768, 128, 6),
    ],
}


@dataclasses.dataclass
class Step:
    """What is seen after a step of the engine."""

    seconds: float  # of the clock, since the load began
    cpu_seconds: float  # of all threads
    running: int  # requests
    blocks: int  # in use
    tokens: int  # written so far
    is_reading: bool  # whether a request read its prompt before or after it


@dataclasses.dataclass
class Outcome:
    """A load of a variant."""

    steps: list[Step]
    preemptions: int
    prompt_tokens_read: int
    more: dict[str, float] = dataclasses.field(default_factory=dict)  # that was measured

    @property
    def reading_seconds(self) -> float:
        """Until the eighth token, less as many decode steps as the median one behind it."""
        spans = [span for span, step in zip(self.spans, self.steps, strict=True) if step.tokens > 8]
        until = next(step.seconds for step in self.steps if step.tokens >= 8)
        return until - 7 * statistics.median(spans)

    @property
    def spans(self) -> list[float]:
        """Seconds of each step."""
        ends = [0.0, *(step.seconds for step in self.steps)]
        return [b - a for a, b in pairwise(ends)]


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", type=device, metavar="cpu|cuda")
    parser.add_argument("--model", help="a folder, or a name that vLLM knows")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["plain", "ada_snapkv"],
        help="'plain', or a policy, which may have more settings of adakv's as JSON: "
        '\'ada_snapkv {"when": "pressure"}\'',
    )
    parser.add_argument("--loads", nargs="+", metavar="NAME", help="only these loads of the device")
    for field, meaning in (
        ("requests", "that come at once"),
        ("prompt", "tokens of each prompt"),
        ("new", "tokens that each request writes"),
        ("fit", "whole requests that the pool holds"),
    ):
        parser.add_argument(f"--{field}", type=int, help=meaning)
    parser.add_argument("--prefix-caching", action="store_true", help="switch it on")
    parser.add_argument("--budget", type=int, help="128 on a CPU, 1024 on a GPU by default")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="ranks, each on a GPU of its own; N times the --fit takes the same bytes of each",
    )
    parser.add_argument("--profile", action="store_true", help="by torch's profiler, on CUDA")
    parser.add_argument("--save", metavar="NAME", help="append to benchmarks/results/NAME.jsonl")
    parser.add_argument("--plot", metavar="FILE", help="draw requests and blocks over time")
    args = parser.parse_args()
    if args.budget is None:
        args.budget = 1024 if args.device == "cuda" else 128
    known = {load.name: load for load in LOADS[args.device]}
    unknown = set(args.loads or ()) - set(known)
    if unknown:
        parser.error(f"--loads: {', '.join(sorted(unknown))}; the device has {', '.join(known)}")
    given = {k: getattr(args, k) for k in ("requests", "prompt", "new", "fit")}
    given = {k: v for k, v in given.items() if v is not None}
    args.loads = [known[name]._replace(**given) for name in args.loads or known]
    if args.profile and args.device == "cpu":
        parser.error("--profile: needs --device cuda")
    if args.model is None and args.device == "cpu":
        parser.error("--model is needed on a CPU")
    return args


def random_model(folder: str) -> str:
    """The configuration of a model of Llama-3.1-8B's shape."""
    from transformers import LlamaConfig

    from end_to_end_parts.bench import LLAMA_8B

    config = LlamaConfig(**LLAMA_8B, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    return folder


def compression(variant: str, budget: int) -> dict[str, Any] | None:
    """adakv's settings of a variant."""
    if variant == "plain":
        return None
    policy, _, more = variant.partition(" ")
    return {"policy": policy, "budget": budget, **json.loads(more or "{}")}


class Engine:
    """vLLM's engine, stepped by hand."""

    def __init__(self, args: argparse.Namespace, variant: str) -> None:
        from vllm import LLM

        self._block_size = args.block_size
        longest = max(load.longest for load in args.loads)
        on_cuda = args.device == "cuda"
        settings = compression(variant, args.budget)
        more: dict[str, Any] = {}
        if on_cuda:
            more = {"gpu_memory_utilization": 0.85, "async_scheduling": True}
            if settings:
                more["attention_backend"] = "CUSTOM"
        else:
            more = {"enforce_eager": True}
        self._engine = LLM(
            args.model,
            load_format="auto" if args.named_model else "dummy",
            dtype=args.dtype,
            block_size=args.block_size,
            tensor_parallel_size=args.tensor_parallel,
            enable_prefix_caching=args.prefix_caching,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            max_model_len=longest,
            max_num_seqs=max(64 if on_cuda else 1, *(load.requests for load in args.loads)),
            max_num_batched_tokens=8192 if on_cuda else 512,
            num_gpu_blocks_override=max(map(self._blocks, args.loads)) + 1,
            additional_config={"adakv": settings} if settings else {},
            **more,
        ).llm_engine
        self._vocabulary = self._engine.model_config.get_vocab_size()
        core = self._engine.engine_core.engine_core
        self._scheduler = core.scheduler
        self._pool = core.scheduler.kv_cache_manager.block_pool

    def _blocks(self, load: Load) -> int:
        """That hold the whole requests of a load which shall fit."""
        return load.fit * -(-load.longest // self._block_size)

    def run(self, load: Load, seed: int, *, is_whole: bool = False) -> Outcome:
        """Reads and writes a load in a pool of its size; its requests stay whole if they shall."""
        from vllm import SamplingParams

        all_free = self._pool.get_num_free_blocks()
        held = self._pool.get_new_blocks(all_free - self._blocks(load))
        params = SamplingParams(
            max_tokens=load.new,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            extra_args={"adakv": {"policy": "off"}} if is_whole else None,
        )
        rng = random.Random(seed)
        shared = self._words(rng, load.shared)
        texts = [[*shared, *self._words(rng, load.prompt)] for _ in range(load.requests)]
        outcome = Outcome([], 0, 0)
        began = time.perf_counter(), time.process_time()
        for turn in range(load.turns):
            written = self._turn(f"{load.name}-{seed}-{turn}", texts, params, outcome, began)
            for text, words in zip(texts, written, strict=True):
                text += [*words, *self._words(rng, load.prompt)]
        for step in outcome.steps:
            step.blocks -= len(held)
        self._pool.free_blocks(held)
        free = self._pool.get_num_free_blocks()
        assert free == all_free, f"{all_free - free} blocks were not given back"
        return outcome

    def _words(self, rng: random.Random, count: int) -> list[int]:
        return [rng.randrange(self._vocabulary) for _ in range(count)]

    def _turn(
        self,
        name: str,
        texts: list[list[int]],
        params: Any,
        outcome: Outcome,
        began: tuple[float, float],
    ) -> list[list[int]]:
        """Has every text go on, and notes what happens; what was written."""
        requests, places = [], {}
        for number, text in enumerate(texts):
            given = self._engine.add_request(f"{name}-{number}", {"prompt_token_ids": text}, params)
            places[f"{name}-{number}"] = number
            requests.append(self._scheduler.requests.get(given or f"{name}-{number}"))
        written: list[list[int]] = [[] for _ in texts]
        cached = [0] * len(texts)
        before = outcome.steps[-1].tokens if outcome.steps else 0
        total, is_reading = self._pool.num_gpu_blocks - 1, True
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                number = places[output.request_id]
                written[number] = list(output.outputs[0].token_ids)
                cached[number] = output.num_cached_tokens or 0
            running = self._scheduler.running
            was_reading, is_reading = (
                is_reading,
                any(r.num_computed_tokens < r.num_prompt_tokens for r in running),
            )
            outcome.steps.append(
                Step(
                    time.perf_counter() - began[0],
                    time.process_time() - began[1],
                    len(running),
                    total - self._pool.get_num_free_blocks(),
                    before + sum(map(len, written)),
                    was_reading or is_reading,
                )
            )
        outcome.preemptions += sum(r.num_preemptions for r in requests if r is not None)
        outcome.prompt_tokens_read += sum(map(len, texts)) - sum(cached)
        return written


def measure(args: argparse.Namespace, variant: str) -> list[Outcome]:
    """All loads of a variant, in this process."""
    torch.set_grad_enabled(False)
    os.environ.update(ENVIRONMENT)
    engine = Engine(args, variant)
    outcomes = []
    for load in args.loads:
        engine.run(load._replace(requests=1, new=min(load.new, 8)), 100)  # to warm up
        if load.compares and variant != "plain":
            outcomes.append(compared(engine, load, profiles=args.profile))
            continue
        rounds = [engine.run(load, seed) for seed in range(load.rounds - args.profile)]
        if args.profile:
            rounds = [*rounds, profiled(engine, load)[0]]
        best = min(rounds, key=lambda outcome: outcome.steps[-1].seconds)
        best.more.update(rounds[-1].more)
        outcomes.append(best)
        print(f"{variant}: {load.name}: {best.steps[-1].seconds:.3f} s", flush=True)
    return outcomes


def profiled(engine: Engine, load: Load, *, is_whole: bool = False) -> tuple[Outcome, float]:
    """A round with what the GPU did in it, and its seconds but for those of decode steps."""
    from end_to_end_parts import kernels

    outcome, done = kernels.profiled(lambda: engine.run(load, load.rounds - 1, is_whole=is_whole))
    seconds = kernels.seconds_by_kind(done)
    more = {f"device_seconds_{kind}": value for kind, value in seconds.items()}
    outcome.more |= more | {"device_seconds_of": outcome.steps[-1].seconds}
    for name, count, value in kernels.most_time(done, 12):
        print(f"    {1e3 * value:9.2f} ms {count:7} x {name[:110]}")
    return outcome, sum(value for kind, value in seconds.items() if kind in kernels.KINDS)


def compared(engine: Engine, load: Load, *, profiles: bool) -> Outcome:
    """What it costs to compress a load's only request."""
    whole, rounds = [], []
    for seed in range(load.rounds):
        rounds.append(engine.run(load, seed))
        whole.append(engine.run(load, seed, is_whole=True))
    costs = [a.reading_seconds - b.reading_seconds for a, b in zip(rounds, whole, strict=True)]
    reading = statistics.median(outcome.reading_seconds for outcome in whole)
    more = {
        "whole_reading_ms": 1e3 * reading,
        "compression_ms": 1e3 * statistics.median(costs),
        "least_compression_ms": 1e3 * min(costs),
        "most_compression_ms": 1e3 * max(costs),
        "compression_percent": 100 * statistics.median(costs) / reading,
    }
    if profiles:
        (_, least), (of_it, most) = (
            profiled(engine, load, is_whole=is_whole) for is_whole in (True, False)
        )
        more |= of_it.more
        more |= {"whole_device_ms": 1e3 * least, "compression_device_ms": 1e3 * (most - least)}
    print(f"{load.name}: {more}", flush=True)
    best = min(rounds, key=lambda outcome: outcome.steps[-1].seconds)
    best.more.update(more)
    return best


def derived(outcome: Outcome) -> dict[str, float]:
    """What is reported of a load."""
    steps, last = outcome.steps, outcome.steps[-1]
    most = max(step.running for step in steps)
    spans = outcome.spans
    first = next(step.seconds for step in steps if step.tokens)
    reading = sum(span for span, step in zip(spans, steps, strict=True) if step.is_reading)
    full = [
        span
        for span, step in zip(spans, steps, strict=True)
        if step.running == most and not step.is_reading
    ]
    return {
        "seconds": last.seconds,
        "cpu_seconds": last.cpu_seconds,
        "steps": len(steps),
        "first_token_seconds": first,
        "seconds_reading": reading,
        **({"decode_step_ms": 1e3 * statistics.median(full)} if full else {}),
        **({"slowest_decode_step_ms": 1e3 * max(full)} if full else {}),
        "most_running": most,
        "most_blocks": max(step.blocks for step in steps),
        "preemptions": outcome.preemptions,
        "prompt_tokens_read": outcome.prompt_tokens_read,
        "tokens_per_second": last.tokens / last.seconds,
        **outcome.more,
    }


def plot(runs: dict[str, list[Step]], path: str) -> None:
    """Requests that run and blocks that are used, over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained")
    for axes, key, label in zip(
        both, ("running", "blocks"), ("requests running", "blocks used"), strict=True
    ):
        for name, steps in runs.items():
            axes.step([s.seconds for s in steps], [getattr(s, key) for s in steps], label=name)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    both[0].legend()
    both[1].set_xlabel("seconds")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs the variants, one after the other."""
    args = options()
    args.named_model = args.model is not None
    if args.device == "cuda":
        torch.cuda.init()  # so that the report names the GPU
    runs: dict[str, list[Step]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            args.model = random_model(folder)
        for variant in args.variants:
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                outcomes = process.submit(measure, args, variant).result()
            for load, outcome in zip(args.loads, outcomes, strict=True):
                report(
                    "end_to_end_vllm",
                    {
                        "variant": variant,
                        "load": load.name,
                        "model": os.path.basename(args.model.rstrip("/"))
                        if args.named_model
                        else "random, Llama-3.1-8B's shape",
                        "engine_threads": os.environ.get("OMP_NUM_THREADS", "all"),
                        **{k: v for k, v in load._asdict().items() if k != "name"},
                        "dtype": args.dtype,
                        "block_size": args.block_size,
                        "tensor_parallel": args.tensor_parallel,
                        "prefix_caching": args.prefix_caching,
                        "budget": args.budget if variant != "plain" else None,
                        "runner": os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "default"),
                    },
                    {"step": timing([1e6 * span for span in outcome.spans])},
                    derived(outcome),
                    args.save,
                )
            runs[variant] = outcomes[-1].steps
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()
