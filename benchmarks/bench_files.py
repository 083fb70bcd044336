"""Saving a cache to a file and loading it, against writing and reading as many bytes.

The entries are random ones of a model with small layers and the kv heads of Llama-3.1-8B. What was
written is synced to the disk, and comes from the page cache when it is read. Beside the time that
passes there is the processor's, which says what a free machine with a faster disk would do.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import adakv
import harness


@dataclass(frozen=True)
class Case:
    layers: int = 8
    kv_heads: int = 8
    head_dim: int = 128
    length: int = 8000
    kv_dtype: str = "auto"


CASES = [Case(), Case(kv_dtype="int8"), Case(kv_dtype="int4")]


def small_model(case: Case, device: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=case.layers,
        num_attention_heads=case.kv_heads,
        num_key_value_heads=case.kv_heads,
        head_dim=case.head_dim,
    )
    return LlamaForCausalLM(config).to(device, torch.bfloat16).eval()


def made(model: LlamaForCausalLM, case: Case) -> adakv.Cache:
    shape = (1, case.kv_heads, case.length, case.head_dim)
    entries = [torch.randn(shape, dtype=torch.bfloat16) for _ in range(case.layers)]
    positions = [torch.arange(case.length).expand(shape[:3])] * case.layers
    settings = {"kv_dtype": case.kv_dtype, "max_new_tokens": 1}
    return adakv.Cache.from_entries(model, entries, entries, positions, case.length, **settings)


def synced(path: Path, write: Callable[[], object]) -> None:
    write()
    with path.open("rb") as file:
        os.fsync(file.fileno())


def processor_seconds(run: Callable[[int], object]) -> float:
    """The least of five."""
    seconds = []
    for _ in range(5):
        start = time.process_time()
        run(0)
        seconds.append(time.process_time() - start)
    return min(seconds)


def run(case: Case, options: argparse.Namespace) -> None:
    model = small_model(case, options.device)
    with adakv.attach(model), tempfile.TemporaryDirectory(dir=options.folder) as folder:
        cache, saved, plain = made(model, case), Path(folder, "cache"), Path(folder, "plain")
        cache.save(saved)
        data = saved.read_bytes()
        variants = {
            "save": lambda _: synced(saved, lambda: cache.save(saved)),
            "load": lambda _: adakv.Cache.load(model, saved, max_new_tokens=1),
            "write": lambda _: synced(plain, lambda: plain.write_bytes(data)),
            "read": lambda _: saved.read_bytes(),
        }
        timings = harness.measure(variants, rounds=options.rounds)
        work = {name: processor_seconds(variant) for name, variant in variants.items()}
    rates = {
        f"{name}_GB_per_s": len(data) / timing.median_us / 1e3 for name, timing in timings.items()
    }
    rates |= {f"{name}_GB_per_processor_s": len(data) / s / 1e9 for name, s in work.items()}
    harness.report("files", asdict(case), timings, {"MB": len(data) / 1e6, **rates}, options.save)


if __name__ == "__main__":
    options = harness.parser(__doc__)
    options.add_argument(
        "--folder", help="where the files are written; default: that for temporary"
    )
    harness.run_cases(options, cpu=[(CASES, run)], cuda=[(CASES, run)])
