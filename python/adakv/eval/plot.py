"""Curves of quality against bytes, and maps of what was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(cell.task for cell in cells))
    shares = sorted({cell.share for cell in cells})
    names = ("exact", "exact_full")
    some = any(cell.metrics[name].mean for cell in cells for name in names)
    panels = {metric: label for metric, label in _PANELS.items() if some or metric != "exact"}
    size = (4 * len(panels), 0.5 + 3 * len(tasks))
    figure = Figure(figsize=size, layout="constrained", dpi=110)
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


def kept_maps(maps: Mapping[str, Sequence[Sequence[int]]]) -> Any:
    """A matplotlib figure: under each title the entries kept, ``[L][Hkv]``, as a heat map."""
    from matplotlib.figure import Figure

    highest = max(max(heads) for layers in maps.values() for heads in layers)
    figure = Figure(figsize=(9, 0.9 + 1.7 * len(maps)), layout="constrained", dpi=110)
    axes = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
    for axis, (title, layers) in zip(axes, maps.items(), strict=True):
        heads = list(zip(*layers, strict=True))  # [Hkv][L]
        image = axis.imshow(heads, aspect="auto", cmap="viridis", vmin=0, vmax=highest)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("kv head")
        axis.set_yticks(range(len(heads)))
    axes[-1].set_xlabel("layer")
    figure.colorbar(image, ax=list(axes), label="entries")
    return figure
