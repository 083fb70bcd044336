"""Where a GPU's time goes: seconds of kernels by kind, from torch's profiler."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")

#: Of kernels, by what their names have; the first that fits. "compression" is adakv's other verbs.
KINDS = {
    "attention": r"flash|adakv.*(attend|append|plan_kernel)",
    "compression": r"adakv",
    "products": r"gemm|gemv|nvjet|cutlass|splitk",
    "rest": r"",
}


class Kernel(NamedTuple):
    """What a GPU did at a stretch."""

    name: str
    begin: int  # nanoseconds
    end: int
    launch: int  # what the same launch has in common, as all of a CUDA graph


def profiled(run: Callable[[], T]) -> tuple[T, list[Kernel]]:
    """What a function gives, and what the GPU did meanwhile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        result = run()
        torch.cuda.synchronize()
    events = profile.profiler.kineto_results.events()
    return result, [
        Kernel(event.name(), event.start_ns(), event.end_ns(), event.correlation_id())
        for event in events
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation()
    ]


def seconds_by_kind(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Seconds of each kind, in CUDA graphs, which are decode steps, and outside of them; and
    "busy", in which there was at least one kernel."""
    kernels = sorted(kernels, key=lambda kernel: kernel.begin)
    sizes = Counter(kernel.launch for kernel in kernels)
    kinds: dict[str, str] = {}
    seconds = {f"{kind}{where}": 0.0 for kind in KINDS for where in ("", "_in_graphs")}
    busy, until = 0.0, 0
    for kernel in kernels:
        if kernel.name not in kinds:
            name = kernel.name.lower()
            kinds[kernel.name] = next(kind for kind, has in KINDS.items() if re.search(has, name))
        where = "_in_graphs" if sizes[kernel.launch] > 1 else ""
        seconds[kinds[kernel.name] + where] += 1e-9 * (kernel.end - kernel.begin)
        busy += 1e-9 * max(kernel.end - max(kernel.begin, until), 0)
        until = max(until, kernel.end)
    return seconds | {"busy": busy}


def most_time(kernels: Iterable[Kernel], count: int) -> list[tuple[str, int, float]]:
    """Names that took the most time, how often, and seconds."""
    seconds: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for kernel in kernels:
        seconds[kernel.name] += 1e-9 * (kernel.end - kernel.begin)
        times[kernel.name] += 1
    return [(name, times[name], value) for name, value in seconds.most_common(count)]
