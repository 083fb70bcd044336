"""A whole model on a GPU: prefill, decode step and tokens per second, against transformers' caches.

    python benchmarks/end_to_end.py --device cuda
    python benchmarks/end_to_end.py --device cuda --model DIR --parts step --batches 32

Without --model it is Llama-3.1-8B's shape with random weights. Parts:

prefill     time to the first token of one prompt and the peak of memory, full and compressed
step        one decode step of many sequences: eagerly, from a CUDA graph, compiled and from a
            graph. Their caches are filled with random entries, as many as a policy keeps, spread
            over the heads as Ada-KV spreads them. The floor: weights and kept entries, read once,
            at the rate of a large copy in the same run
full        transformers' own step: dynamic cache, eagerly; static cache, compiled as its generate
            does, at those batches that fit
throughput  generate_batch: prompts read, decoded together, given back

With --plot the decode steps are drawn, too; plot_end_to_end.py does it from saved results.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import adakv
import harness
import plot_end_to_end
from adakv import ops
from adakv.cache import KVCache
from adakv.cli.inputs import DTYPES, load_model
from adakv.models.decode import Decoder
from adakv.models.sampling import Sampling
from adakv.models.steps import Steps

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 1 << 18,
    "rope_theta": 500000.0,
}
NEW_TOKENS = 256  # that pages are made for
STEPS = 20
SPARE_BYTES = 3 << 30  # for activations, graphs and the allocator
FLOOR_SHARE, SKEW = 0.2, 0.7  # of a head's budget that is even; of the Dirichlet draw of the rest


def random_model(dtype: torch.dtype, num_layers: int) -> LlamaForCausalLM:
    """Llama-3.1-8B's shape, made on the device."""
    config = LlamaConfig(**{**LLAMA_8B, "num_hidden_layers": num_layers})
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    times = device_times(lambda: target.copy_(source), 10)
    return 2 * source.numel() / (statistics.median(times) * 1e-6)


def device_times(run: Callable[[], object], rounds: int) -> list[float]:
    """Microseconds on the device."""
    times = []
    for i in range(2 + rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        if i >= 2:
            times.append(1e3 * begin.elapsed_time(end))
    return times


def wall_times(run: Callable[[], object], rounds: int) -> list[float]:
    """Microseconds until the device is done."""
    times = []
    for i in range(2 + rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(1e6 * (time.perf_counter() - begin))
    return times


def first_entries(lengths: Tensor) -> ops.Kept:
    """The first positions of every row, as many as ``lengths`` ``[rows]`` says."""
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    positions = torch.arange(int(ends[-1])) - ends[:-1].repeat_interleave(lengths)
    return ops.Kept(positions.int().cuda(), ends.int().cuda())


def free_memory() -> int:
    """Bytes that are free on the device, when torch has given back what it doesn't use."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


@dataclass
class Bench:
    """The model under test and how results are reported."""

    model: Any
    args: argparse.Namespace
    bandwidth: float
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def config(self) -> Any:
        return self.model.config

    @functools.cached_property
    def head_dim(self) -> int:
        config = self.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @functools.cached_property
    def weight_bytes(self) -> int:
        """What a step reads of the weights: all but the embedding, of which it reads a few rows."""
        parameters = {p.data_ptr(): p.nbytes for p in self.model.parameters()}
        embedding = self.model.get_input_embeddings().weight
        if embedding.data_ptr() != self.model.get_output_embeddings().weight.data_ptr():
            del parameters[embedding.data_ptr()]
        return sum(parameters.values())

    @property
    def entry_bytes(self) -> int:
        """Of one token, over all layers."""
        entry = 2 * self.config.num_key_value_heads * self.head_dim * self.model.dtype.itemsize
        return entry * int(self.config.num_hidden_layers)

    def report(
        self, part: str, sizes: dict[str, Any], times: dict[str, list[float]], **derived: float
    ) -> None:
        sizes = {
            "part": part,
            "model": self.args.model or f"random Llama, {self.config.num_hidden_layers} layers",
            "dtype": str(self.model.dtype).removeprefix("torch."),
            **sizes,
        }
        timings = {name: harness.timing(samples) for name, samples in times.items()}
        self.records.append(
            harness.report("end_to_end_cuda", sizes, timings, derived, self.args.save)
        )
        sys.stdout.flush()

    def prompt(self, length: int) -> Tensor:
        return torch.randint(self.config.vocab_size, (1, length), device="cuda")

    # --- prefill ----------------------------------------------------------------------------

    def prefill(self, length: int) -> None:
        """No cache, a full one and compressed ones in turn; memory above the model's."""
        prompt, ratio = self.prompt(length), self.args.ratios[0]
        caches: dict[str, Callable[[], Any]] = {
            "none": lambda: None,
            "full": lambda: DynamicCache(config=self.config),
            **{
                name: functools.partial(
                    adakv.Cache, self.model, name, ratio=ratio, max_new_tokens=NEW_TOKENS
                )
                for name in self.args.policies
            },
        }
        times: dict[str, list[float]] = {name: [] for name in caches}
        derived: dict[str, float] = {}
        for _ in range(self.args.prefills):
            for name, make in caches.items():
                before = free_memory()
                torch.cuda.reset_peak_memory_stats()
                base = torch.cuda.memory_allocated()
                begin = time.perf_counter()
                cache = make()
                with attached(self.model, name in self.args.policies):
                    self.model(
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
        for name in self.args.policies:
            added = statistics.median(times[name]) / statistics.median(times["full"]) - 1
            derived[f"added/{name}"] = added
        self.report("prefill", {"tokens": length, "ratio": ratio}, times, **derived)

    # --- step -------------------------------------------------------------------------------

    def decoder(self, batch: int, length: int, mean: int) -> Decoder:
        """Sequences of ``length`` tokens, of which each head holds ``mean`` on average."""
        free_memory()
        config, layers = self.config, self.config.num_hidden_layers
        heads = config.num_key_value_heads
        pages = KVCache.pages_for(mean * heads, NEW_TOKENS, num_kv_heads=heads)
        kv = KVCache(
            num_layers=layers,
            num_sequences=batch,
            num_kv_heads=heads,
            head_dim=self.head_dim,
            num_pages=pages * layers * batch,
            max_row_pages=(length + NEW_TOKENS) // 16 + 2,
            dtype=self.model.dtype,
            device="cuda",
        )
        shape = (1, heads, length, self.head_dim)
        keys, values = (
            torch.randn(shape, dtype=self.model.dtype, device="cuda").expand(batch, -1, -1, -1)
            for _ in "kv"
        )
        even = int(FLOOR_SHARE * mean)
        draw = torch.distributions.Dirichlet(torch.full((heads,), SKEW))
        for layer in range(layers):
            rest = (draw.sample((batch,)) * (mean - even) * heads).int()
            lengths = (even + rest).clamp(max=length)
            totals = lengths.sum(1).tolist()
            ids, indptr = kv.begin(layer, totals, [length] * batch)
            ops.compact(
                keys, values, first_entries(lengths.flatten()), kv.layer(layer), ids, indptr
            )
        decoder = Decoder(self.model, kv, Sampling(), NEW_TOKENS)
        logits = torch.randn(self.config.vocab_size, device="cuda")
        for slot in range(batch):
            decoder.begin(slot, logits, length, torch.rand(NEW_TOKENS, dtype=torch.float64))
        return decoder

    def step(self, batch: int, length: int, mean: int) -> None:
        decoder = self.decoder(batch, length, mean)
        times: dict[str, list[float]] = {}

        def run(steps: Steps) -> list[int]:
            decoder.grow()
            steps.run(batch)
            return decoder.slots.tokens[:, 0].tolist()

        derived: dict[str, float] = {}
        with adakv.attach(self.model):
            for name in self.args.steps:
                begin = time.perf_counter()
                steps = Steps(decoder, cuda_graph=name != "eager", compile=name == "compiled")
                run(steps)
                derived[f"first_step_s/{name}"] = time.perf_counter() - begin
                times[f"{name}/wall"] = wall_times(functools.partial(run, steps), STEPS)
                times[f"{name}/device"] = device_times(functools.partial(run, steps), STEPS)
        kept = batch * mean * self.entry_bytes
        floor = (self.weight_bytes + kept) / self.bandwidth * 1e6
        best = min(statistics.median(samples) for samples in times.values())
        derived |= {
            "floor_us": floor,
            "over_floor": best / floor,
            "tokens_per_s": batch / best * 1e6,
            "kept_GB": kept / 1e9,
            "weights_GB": self.weight_bytes / 1e9,
            "copy_TB_per_s": self.bandwidth / 1e12,
        }
        self.report("step", {"batch": batch, "tokens": length, "mean": mean}, times, **derived)

    # --- transformers' own ------------------------------------------------------------------

    def full(self, batch: int, length: int, compiled: bool) -> None:
        """A step of transformers' cache over random entries."""
        shape = (batch, self.config.num_key_value_heads, length, self.head_dim)
        most = length + 2 * STEPS + 8
        cache: Any = (
            StaticCache(config=self.config, max_cache_len=most)
            if compiled
            else DynamicCache(config=self.config)
        )
        entries = torch.randn(shape, dtype=self.model.dtype, device="cuda")
        for layer in range(self.config.num_hidden_layers):
            cache.update(entries, entries, layer)
        del entries
        tokens = self.prompt(batch).T.contiguous()
        mode: dict[str, Any] = {"mode": "reduce-overhead", "fullgraph": False}
        call = torch.compile(self.model.__call__, **mode) if compiled else self.model
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
        self.report("full", sizes, times, tokens_per_s=rate, first_steps_s=first)

    def largest_full(self, length: int) -> int:
        """Sequences whose full cache fits beside the model, and beside a layer's keys and values
        with every head repeated for its group, which SDPA is given where there is a mask."""
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        entry = self.entry_bytes * (1 + group / self.config.num_hidden_layers)
        return int((free_memory() - SPARE_BYTES) // ((length + 2 * STEPS + 8) * entry))

    def largest(self, mean: int) -> int:
        """Sequences whose pages fit beside the model."""
        layers, heads = self.config.num_hidden_layers, self.config.num_key_value_heads
        pages = layers * KVCache.pages_for(mean * heads, NEW_TOKENS, num_kv_heads=heads)
        page = 2 * 16 * self.head_dim * self.model.dtype.itemsize + 16 * 4
        return int((free_memory() - SPARE_BYTES) // (pages * page))

    # --- throughput -------------------------------------------------------------------------

    def throughput(
        self, prompts: int, length: int, ratio: float, new_tokens: int, compiled: bool
    ) -> None:
        """All of it: prompts in, tokens out."""
        begin = time.perf_counter()
        stream = adakv.generate_stream(
            self.model,
            [self.prompt(length)[0] for _ in range(prompts)],
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
        self.report(
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


@contextmanager
def attached(model: Any, wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    with adakv.attach(model):
        yield


def add_options(options: argparse.ArgumentParser) -> None:
    """Those of a GPU."""
    group = options.add_argument_group("on a GPU")
    parts = ["prefill", "step", "full", "throughput"]
    group.add_argument("--parts", nargs="+", choices=parts, default=parts)
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
    group.add_argument("--new-tokens", type=int, default=64, help="of the part throughput")
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
            bench.prefill(length)
    if "step" in args.parts:
        for length in args.lengths:
            for mean in [*(int(ratio * length) for ratio in args.ratios), *args.entries]:
                most = bench.largest(mean)
                for batch in sorted({batch or most for batch in args.batches}):
                    if batch <= most:
                        bench.step(batch, length, mean)
    if "full" in args.parts:
        for length in args.lengths:
            most = bench.largest_full(length)
            for batch in sorted({batch or most for batch in args.batches if batch <= most}):
                free_memory()
                bench.full(batch, length, compiled=True)
                torch.compiler.reset()
            free_memory()
            bench.full(max(most // 2, 1), length, compiled=False)
    if "throughput" in args.parts:
        for length in args.lengths:
            for ratio in args.ratios:
                prompts = args.prompts or bench.largest(int(ratio * length))
                bench.throughput(
                    prompts, length, ratio, args.new_tokens, args.steps == ["compiled"]
                )
    if args.plot:
        plot_end_to_end.draw(bench.records, args.plot)
