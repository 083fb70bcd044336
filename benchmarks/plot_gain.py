"""Draws what eviction saves, and at which answers, from the results that are committed here.

python benchmarks/plot_gain.py docs/images/gain.png
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

from quality_tables import read

RESULTS = Path(__file__).parent / "results"
FULL, OURS = "#8c8c8c", "#1f77b4"
CURVES = {
    "model_rank_fusion": ("model_rank_fusion (default)", OURS),
    "critical_ada_snapkv": ("critical_ada_snapkv (papers)", "#2ca02c"),
    "snapkv": ("snapkv", "#ff7f0e"),
    "streaming": ("streaming", "#d62728"),
}


def records(name: str) -> list[dict[str, Any]]:
    """The JSON lines of a file of results."""
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def on_cpu() -> tuple[list[float], list[float]]:
    """MB of the cache, and ms for a new token: transformers' own cache, and the default policy."""
    (run,) = (
        record
        for record in records("cpu-end-to-end.jsonl")
        if record["sizes"]["dtype"] == "float32" and "decode/model_rank_fusion" in record["timings"]
    )
    names = ("full", "model_rank_fusion")
    return (
        [run["derived"][f"bytes/{name}"] / 1e6 for name in names],
        [run["timings"][f"decode/{name}"]["median_us"] / 1e3 for name in names],
    )


def on_gpu() -> list[tuple[int, float]]:
    """Sequences of 32k tokens that fit, and tokens per second: full caches and 10 % of them."""
    found = [
        (record["sizes"]["batch"], record["derived"]["tokens_per_s"])
        for record in records("nvidia-h100-x1-end-to-end.jsonl")
        if record["sizes"].get("tokens") == 32768
        and (
            record["sizes"].get("cache") == "static, compiled"
            or (record["sizes"].get("mean") == 3276 and "compiled/wall" in record["timings"])
        )
    ]
    return [min(found), max(found)]  # by sequences


def agreement(policy: str, task: str) -> list[tuple[float, float]]:
    """Bytes, of a full cache's, and share of tokens that are its first choice, too."""
    return sorted(
        (cell["bytes_share"], cell["agreement"])
        for name in ("quality-smollm2-135m", "quality-smollm2-135m-default")
        for cell in read(RESULTS / f"{name}.jsonl")
        if cell["task"] == task and cell["policy"] == policy
    )


def draw(file: str) -> None:
    """Writes a PNG with a palette."""
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(12, 3.4), layout="constrained", dpi=100)
    memory, speed, many, answers = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.9))
    megabytes, milliseconds = on_cpu()
    (few, slow), (more, fast) = on_gpu()
    bars(memory, "KV cache, MB\n7000 tokens, CPU", megabytes, ("full", "10 % kept"))
    bars(speed, "ms for a new token\nthe same run", milliseconds, ("full", "10 % kept"))
    labels = (f"full\n{few} sequences", f"10 % kept\n{more} sequences")
    bars(many, "tokens per second\n32k tokens each, H100", [slow, fast], labels)
    for policy, (label, color) in CURVES.items():
        shares, same = zip(*agreement(policy, "needles_aware"), strict=True)
        answers.plot(shares, same, "o-", label=label, color=color, markersize=4)
    answers.set(
        title="same next token as the full cache\n(needles, question in the prompt)",
        xlabel="KV bytes, of the full cache's",
        xscale="log",
        ylim=(0, 1.03),
    )
    ticks = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
    answers.set_xticks(ticks, ["1/16", "1/8", "1/4", "1/2"])
    answers.minorticks_off()
    answers.grid(alpha=0.3)
    answers.legend(fontsize=8, loc="lower right")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    Image.open(picture).convert("RGB").quantize(256).save(file, optimize=True)


def bars(axis: Any, title: str, values: list[float], labels: tuple[str, ...]) -> None:
    """Two bars with their numbers."""
    found = axis.bar(labels, values, color=[FULL, OURS], width=0.6)
    axis.bar_label(found, [f"{value:.0f}" for value in values], fontsize=10)
    axis.set_title(title, fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.12)


if __name__ == "__main__":
    draw(sys.argv[1])
