"""``adakv info``: what is installed, and what this machine can run."""

from __future__ import annotations

import click
from rich.table import Table

import adakv
from adakv.cli import output


@click.command()
def info() -> None:
    """Show what is installed and what this machine can run."""
    table = Table(show_header=False)
    for name, value in output.machine().items():
        table.add_row(name, str(value))
    table.add_row("backends", ", ".join(adakv.backends()))
    table.add_row("cuda", adakv.cuda_unavailable_reason() or "available")
    table.add_row("policies", f"{len(adakv.policies())}; `adakv policies` lists them")
    output.plain_console().print(table)
