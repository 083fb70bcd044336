"""Prompts and policies shared out to several processes; each loads a model of its own."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import groupby
from typing import Any, NamedTuple

import torch

import adakv
from adakv.eval import runner
from adakv.eval.metrics import Item
from adakv.eval.records import Key, Record
from adakv.policy import Policy

UNITS = 4  # for each process, so that all of them end at about the same time

_own: dict[str, Any] = {}  # what a process was begun with, and its model


class Unit(NamedTuple):
    """What a process measures at once: some policies on one prompt."""

    task: str
    items: list[Item]
    policies: list[str]


def run(
    load: Callable[[], Any],
    num_processes: int,
    tasks: Mapping[str, Sequence[Item]],
    policies: Mapping[str, Policy],
    shares: Sequence[float],
    done: Collection[Key] = (),
    kv_dtypes: Mapping[str, str | None] | None = None,
    **options: Any,
) -> Iterator[Record]:
    """What :func:`adakv.eval.runner.run` yields, in another order, by several processes.

    Parameters
    ----------
    load : picklable function
        Gives the model; called once in each process.
    num_processes : int
        On a GPU they share it. On a CPU they share this process' threads.

    Raises
    ------
    adakv.Error
        If a process is killed, or runs out of memory.
    """
    units = list(_units(tasks, policies, shares, done, UNITS * num_processes))
    if not units:
        return
    finished = frozenset(done)
    threads = max(1, torch.get_num_threads() // num_processes)
    begun_with = {"load": load, "threads": threads}
    pool = ProcessPoolExecutor(
        min(num_processes, len(units)),
        multiprocessing.get_context("spawn"),
        _begin,
        (begun_with,),
    )
    with pool:
        futures = [
            pool.submit(
                _measure,
                {unit.task: unit.items},
                {name: policies[name] for name in unit.policies},
                shares,
                [key for key in _keys(unit, shares) if key in finished],
                kv_dtypes,
                options,
            )
            for unit in units
        ]
        try:
            for future in as_completed(futures):
                yield from future.result()
        except BrokenProcessPool as error:
            raise adakv.Error(
                f"processes: one of {num_processes} was killed or ran out of memory; what it had "
                "not handed over is measured when the command is given again"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _units(
    tasks: Mapping[str, Sequence[Item]],
    policies: Collection[str],
    shares: Sequence[float],
    done: Collection[Key],
    least: int,
) -> Iterator[Unit]:
    """What lacks something, in at least so many units where there are as many policies.

    The first prompts of all tasks come first, so that a stopped run has something of each.
    """
    wanted = runner.missing(tasks, policies, shares, done)
    lacking: dict[tuple[str, str], dict[str, None]] = {}
    for key in wanted:
        lacking.setdefault((key.task, key.item), {})[key.policy] = None
    prompts = []
    for task, items in tasks.items():
        groups = groupby(items, key=lambda item: item.prompt)
        for place, (_, group) in enumerate(groups):
            own = [item for item in group if (task, item.name) in lacking]
            names = [name for name in policies if any(name in lacking[task, i.name] for i in own)]
            prompts += [(place, task, own, names)] if own else []
    prompts.sort(key=lambda prompt: prompt[0])
    parts = -(-least // max(len(prompts), 1))
    for _, task, own, names in prompts:
        for part in range(min(parts, len(names))):
            yield Unit(task, own, names[part::parts])


def _keys(unit: Unit, shares: Sequence[float]) -> list[Key]:
    return runner.missing({unit.task: unit.items}, unit.policies, shares, ())


def _begin(begun_with: dict[str, Any]) -> None:
    """In a new process: it ends with the one that began it, however that ends."""
    _own.update(begun_with)
    torch.set_num_threads(begun_with["threads"])
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _measure(
    tasks: dict[str, list[Item]],
    policies: dict[str, Policy],
    shares: Sequence[float],
    done: list[Key],
    kv_dtypes: Mapping[str, str | None] | None,
    options: dict[str, Any],
) -> list[Record]:
    """In one of the processes: a unit's records."""
    if "model" not in _own:
        _own["model"] = _own["load"]()
    return list(runner.run(_own["model"], tasks, policies, shares, done, kv_dtypes, **options))
