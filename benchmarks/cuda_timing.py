"""Timing on a GPU: launch by launch, in a graph of many layers, or of whole steps.

Launch by launch, the L2 cache is overwritten before each call, and events are recorded around it
(an empty kernel reads about 4 us then). In a graph, the calls of all layers follow each other as in
a model's decode step; each layer has buffers of its own, more than the L2 cache holds together.
Steps of a whole model are timed as they come.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from harness import Timing, timing

FLUSH_BYTES = 1 << 30


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def launch_times(
    variants: Mapping[str, Callable[[int], object]], rounds: int = 60, warmup: int = 10
) -> dict[str, Timing]:
    """Microseconds of one call; variants take turns and are given the number of the round.

    Nothing waits for the device until all is queued: overwriting the cache takes it longer than a
    call takes the host, so the host stays ahead.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
    for i in range(warmup + rounds):
        for name, run in variants.items():
            begin, end = _event(), _event()
            flush.zero_()
            begin.record()
            run(i)
            end.record()
            if i >= warmup:
                events.setdefault(name, []).append((begin, end))
    torch.cuda.synchronize()
    return {
        name: timing([begin.elapsed_time(end) * 1e3 for begin, end in pairs])
        for name, pairs in events.items()
    }


def graph_times(
    variants: Mapping[str, Sequence[Callable[[], object]]], rounds: int = 15
) -> dict[str, Timing]:
    """Microseconds of one call of many that are recorded in a graph."""
    graphs = {}
    for name, calls in variants.items():
        calls[0]()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graphs[name] = graph
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(2 + rounds):
        for name, graph in graphs.items():
            begin, end = _event(), _event()
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i >= 2:
                times[name].append(begin.elapsed_time(end) * 1e3 / len(variants[name]))
    return {name: timing(samples) for name, samples in times.items()}


def call_times(
    ours: Mapping[str, Callable[[int], object]], peers: Mapping[str, Callable[[int], object]]
) -> dict[str, Timing]:
    """Ours in a graph and launch by launch; peers the latter only, as not all can be recorded."""
    calls = {name: [functools.partial(call, i) for i in range(12)] for name, call in ours.items()}
    timings = {f"{name}, graph": timing for name, timing in graph_times(calls).items()}
    alone = launch_times({**ours, **peers}, rounds=20)
    return timings | {f"{name}, launch": timing for name, timing in alone.items()}


def device_times(run: Callable[[], object], rounds: int) -> list[float]:
    """Microseconds on the device, of each of the calls after two that warm up."""
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
    """Microseconds until the device is done, of each of the calls after two that warm up."""
    times = []
    for i in range(2 + rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(1e6 * (time.perf_counter() - begin))
    return times
