"""The commands together, and what becomes of their errors."""

from __future__ import annotations

import click

import adakv
from adakv.cli.demo import demo
from adakv.cli.eval import evaluate
from adakv.cli.generate import generate
from adakv.cli.info import info
from adakv.cli.report import report


def run_command_line(arguments: list[str]) -> int:
    """Runs one command line; the result is the exit code."""
    try:
        cli.main(args=arguments, prog_name="adakv", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
    except click.ClickException as error:
        click.echo(f"adakv: {error.format_message()}", err=True)
        return 2
    except click.Abort:
        click.echo("adakv: stopped", err=True)
        return 130
    return 0


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(adakv.__version__, prog_name="adakv")
def cli() -> None:
    """Head-wise KV cache eviction: keep the entries that matter, decode from what is kept."""


for command in (demo, generate, evaluate, report, info):
    cli.add_command(command)
