"""Draws the decode steps that end_to_end.py measured on a GPU: time and tokens per second.

python benchmarks/plot_end_to_end.py benchmarks/results/NAME.json FILE.png
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Point = tuple[int, float, float]  # sequences, ms per step, ms of its floor or 0


def curves(records: Iterable[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """The fastest way to run each step, by what is held of how many tokens."""
    points: dict[str, dict[int, Point]] = defaultdict(dict)
    for record in records:
        sizes = record["sizes"]
        if sizes.get("part") not in ("step", "full"):
            continue
        medians = [t["median_us"] for name, t in record["timings"].items() if "wall" in name]
        held = sizes.get("mean", sizes.get("cache"))
        name = f"{sizes['tokens'] // 1024}k tokens, {held}"
        name += " entries a head" if "mean" in sizes else ""
        floor = record["derived"].get("floor_us", 0.0) / 1e3
        points[name][sizes["batch"]] = sizes["batch"], min(medians) / 1e3, floor
    return {name: sorted(found.values()) for name, found in sorted(points.items())}


def draw(records: Iterable[Mapping[str, Any]], file: str) -> None:
    """Writes a PNG; floors are dotted."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (time, rate) = plt.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    for name, points in curves(records).items():
        batches, times, floors = zip(*points, strict=True)
        style = "s--" if "compiled" in name or "eager" in name else "o-"
        (line,) = time.plot(batches, times, style, label=name, markersize=4)
        if all(floors):
            time.plot(batches, floors, ":", color=line.get_color())
        rates = [1e3 * batch / ms for batch, ms in zip(batches, times, strict=True)]
        rate.plot(batches, rates, style, color=line.get_color(), markersize=4)
    for axes, label in ((time, "ms per step (dotted: floor)"), (rate, "tokens per second")):
        axes.set(xlabel="sequences", ylabel=label, xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    time.legend(fontsize=7)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    results, file = sys.argv[1:]
    draw(map(json.loads, Path(results).read_text().splitlines()), file)


if __name__ == "__main__":
    main()
