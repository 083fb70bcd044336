"""Prompts shared out to several devices: a process for each, with a model of its own.

generate_on     one queue of prompts; who has written some takes the next ones
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from adakv.errors import Error, short
from adakv.hf.generate import BatchOptions, BatchResult, generate_batch
from adakv.hf.prompts import new_token_counts
from adakv.policy import Protection

UNITS = 4  # for each process, so that all of them end at about the same time

Load = Callable[[torch.device], Any]


class Unit(NamedTuple):
    """Prompts that a process takes at once: those from ``first`` on."""

    first: int
    prompts: list[Any]
    settings: dict[str, Any]

    def __str__(self) -> str:
        last = self.first + len(self.prompts) - 1
        return f"prompts[{self.first}]" + (f" to prompts[{last}]" if last > self.first else "")


def generate_on(
    devices: Sequence[str | torch.device],
    model: str | os.PathLike[str] | Load,
    prompts: Sequence[str | Sequence[int] | Tensor],
    *,
    max_new_tokens: int | Sequence[int] = 128,
    protect: Any = None,
    options: BatchOptions | None = None,
    **settings: Any,
) -> list[BatchResult]:
    """:func:`generate_batch` over several devices, on each of which a process has the whole model.

    Processes are spawned: a script that calls this needs ``if __name__ == "__main__":``.

    Parameters
    ----------
    devices : such as ``["cuda:0", "cuda:1"]``
        One process each. ``"cpu"`` may come several times; they share this process's threads.
    model : str, path or callable
        A folder or hub name, of which each process loads the model in the dtype it was saved in, or
        a picklable function that gives one on a ``torch.device``.
    prompts, max_new_tokens, protect, options
        As in :func:`generate_batch`. Prompt i draws from its own generator, wherever it is written.
    settings
        The other arguments of :func:`generate_batch`.

    Returns
    -------
    results : list of :class:`BatchResult`
        In the order of the prompts.

    Raises
    ------
    ValueError, adakv.Error
        What :func:`generate_batch` raises, with the prompt's number in ``prompts``. ``adakv.Error``
        also for anything else that goes wrong in a process, or if one is killed; it names the
        device, and the prompts that the process had. The other processes are ended.
    """
    places = _places(devices)
    given = {"max_new_tokens": max_new_tokens, "protect": protect, **settings}
    units = deque(_units(prompts, len(places), BatchOptions.given(options), given))
    results: list[BatchResult] = []
    workers: list[_Worker] = []
    try:
        for place in places[: len(units)]:
            workers.append(_Worker(place, model, places.count(place)))
            workers[-1].take(units.popleft())
        while busy := {worker.pipe: worker for worker in workers if worker.unit is not None}:
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                results += busy[pipe].results()
                if units:
                    busy[pipe].take(units.popleft())
    finally:
        for worker in workers:
            worker.end()
    return sorted(results, key=lambda result: result.index)


def _places(devices: Sequence[str | torch.device]) -> list[torch.device]:
    if isinstance(devices, (str, torch.device)) or not devices:
        raise ValueError(f'devices must be a list such as ["cuda:0"], got {short(devices)}')
    places = [torch.device(device) for device in devices]
    twice = [place for place in places if place.type != "cpu" and places.count(place) > 1]
    if twice:
        raise ValueError(f"devices must name each GPU once, got {twice[0]} several times")
    return places


def _units(
    prompts: Sequence[Any], num_processes: int, options: BatchOptions, settings: dict[str, Any]
) -> Iterator[Unit]:
    """The prompts in their order, by so many that all processes have some, and full batches where
    there are enough for that."""
    count = len(prompts)
    evenly = -(-count // num_processes)
    size = max(1, min(evenly, max(-(-count // (UNITS * num_processes)), options.max_batch)))
    protect, counts = settings["protect"], new_token_counts(settings["max_new_tokens"], count)
    prefix, classes = settings.get("prefix"), settings.get("classes") or {}
    if isinstance(prefix, Tensor):
        settings = settings | {"prefix": prefix.tolist()}
    seed = int(torch.randint(2**48, ())) if options.seed is None else options.seed
    for first in range(0, count, size):
        mine = slice(first, first + size)
        own = {
            "max_new_tokens": list(counts[mine]),
            "protect": _of(protect, mine, prefix),
            "options": replace(options, seed=seed + first),
            "classes": {name: _of(given, mine, prefix) for name, given in classes.items()} or None,
        }
        texts = [x.tolist() if isinstance(x, Tensor) else x for x in prompts[mine]]
        yield Unit(first, texts, settings | own)


def _of(given: Any, mine: slice, prefix: Any) -> Any:
    """What spans or masks say of some of the prompts; all of it if it is for a prefix."""
    is_common = prefix is not None or Protection.given(given).is_common
    return given if is_common else given[mine]


class _Worker:
    """A process on a device, and the prompts that it has."""

    def __init__(self, device: torch.device, model: Any, sharing: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.device = device
        self.unit: Unit | None = None
        self.pipe, theirs = context.Pipe()
        threads = max(1, torch.get_num_threads() // sharing) if device.type == "cpu" else None
        arguments = (theirs, device, model, threads)
        self._process = context.Process(target=_work, args=arguments, daemon=True)
        self._process.start()
        theirs.close()  # so that its end is heard of

    def take(self, unit: Unit) -> None:
        """Writes after some prompts."""
        self.unit = unit
        with contextlib.suppress(BrokenPipeError):  # it is gone, which results() says
            self.pipe.send(unit)

    def results(self) -> list[BatchResult]:
        """What was written, or the error that came instead."""
        unit, self.unit = self.unit, None
        assert unit is not None
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise Error(
                f"the process on {self.device} ended with exit code {self._process.exitcode} while "
                f"it had {unit}: it was killed, perhaps for want of memory"
            ) from None
        if isinstance(answer, _Failure):
            raise answer.of(unit, self.device)
        return [replace(result, index=unit.first + result.index) for result in answer]

    def end(self) -> None:
        """The process ends, whatever it does."""
        self.pipe.close()
        if self.unit is not None or self._process.exitcode is None:
            self._process.kill()
        self._process.join()


class _Failure(NamedTuple):
    """What went wrong in a process."""

    kind: str
    message: str

    def of(self, unit: Unit, device: torch.device) -> Exception:
        """The error for the one who called, with the prompts' own numbers."""

        def own(found: re.Match[str]) -> str:
            return f"prompts[{unit.first + int(found[1])}]"

        message = re.sub(r"prompts\[(\d+)\]", own, self.message)
        if self.kind in ("ValueError", "Error"):
            return {"ValueError": ValueError, "Error": Error}[self.kind](message)
        return Error(f"{unit} on {device}: {self.kind}: {message}")


def _work(pipe: Connection, device: torch.device, model: Any, threads: int | None) -> None:
    """In a process: writes after what comes, until there is nothing more."""
    if threads is not None:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    loaded = None
    while True:
        try:
            unit = pipe.recv()
        except EOFError:
            return
        try:
            if loaded is None:
                loaded = _load(model, device)
            pipe.send(generate_batch(loaded, unit.prompts, **unit.settings))
        except Exception as error:
            pipe.send(_Failure(type(error).__name__, str(error)))


def _load(model: Any, device: torch.device) -> Any:
    if callable(model):
        return model(device)
    return AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(device).eval()
