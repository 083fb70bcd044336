"""Timing for the benches: warm-up, variants in turn, median and spread, one JSON line.

A variant is called with the number of the round, so that it can rotate through buffers larger than
the caches. Variants take turns within a round: what disturbs the machine disturbs all of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import adakv
from adakv.eval.speed import Timing as Timing
from adakv.eval.speed import measure as measure
from adakv.eval.speed import timing as timing

RESULTS = Path(__file__).parent / "results"


class Reader:
    """A variant that reads memory larger than the caches with all threads, as fast as it goes."""

    def __init__(self, num_bytes: int = 1 << 29) -> None:
        self.num_bytes = num_bytes
        self.data = torch.ones(num_bytes // 4)

    def __call__(self, _: int) -> None:
        self.data.sum()


def device(name: str) -> str:
    """Checks a device that the command line names."""
    if name not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {name!r}")
    reason = adakv.cuda_unavailable_reason()
    if not reason and not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
    if name == "cuda" and reason:
        raise argparse.ArgumentTypeError(f"cuda can't be used here: {reason}")
    return name


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benches have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", default="cpu", type=device, metavar="cpu|cuda")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--rounds", type=int, default=20, help="of each variant on a CPU")
    options.add_argument("--save", metavar="NAME", help="append to benchmarks/results/NAME.jsonl")
    return options


Run = Callable[[Any, argparse.Namespace], None]
Cases = tuple[Sequence[Any], Run]  # and what runs each of them


def run_cases(
    options: argparse.ArgumentParser, *, cpu: Sequence[Cases], cuda: Sequence[Cases]
) -> None:
    """Reads the command line and runs the cases of the device that it names."""
    options.add_argument("--only", default="", metavar="TEXT", help="cases whose names contain it")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    for cases, run in cuda if chosen.device == "cuda" else cpu:
        for case in cases:
            if chosen.only in str(case):
                torch.manual_seed(0)
                run(case, chosen)


def report(
    bench: str,
    sizes: Mapping[str, Any],
    timings: Mapping[str, Timing],
    derived: Mapping[str, float],
    save: str | None,
) -> dict[str, Any]:
    """Prints one JSON line, appends it to a file of results and returns it."""
    record = {
        "bench": bench,
        "command": " ".join(["python", *sys.argv]),
        "commit": _output("git", "describe", "--always", "--dirty"),
        "machine": _cpu_model(),
        **_gpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sizes": dict(sizes),
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "derived": {name: round(value, 3) for name, value in derived.items()},
    }
    line = json.dumps(record, separators=(",", ":"))
    sys.stdout.write(line + "\n")
    if save:
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / f"{save}.jsonl").open("a") as file:
            file.write(line + "\n")
    return record


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _gpu() -> dict[str, str]:
    if not torch.cuda.is_initialized():
        return {}
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {"gpu": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda or ""}


def _cpu_model() -> str:
    for line in _output("lscpu").splitlines():
        if line.startswith("Model name:"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
