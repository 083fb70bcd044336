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


def speed(attended: Sequence[Any], runs: Sequence[Any]) -> Any:
    """A matplotlib figure of what ``adakv bench`` measured: attention, and a model's caches."""
    panels = 2 + (3 if runs else 0)
    figure = shown.figure(figsize=(3.2 * panels, 3))
    axes = figure.subplots(1, panels)
    for axis, heads in zip(axes, ("even", "uneven"), strict=False):
        cases = [case for case in attended if case.heads == heads]
        for i, (name, color) in enumerate((("torch", "tab:gray"), ("adakv", "tab:orange"))):
            times = [getattr(case, name) for case in cases]
            medians = [t.median_us / 1e3 for t in times]
            errors = [
                [(t.median_us - t.low_us) / 1e3 for t in times],
                [(t.high_us - t.median_us) / 1e3 for t in times],
            ]
            places = [place + 0.4 * i for place in range(len(cases))]
            axis.bar(places, medians, 0.38, yerr=errors, label=name, color=color, capsize=2)
        ticks = [place + 0.2 for place in range(len(cases))]
        axis.set_xticks(ticks, [str(case.entries) for case in cases])
        axis.set_xlabel("entries of a kv head")
        axis.set_title(f"attention, {heads} heads, ms", fontsize=10)
    axes[0].legend(fontsize=8)
    numbers = {
        "cache, MiB": [run.cache_bytes / 2**20 for run in runs],
        "prefill, seconds": [run.prefill_seconds for run in runs],
        "a token, ms": [1e3 * run.token_seconds for run in runs],
    }
    for axis, (title, values) in zip(axes[2:], numbers.items(), strict=False):
        drawn = axis.bar(range(len(runs)), values, 0.6, color=["tab:gray", "tab:orange"])
        axis.bar_label(drawn, [f"{value:.3g}" for value in values], padding=2, fontsize=8)
        axis.set_xticks(range(len(runs)), [run.title.replace("_", "_\n", 1) for run in runs])
        axis.tick_params("x", labelsize=8)
        axis.margins(y=0.15)
        axis.set_title(title, fontsize=10)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure
