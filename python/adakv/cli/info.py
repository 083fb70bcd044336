"""``adakv info``: what is installed, and the policies."""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Table

import adakv
from adakv.cli import output


@click.command()
def info() -> None:
    """What is installed, what this machine can run, and the policies."""
    console = Console()
    table = Table(show_header=False)
    for name, value in output.machine().items():
        table.add_row(name, str(value))
    table.add_row("backends", ", ".join(adakv.backends()))
    table.add_row("cuda", adakv.cuda_unavailable_reason() or "available")
    console.print(table)
    presets = Table()
    presets.add_column("policy", no_wrap=True)
    for name in ("scorer", "allocator", "selector"):
        presets.add_column(name, overflow="fold")
    for name in adakv.policies():
        policy = adakv.policy.get(name)
        presets.add_row(
            name, *map(output.brief, (policy.scorer, policy.allocator, policy.selector))
        )
    console.print(presets)
