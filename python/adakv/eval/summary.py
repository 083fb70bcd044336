"""Records become means with standard errors, a paired comparison, tables and JSON.

The unit is the text: items about the same one aren't independent, so they are averaged first, and
standard errors and tests run over texts.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from adakv.eval.records import Record

METRICS = ("kl", "agreement", "exact", "loss")
FULL_METRICS = ("exact_full", "loss_full")  # of the full cache, on the same items

_EXACT_TEST_UP_TO = 13  # 2^13 ways to flip the signs
_NUM_FLIPS = 10_000


@dataclass(frozen=True)
class Mean:
    """A mean over texts, its standard error (0 for one text) and their number."""

    mean: float
    error: float
    texts: int

    def __str__(self) -> str:
        return f"{_number(self.mean)} ± {_number(self.error)}"


@dataclass(frozen=True)
class Difference(Mean):
    """A mean difference between two policies on the same texts, with its two-sided p.

    ``p`` is the share of all ways to flip the differences' signs (Fisher's randomization test) that
    give a mean as far from 0; of 10,000 random ways where there are more than 13 texts.
    """

    p: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {_number(self.error)} (p {self.p:.2f})"


@dataclass(frozen=True)
class Cell:
    """One policy at one share on one task.

    ``paired`` are the differences from the first policy at the same share, empty for itself.
    """

    task: str
    policy: str
    share: float
    items: int
    bytes_share: float  #: of a full cache's bytes, whole pages counted
    metrics: dict[str, Mean]
    paired: dict[str, Difference]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Table:
    """Cells of text under a title; the first column names the rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """For a Markdown file."""
        lines = [self.columns, tuple("---" for _ in self.columns), *self.rows]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"**{self.title}**\n\n{body}\n"


def summarize(records: Sequence[Record]) -> list[Cell]:
    """A cell for each task, policy and share, in the order of their first records."""
    groups: dict[tuple[str, str, float], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.key.task, record.key.policy, record.key.share].append(record)
    first = {task: policy for task, policy, _ in reversed(groups)}
    cells = []
    for (task, policy, share), group in groups.items():
        base = groups.get((task, first[task], share), [])
        others = [] if policy == first[task] else base
        cells.append(
            Cell(
                task,
                policy,
                share,
                len(group),
                statistics.fmean(record.bytes / record.full_bytes for record in group),
                {name: mean(_by_text(group, name).values()) for name in METRICS + FULL_METRICS},
                _paired(group, others),
            )
        )
    return cells


def mean(values: Iterable[float]) -> Mean:
    """Mean and standard error of independent values, at least one."""
    values = list(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Mean(statistics.fmean(values), error, len(values))


def difference(values: Iterable[float]) -> Difference:
    """Mean, standard error and p of paired differences, at least one."""
    values = list(values)
    found = mean(values)
    n = len(values)
    if n <= _EXACT_TEST_UP_TO:
        flips = torch.arange(2**n)[:, None] >> torch.arange(n) & 1
    else:
        flips = torch.randint(2, (_NUM_FLIPS, n), generator=torch.Generator().manual_seed(0))
    means = ((1 - 2 * flips).double() * torch.tensor(values, dtype=torch.float64)).mean(-1)
    as_far = means.abs() >= abs(found.mean) * (1 - 1e-9)
    return Difference(found.mean, found.error, n, p=as_far.double().mean().item())


def tables(cells: Sequence[Cell]) -> list[Table]:
    """For each task: KL, agreement and exact match, policies by shares, and KL's differences."""
    found = []
    titles = {
        "kl": "KL to the full cache, nats per token (0 is best)",
        "agreement": "same first choice as the full cache (1 is best)",
        "exact": "answers whose every token comes first (1 is best)",
    }
    for task in dict.fromkeys(cell.task for cell in cells):
        own = [cell for cell in cells if cell.task == task]
        for metric, title in titles.items():
            values = {(c.policy, c.share): str(c.metrics[metric]) for c in own}
            if metric == "exact":
                full = {("full cache", c.share): str(c.metrics["exact_full"]) for c in own}
                values = full | values
            found.append(_table(f"{task}: {title}", values))
        differences = {(c.policy, c.share): str(c.paired["kl"]) for c in own if c.paired}
        if differences:
            title = f"{task}: KL minus that of `{own[0].policy}`, paired by text"
            found.append(_table(title, differences))
    return found


def depth_table(records: Sequence[Record], task: str, *, parts: int = 4) -> Table:
    """Exact answers by depth of what is asked for, over all shares."""
    found: dict[str, list[list[float]]] = {}
    for record in records:
        if record.key.task == task and record.depth is not None:
            row = found.setdefault(record.key.policy, [[] for _ in range(parts)])
            row[min(int(record.depth * parts), parts - 1)].append(record.quality.exact)
    columns = ("depth", *(f"{i / parts:.2f} to {(i + 1) / parts:.2f}" for i in range(parts)))
    rows = tuple(
        (policy, *(_number(statistics.fmean(part)) if part else "" for part in row))
        for policy, row in found.items()
    )
    return Table(f"{task}: exact answers by depth, all shares together", columns, rows)


def share_name(share: float) -> str:
    """``1/8`` for 0.125, otherwise the number."""
    inverse = 1 / share if share > 1e-300 else 0.5
    return f"1/{round(inverse)}" if abs(inverse - round(inverse)) < 1e-6 else f"{share:g}"


def _table(title: str, values: dict[tuple[str, float], str]) -> Table:
    """A table of values by policy and share."""
    shares = sorted({share for _, share in values}, reverse=True)
    policies = dict.fromkeys(policy for policy, _ in values)
    rows = tuple((p, *(values.get((p, share), "") for share in shares)) for p in policies)
    return Table(title, ("kept", *map(share_name, shares)), rows)


def _by_text(records: Sequence[Record], metric: str) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for record in records:
        values[record.group].append(getattr(record.quality, metric))
    return {text: statistics.fmean(own) for text, own in values.items()}


def _paired(records: Sequence[Record], base: Sequence[Record]) -> dict[str, Difference]:
    """Compares the items that both have."""
    common = {r.key.item for r in records} & {r.key.item for r in base}
    if not common:
        return {}
    own, other = ([r for r in rs if r.key.item in common] for rs in (records, base))
    found = {}
    for metric in METRICS:
        ours, theirs = _by_text(own, metric), _by_text(other, metric)
        found[metric] = difference(ours[text] - theirs[text] for text in ours)
    return found


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
