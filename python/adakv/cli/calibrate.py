"""``adakv calibrate``: what policies have to know of a model, found by reading a text."""

from __future__ import annotations

import click

from adakv.cli import output
from adakv.cli.inputs import InputError, check_outputs, read_text, refusals
from adakv.cli.options import Place, place_options
from adakv.cli.types import FILE
from adakv.eval import calibration


@click.command(short_help="Find what policies have to know of MODEL, by reading a text.")
@click.argument("model")
@click.option("--text", "text_path", type=FILE, required=True, help="Read this file.")
@click.option(
    "--tokens",
    type=click.IntRange(min=8),
    metavar="N",
    default=1024,
    show_default=True,
    help="Read so many tokens of it at most.",
)
@click.option(
    "--ratio",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="R",
    default=0.25,
    show_default=True,
    help="Share of the entries that the shares of kv heads are measured for.",
)
@place_options
def calibrate(model: str, text_path: str, tokens: int, ratio: float, place: Place) -> None:
    """Find the channel in which attention sinks of MODEL stand out, and from which layer on.

    The result is a scorer, as HiddenOutlier(channel=1, layer=2), for policies that keep sinks in
    16 bits. With --json it is a file, which also says how much of its entries each kv head needs,
    for Profile(file=...), and how large queries and keys are in each channel.
    """
    if place.plot_path:
        raise InputError("--plot must not be given to calibrate, which draws nothing")
    check_outputs([text_path], {"--json": place.json_path})
    text = read_text(text_path)
    network, tokenizer = place.load(model, "auto")
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0, :tokens]
    with refusals():
        if place.json_path:
            told = calibration.calibration(network, ids, ratio, name=model)
            output.write_json(place.json_path, told)
            found = told["outlier"]
        else:
            found = calibration.outlier_of(network, ids)._asdict()
    if found is None:
        click.echo("no token stands out", err=True)
        return
    click.echo("HiddenOutlier(channel={channel}, layer={layer})".format_map(found))
    places = ", ".join(map(str, found["tokens"]))
    click.echo(f"largest at tokens {places} of {len(ids)}", err=True)
