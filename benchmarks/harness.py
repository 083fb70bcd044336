"""Timing for the benches: warm-up, variants in turn, median and spread, one JSON line.

A variant is called with the number of the round, so that it can rotate through buffers larger than
the caches. Variants take turns within a round: what disturbs the machine disturbs all of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import adakv

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the median, and the quartiles around it."""

    median_us: float
    low_us: float
    high_us: float
    rounds: int


def measure(
    variants: Mapping[str, Callable[[int], object]], *, rounds: int = 20, warmup: int = 3
) -> dict[str, Timing]:
    """Times every variant once a round, until the device is done with it."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(warmup + rounds):
        for name, run in variants.items():
            wait()
            begin = time.perf_counter()
            run(i)
            wait()
            if i >= warmup:
                times[name].append((time.perf_counter() - begin) * 1e6)
    return {name: timing(samples) for name, samples in times.items()}


def timing(samples_us: list[float]) -> Timing:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(samples_us * (1 + (len(samples_us) == 1)), n=4)
    return Timing(round(median, 2), round(low, 2), round(high, 2), len(samples_us))


class Reader:
    """A variant that reads memory larger than the caches with all threads, as fast as it goes."""

    def __init__(self, num_bytes: int = 1 << 29) -> None:
        self.num_bytes = num_bytes
        self.data = torch.ones(num_bytes // 4)

    def __call__(self, _: int) -> None:
        self.data.sum()


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benches have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", default="cpu", choices=adakv.backends())
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--save", metavar="NAME", help="append to benchmarks/results/NAME.json")
    return options


def run_cases(
    description: str | None, cases: Iterable[Any], run: Callable[[Any, argparse.Namespace], None]
) -> None:
    """Reads the command line and runs every case with the threads and on the device it names."""
    options = parser(description).parse_args()
    torch.set_num_threads(options.threads)
    for case in cases:
        torch.manual_seed(0)
        with torch.device(options.device):
            run(case, options)


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
    line = json.dumps(record)
    sys.stdout.write(line + "\n")
    if save:
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / f"{save}.json").open("a") as file:
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
