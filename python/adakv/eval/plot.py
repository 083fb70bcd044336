"""Curves of quality against bytes, and bars that compare policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adakv import shown
from adakv.eval.summary import Cell, share_name

_PANELS = {
    "kl": "KL to the full cache, nats",
    "agreement": "same first choice",
    "exact": "exact answers",
}


def curves(cells: Sequence[Cell]) -> Any:
    """A matplotlib figure: panels for each task, a line with standard errors for each policy.

    Where no answer is exact, not even with the full cache, there are no panels for that.
    """
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    shares = sorted({cell.share for cell in cells})
    names = ("exact", "exact_full")
    some = any(cell.metrics[name].mean for cell in cells for name in names)
    panels = {metric: label for metric, label in _PANELS.items() if some or metric != "exact"}
    size = (4 * len(panels), 0.5 + 3 * len(tasks))
    figure = shown.figure(figsize=size)
    axes = figure.subplots(len(tasks), len(panels), squeeze=False)
    for task, row in zip(tasks, axes, strict=True):
        for (metric, label), axis in zip(panels.items(), row, strict=True):
            for policy in dict.fromkeys(cell.policy for cell in cells):
                line = [c for c in cells if (c.task, c.policy) == (task, policy)]
                axis.errorbar(
                    [c.bytes_share for c in line],
                    [c.metrics[metric].mean for c in line],
                    yerr=[c.metrics[metric].error for c in line],
                    label=policy,
                    marker="o",
                    markersize=3,
                    linewidth=1.2,
                    capsize=2,
                )
            axis.set_xscale("log", base=2)
            axis.set_xticks(shares, [share_name(share) for share in shares])
            axis.minorticks_off()
            axis.invert_xaxis()
            axis.set_ylim(bottom=0)
            axis.set_title(f"{task}: {label}", fontsize=10)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("bytes, of a full cache's")
    axes[0][0].legend(fontsize=8)
    return figure


def bars(rows: Sequence[Any]) -> Any:
    """A matplotlib figure of the rows of :func:`adakv.compare`: a panel for each of its numbers."""
    panels = {
        "MiB of cache": [row.cache_bytes / 2**20 for row in rows],
        "KL to the full cache, nats": [row.kl for row in rows],
        "same first choice": [row.agreement for row in rows],
    }
    figure = shown.figure(figsize=(10, 0.9 + 0.35 * len(rows)))
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        drawn = axis.barh(range(len(rows)), values, color="tab:orange")
        axis.bar_label(drawn, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(rows)), [row.policy for row in rows])
    axes[0].invert_yaxis()
    return figure
