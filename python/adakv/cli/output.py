"""Results as tables, JSON and pictures."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table

import adakv
from adakv import shown
from adakv.cli.inputs import STANDARD_OUTPUT, InputError, dtype_name, refusals
from adakv.cli.measure import Run
from adakv.policy.inputs import nearest


def plain_console() -> Console:
    """Standard output, to which rich gives form but takes no text for its own markup."""
    return Console(markup=False, emoji=False, highlight=False)


def print_runs(console: Console, runs: list[Run], model: Any) -> None:
    """One line per run, in the order of ``runs``; the first is what speed is compared with."""
    compared = any(run.same_choice is not None for run in runs)
    title = f"{runs[0].prompt_tokens} tokens read, {len(runs[0].tokens)} written"
    title += f", in {dtype_name(model)}"
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("cache", no_wrap=True)
    names = ["KV\nMiB", "of\nfull", "prefill\nseconds", "decode\ntokens/s"]
    if compared:
        names += ["speed-\nup", "same\nchoice", "same\nstart"]
    for name in names:
        table.add_column(name, justify="right")
    for run in runs:
        cells = [
            run.title,
            f"{run.cache_bytes / 2**20:.1f}",
            f"{run.cache_bytes / run.full_bytes:.1%}",
            f"{run.prefill_seconds:.1f}",
            f"{run.tokens_per_second:.1f}",
        ]
        if run.same_choice is not None:
            cells += [
                f"{run.tokens_per_second / runs[0].tokens_per_second:.2f}x",
                f"{run.same_choice:.0%}",
                f"{run.same_start}",
            ]
        table.add_row(*cells)
    console.print(table)
    if compared:
        console.print(
            "same choice: how often the full cache's next token comes first here too, given the "
            "same past; same start: tokens written before the first that differs",
            style="dim",
        )


def print_texts(console: Console, runs: list[Run]) -> None:
    """What each run wrote."""
    for run in runs:
        console.print(f"\n{run.title}", style="bold")
        console.print(run.text, soft_wrap=True)


def find_policy(name: str, option: str) -> adakv.policy.Policy:
    """The preset of that name, or the policy written down so, as an option's value."""
    try:
        return adakv.policy.get(name)
    except ValueError as error:
        if "(" in name:
            raise InputError(f"{option}: {error}") from error
    near = nearest(name, adakv.policies())
    hint = f"did you mean {near!r}?" if near else "`adakv policies` lists them"
    raise InputError(f"{option}: there is no policy {name!a}: {hint}")


def write_piece(text: str) -> None:
    """Some of a text that is being written, shown at once."""
    click.echo(text, nl=False)
    sys.stdout.flush()


def machine() -> dict[str, Any]:
    """What a measured number depends on."""
    return {
        "adakv": adakv.__version__,
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "processor": processor_name(),
        "instruction set": adakv.cpu_instruction_set(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def processor_name() -> str:
    """As the kernel calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def write_json(path: str, content: dict[str, Any]) -> None:
    """Writes one JSON object: a line for each of its values, and of lists of records for each."""
    lines = (f" {json.dumps(name)}: {_json_lines(value)}" for name, value in content.items())
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _json_lines(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(record, dict) for record in value):
        return "[\n" + ",\n".join(f"  {json.dumps(record)}" for record in value) + "\n ]"
    return json.dumps(value)


def write_text(path: str, text: str) -> None:
    """Writes a text file."""
    _write(path, text.encode())


def write_figure(path: str, figure: Any) -> None:
    """Writes a matplotlib figure as PNG, or as SVG if the file's name ends so."""
    picture = io.BytesIO()
    figure.savefig(picture, format="svg" if path.lower().endswith(".svg") else "png")
    _write(path, picture.getvalue())


def plot_kept(path: str, runs: list[Run]) -> None:
    """A heat map per policy: entries of the prompt kept in each layer and kv head."""
    titles = {f"{run.title}: entries kept of {run.prompt_tokens}": run.kept for run in runs}
    with refusals():
        write_figure(path, shown.kept_maps({t: kept for t, kept in titles.items() if kept}))


def _write(path: str, data: bytes) -> None:
    if path in STANDARD_OUTPUT:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    except OSError as error:
        raise InputError(f"{path} can't be written: {error.strerror}") from error
