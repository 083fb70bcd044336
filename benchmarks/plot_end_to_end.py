"""Draws the decode steps that end_to_end.py measured on a GPU: time and tokens per second.

python benchmarks/plot_end_to_end.py benchmarks/results/NAME.jsonl FILE.png
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Point = tuple[int, float, float]  # sequences, ms per step, ms of its floor or 0


def curves(records: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, list[Point]]]:
    """By prompt length and by what is held of it: the fastest way to run each step."""
    points: dict[int, dict[str, dict[int, Point]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        sizes, timings = record["sizes"], record["timings"]
        if sizes.get("part") not in ("step", "full"):
            continue
        ms = min(t["median_us"] for name, t in timings.items() if name.endswith("wall")) / 1e3
        held = f"{sizes['mean']} entries a head" if "mean" in sizes else sizes["cache"]
        floor = record["derived"].get("floor_us", 0.0) / 1e3
        at = points[sizes["tokens"]][held]
        at[sizes["batch"]] = min(
            at.get(sizes["batch"], (0, float("inf"), 0.0)),
            (sizes["batch"], ms, floor),
            key=lambda point: point[1],
        )
    return {
        tokens: {held: sorted(found.values()) for held, found in points[tokens].items()}
        for tokens in sorted(points)
    }


def draw(records: Iterable[Mapping[str, Any]], file: str) -> None:
    """Writes a PNG; floors are dotted, transformers' own caches squares."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    found = curves(records)
    figure, grid = plt.subplots(
        2, len(found), figsize=(4.5 * len(found), 7), sharex=True, sharey="row",
        squeeze=False, constrained_layout=True,
    )  # fmt: skip
    for (tokens, by_held), time, rate in zip(found.items(), *grid, strict=True):
        for held, points in by_held.items():
            batches, times, floors = zip(*points, strict=True)
            style = "o-" if all(floors) else "s--"
            (line,) = time.plot(batches, times, style, label=held, markersize=4)
            if all(floors):
                time.plot(batches, floors, ":", color=line.get_color())
            rates = [1e3 * batch / ms for batch, ms in zip(batches, times, strict=True)]
            rate.plot(batches, rates, style, color=line.get_color(), markersize=4)
        time.set(title=f"{tokens} tokens a sequence", xscale="log", yscale="log")
        rate.set(xlabel="sequences", xscale="log", yscale="log")
        time.legend(fontsize=7)
        time.grid(alpha=0.3)
        rate.grid(alpha=0.3)
    grid[0, 0].set_ylabel("ms per step (dotted: floor)")
    grid[1, 0].set_ylabel("tokens per second")
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main() -> None:
    results, file = sys.argv[1:]
    draw(map(json.loads, Path(results).read_text().splitlines()), file)


if __name__ == "__main__":
    main()
