"""Options that commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

import adakv
from adakv.cli import output
from adakv.cli.inputs import DTYPES, InputError, choose_device, load_model
from adakv.cli.measure import Run, Setting
from adakv.cli.progress import progress_bar

DEFAULT_RATIO = 0.1


@dataclass(frozen=True)
class Place:
    """How the model runs, and where the results go."""

    dtype: str
    device: str | None
    json_path: str | None
    plot_path: str | None

    def load(self, source: str) -> tuple[Any, Any]:
        """Model and tokenizer."""
        device = choose_device(self.device)
        with progress_bar("loading the model") as advance:
            loaded = load_model(source, dtype=DTYPES[self.dtype], device=device)
            advance()
        return loaded

    def save(self, runs: list[Run], model: str) -> None:
        """Writes the files that were asked for."""
        if self.json_path:
            content = {"model": model, "dtype": self.dtype, "machine": output.machine()}
            output.write_json(self.json_path, content | {"runs": [run.as_dict() for run in runs]})
        if self.plot_path:
            output.plot_kept(self.plot_path, runs)


def place_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of :class:`Place`, as its argument ``place``."""

    @functools.wraps(command)
    def with_place(
        *, dtype: str, device: str | None, json_path: str | None, plot_path: str | None, **rest: Any
    ) -> None:
        command(place=Place(dtype, device, json_path, plot_path), **rest)

    for option in (
        click.option("--plot", "plot_path", metavar="FILE", help="Write a picture (PNG)."),
        click.option("--json", "json_path", metavar="FILE", help="Write the results."),
        click.option("--device", metavar="cpu|cuda", help="Default: cuda where it can be used."),
        click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16"),
    ):
        with_place = option(with_place)
    return with_place


def setting_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of a :class:`Setting`, as its argument ``setting``."""

    @functools.wraps(command)
    def with_setting(*, policy: str, budget: int | None, ratio: float | None, **rest: Any) -> None:
        command(setting=check_setting(policy, budget, ratio), **rest)

    ratio_help = f"The same, as a share of the prompt.  [default: {DEFAULT_RATIO}]"
    for option in (
        click.option("--ratio", type=float, help=ratio_help),
        click.option("--budget", type=int, help="Entries that a kv head keeps on average."),
        click.option(
            "--policy", default=adakv.policy.DEFAULT, show_default=True, help="See `adakv info`."
        ),
    ):
        with_setting = option(with_setting)
    return with_setting


def check_setting(policy: str, budget: int | None, ratio: float | None) -> Setting:
    """The policy and its budget, checked before anything is loaded."""
    try:
        adakv.policy.get(policy)
    except ValueError as error:
        raise InputError(f"--policy: {error}") from error
    if budget is not None and ratio is not None:
        raise InputError("give --budget or --ratio, not both")
    if budget is not None and budget < 1:
        raise InputError(f"--budget must be at least 1, got {budget}")
    if ratio is not None and not 0 < ratio <= 1:
        raise InputError(f"--ratio must be above 0 and at most 1, got {ratio}")
    if budget is None and ratio is None:
        ratio = DEFAULT_RATIO
    return Setting(policy, budget, ratio)
