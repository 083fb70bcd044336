"""``adakv info``: what is installed, and the policies."""

from __future__ import annotations

import shutil
import textwrap

import click
from rich.table import Table

import adakv
from adakv.cli import output

_NAME_WIDTH = 24


@click.command()
def info() -> None:
    """Show what is installed, what this machine can run, and the policies."""
    console = output.plain_console()
    table = Table(show_header=False)
    for name, value in output.machine().items():
        table.add_row(name, str(value))
    table.add_row("backends", ", ".join(adakv.backends()))
    table.add_row("cuda", adakv.cuda_unavailable_reason() or "available")
    console.print(table)
    console.print("policies, as scorer * allocator * selector:")
    width = max(shutil.get_terminal_size().columns, 2 * _NAME_WIDTH)
    for name in adakv.policies():
        console.print(policy_lines(name, width), soft_wrap=True)


def policy_lines(name: str, width: int) -> str:
    """A preset's name and how it is written down, in lines that break at spaces."""
    policy = adakv.policy.get(name)
    parts = [policy.scorer, policy.allocator, policy.selector, policy.when, policy.bits]
    written = " * ".join(output.brief(part) for part in parts if part is not None)
    return textwrap.fill(
        f"{name:{_NAME_WIDTH}} {written}",
        width,
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
