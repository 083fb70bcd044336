"""The command line; a file for each command, named as the command."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Runs the command line; wrong input ends with one line on stderr and exit code 2."""
    try:
        from adakv.cli.main import run_command_line
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        sys.exit(f"adakv: {error.name} is missing; pip install 'adakv[cli]'")
    sys.exit(run_command_line(sys.argv[1:]))
