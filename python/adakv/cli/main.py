"""The commands together, and what becomes of their errors."""

from __future__ import annotations

import contextlib
import difflib
import os
import sys

import click

import adakv
from adakv.cli.bench import bench
from adakv.cli.calibrate import calibrate
from adakv.cli.demo import demo
from adakv.cli.documents import ask, compress, shrink
from adakv.cli.eval import evaluate
from adakv.cli.generate import generate
from adakv.cli.info import info
from adakv.cli.policies import policies
from adakv.cli.report import report

_MOST_SHOWN = 1000  # characters of the beginning and of the end of a message


def run_command_line(arguments: list[str]) -> int:
    """Runs one command line; the result is the exit code."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if sys.stdout is None:  # its number would go to the next file that is opened
        _say("standard output is closed")
        return 2
    try:
        cli.main(args=arguments, prog_name="adakv", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
    except click.MissingParameter as error:
        where = error.ctx.command_path if error.ctx else "adakv"
        _say(f"{error.format_message()} See `{where} --help`.")
        return 2
    except click.ClickException as error:
        _say(error.format_message())
        return 2
    except click.Abort:
        _say("stopped")
        return 130
    except OSError as error:  # files are the commands' own affair: this is standard output
        _give_up_output()
        _say(f"{error.filename or 'standard output'} can't be written: {error.strerror}")
        return 2
    except SystemExit:  # what click and rich make of a pipe whose reader has left
        _give_up_output()
        _say("standard output can't be written: Broken pipe")
        return 2
    except MemoryError:
        _say("this takes more memory than there is")
        return 2
    except RuntimeError as error:  # torch has no class of its own for it on the CPU
        if not any(words in str(error) for words in ("out of memory", "can't allocate memory")):
            raise
        _say(f"this takes more memory than there is: {error}")
        return 2
    return 0


def _say(message: str) -> None:
    """One line on standard error."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message.strip())
    if len(line) > 2 * _MOST_SHOWN:
        line = f"{line[:_MOST_SHOWN]}...{line[-_MOST_SHOWN:]}"
    with contextlib.suppress(OSError):
        click.echo(f"adakv: {line}", err=True)


def _give_up_output() -> None:
    """Python would try to write the rest when it ends, and complain."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class _Commands(click.Group):
    """Names the command that a mistyped one is nearest to."""

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            near = difflib.get_close_matches(args[0], self.commands, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(self.commands)}"
            raise click.UsageError(f"no such command {args[0]!a}: {hint}")
        return super().resolve_command(context, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(adakv.__version__, prog_name="adakv")
def cli() -> None:
    """A smaller KV cache: keep the entries that matter, and write from what is kept.

    An entry is the key and the value of one token in one kv head.
    """


_READING = (demo, generate, compress, shrink, ask, evaluate, report, bench, calibrate)
for command in (*_READING, policies, info):
    cli.add_command(command)
