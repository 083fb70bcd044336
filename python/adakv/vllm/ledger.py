"""What the scheduler and the workers tell each other: which requests are compressed, and counts.

vLLM has no way from one to the other. So the scheduler writes orders down, before it sends the step
in which they are to be carried out, and workers write down what they have done. It is a file in
shared memory, as they may be in different processes: counters, then for each block that is a
request's first one the order, the boundary that a worker compressed at, and how many such requests
have begun, and are gone. A request that no scheduler began is the engine's own: it warms up.

An order names the step by the tokens that the request has before it, so that a worker that is a
step behind the scheduler knows when its time has come. Both sides know where the prompt ended, each
by itself, and compare: a wrong pair would corrupt caches silently.

Each process that uses a ledger has a lock on its file, which ends with the process, however that
ends. So a file without a lock is of an engine that is gone, and whoever finds it removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import tempfile
from collections.abc import Sequence
from itertools import chain
from multiprocessing.util import Finalize  # unlike atexit, children of multiprocessing run it
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adakv.errors import Error
from adakv.vllm.plan import Order, Scheduler
from adakv.vllm.requests import MAX_SPANS


class Counts(NamedTuple):
    """What happened since the engine started; entries are of all layers and heads of one rank."""

    requests_compressed: int = 0
    blocks_given_back: int = 0
    entries_read: int = 0
    entries_kept: int = 0
    compressed_under_pressure: int = 0
    preemptions_avoided: int = 0
    prefix_tokens_found: int = 0
    texts_compressed: int = 0


_PREFIX = "adakv-ledger-"
# Of an order, with the numbers of its spans.
_COLUMNS = len(Order._fields) + 2 * (MAX_SPANS + 1) + 3 * MAX_SPANS
_ledgers: dict[str, Ledger] = {}


class Ledger:
    """The ledger of one engine, opened or made.

    Parameters
    ----------
    name : str
        The same in all processes of the engine.
    num_blocks : int
        Blocks of its pool.
    """

    def __init__(self, name: str, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        size = 8 * (len(Counts._fields) + 1 + (3 + _COLUMNS) * num_blocks)
        file = _locked(path_of(name))  # stays open: the lock is the file's, not the memory's
        if os.fstat(file).st_size < size:
            os.ftruncate(file, size)
        numbers = np.frombuffer(mmap.mmap(file, size), dtype=np.int64)
        counts = len(Counts._fields)
        self._counts, self._num_open, of_blocks = np.split(numbers, [counts, counts + 1])
        self._done, self._begun, self._freed = of_blocks[: 3 * num_blocks].reshape(3, num_blocks)
        self._orders = of_blocks[3 * num_blocks :].reshape(num_blocks, _COLUMNS)
        self._open: set[int] = set()  # the scheduler's orders that it doesn't know to be done
        Finalize(self, os.close, (file,))

    @classmethod
    def open(cls, name: str, num_blocks: int) -> Ledger:
        """This process's ledger of that name.

        An engine that measures what CUDA graphs take does so with a smaller pool at first.
        """
        if name not in _ledgers or _ledgers[name].num_blocks != num_blocks:
            _ledgers[name] = cls(name, num_blocks)
        return _ledgers[name]

    def begin(self, first_block: int) -> None:
        """The scheduler has given a request its first block."""
        self._orders[first_block] = 0
        self._begun[first_block] += 1

    def give_order(self, first_block: int, order: Order) -> None:
        """The scheduler wants something of the request with that first block."""
        spans, classes = (list(chain(*x)) for x in (order.protected, order.classes))
        self._done[first_block] = -1
        numbers = [order.boundary, order.budget or 0, order.due, len(spans), *spans]
        numbers += [len(classes), *classes]
        self._orders[first_block, 1 : 1 + len(numbers)] = numbers
        self._orders[first_block, 0] = order.at  # the last one: now it may be read
        if order.budget or order.due:
            self._open.add(first_block)
            self._num_open[0] = len(self._open)

    @property
    def has_orders(self) -> bool:
        """Whether there are any that the scheduler doesn't know to be done."""
        return bool(self._num_open[0])

    def order(self, first_block: int, boundary: int, computed: int) -> Order | None:
        """The newest order for a request, if there is one.

        Raises
        ------
        adakv.Error
            If the scheduler thinks that its prompt has another number of tokens.
        """
        return order_of(self._orders[first_block].tolist(), first_block, boundary)

    def read(self, first_blocks: Sequence[int]) -> np.ndarray:
        """``[n, 1 + columns]`` int64: whether each request is running, and its newest order, as
        :func:`order_of` takes it."""
        running = self._begun[first_blocks] > self._freed[first_blocks]
        return np.concatenate([running[:, None], self._orders[first_blocks]], 1)

    def done(self, first_block: int, boundary: int) -> None:
        """A worker has dealt with the request: one rank of several, which stands for all, as the
        output of its step is there only when all have run it."""
        self._done[first_block] = boundary

    def check_done(self, first_block: int, boundary: int) -> None:
        """Raises ``adakv.Error`` unless a worker has dealt with the request at that boundary."""
        done = int(self._done[first_block])
        if done != boundary:
            raise Error(
                f"the scheduler is about to free blocks of the request with first block "
                f"{first_block}, compressed at {boundary} tokens, but a worker did so at {done}"
            )
        self._close(first_block)

    def free(self, first_block: int) -> None:
        """The scheduler has done with a request: whatever a worker remembers of it may go."""
        self._freed[first_block] += 1
        self._close(first_block)

    def _close(self, first_block: int) -> None:
        self._open.discard(first_block)
        self._num_open[0] = len(self._open)

    def is_running(self, first_block: int) -> bool:
        """Whether the scheduler has a request with that first block."""
        return bool(self._begun[first_block] > self._freed[first_block])

    def add(self, **counts: int) -> None:
        """Adds to counts; each of them is added to by one process only."""
        for name, count in counts.items():
            self._counts[Counts._fields.index(name)] += count

    @property
    def counts(self) -> Counts:
        """Since the engine started."""
        return Counts(*map(int, self._counts))


def order_of(numbers: Sequence[int], first_block: int, boundary: int) -> Order | None:
    """The order that a ledger has in ``numbers``; as :meth:`Ledger.order`."""
    at, planned, budget, due, count, *places = numbers
    if at == 0:
        return None
    if planned != boundary:
        raise Error(
            f"a worker is about to compress {boundary} tokens of the request with first block "
            f"{first_block}, but the scheduler planned {planned}"
        )
    spans = zip(places[:count:2], places[1:count:2], strict=True)
    classes = places[count + 1 : count + 1 + places[count]]
    of_classes = zip(classes[::3], classes[1::3], classes[2::3], strict=True)
    return Order(at, planned, budget, tuple(spans), due, tuple(of_classes))


class LedgerScheduler(Scheduler):
    """The engine's scheduler, by way of a ledger. One rank ``counts`` for all."""

    def __init__(self, ledger: Ledger, *, counts: bool) -> None:
        self._ledger, self._counts = ledger, counts
        self.order = ledger.order  # type: ignore[method-assign]
        self.done = ledger.done  # type: ignore[method-assign]
        self.is_running = ledger.is_running  # type: ignore[method-assign]

    @property
    def has_orders(self) -> bool:
        return self._ledger.has_orders

    def compressed(self, entries_read: int, entries_kept: int) -> None:
        if self._counts:
            self._ledger.add(entries_read=entries_read, entries_kept=entries_kept)


def ledger_name(config: Any, rank: int) -> str:
    """Name of the ledger of the engine with that data parallel rank under a ``VllmConfig``."""
    return f"{config.instance_id}-{rank}"


def path_of(name: str) -> Path:
    """Where a ledger lies."""
    return _folder() / f"{_PREFIX}{name}"


def read_counts(name: str) -> Counts:
    """Counts of a ledger that may not be there yet."""
    try:
        with path_of(name).open("rb") as file:
            return Counts(*map(int, np.fromfile(file, np.int64, len(Counts._fields))))
    except (FileNotFoundError, TypeError):  # TypeError: made, but still empty
        return Counts()


def remove_at_exit(name: str) -> None:
    """Has this process, which may be a child of another, remove the ledger's file when it ends."""
    Finalize(None, path_of(name).unlink, kwargs={"missing_ok": True}, exitpriority=0)


def remove_unused() -> None:
    """Removes the files of engines of which no process is left."""
    for path in _folder().glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # it is somebody else's, in use, or gone by now
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(file)


def remove_unused_at_exit() -> None:
    """Has this process do so when it and its children have ended."""
    Finalize(None, remove_unused, exitpriority=-1)


def _folder() -> Path:
    shared = Path("/dev/shm")
    return shared if shared.is_dir() else Path(tempfile.gettempdir())


def _locked(path: Path) -> int:
    """A file that is open and in use, made if there is none."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(file, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)  # it was removed between the first line and the second
