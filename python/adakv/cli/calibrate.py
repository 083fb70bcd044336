"""``adakv calibrate``: what policies have to know of a model, found by reading a text."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import click
import torch

from adakv.cli import output
from adakv.cli.inputs import InputError, check_outputs, read_text, refusals
from adakv.cli.options import Place, place_options
from adakv.cli.types import FILE

#: Times that a layer's largest number is that of the layer before, where sinks emerge.
_JUMP = 4.0


class Outlier(NamedTuple):
    """Where tokens stand out."""

    layer: int  #: the first one whose input has them
    channel: int  #: of the hidden states
    tokens: tuple[int, ...]  #: the 5 that stand out most, by position
    largest: tuple[float, ...]  #: number in the input of each layer


def outlier_of(model: Any, ids: torch.Tensor) -> Outlier:
    """The layer in which the largest number of the hidden states grows most, and its channel, for
    tokens ``[T]`` int64. Raises ``ValueError`` if it grows nowhere by a factor of four."""
    with torch.no_grad():
        states = model(ids[None].to(model.device), output_hidden_states=True).hidden_states
    sizes = [state[0].float().abs() for state in states[:-1]]  # [T, E], the input of each layer
    largest = [float(size.max()) for size in sizes]
    jumps = [b / a for a, b in itertools.pairwise(largest)]
    if not jumps or max(jumps) < _JUMP:
        raise ValueError(
            f"model: no token stands out: no layer's largest hidden number is {_JUMP:g} times that "
            "of the layer before"
        )
    layer = jumps.index(max(jumps)) + 1
    channel = int(sizes[layer].amax(0).argmax())
    tokens = sizes[layer][:, channel].topk(min(5, len(ids))).indices.tolist()
    return Outlier(layer, channel, tuple(tokens), tuple(largest))


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
@place_options
def calibrate(model: str, text_path: str, tokens: int, place: Place) -> None:
    """Find the channel in which attention sinks of MODEL stand out, and from which layer on.

    The result is a scorer, as HiddenOutlier(channel=1, layer=2), for policies that keep sinks in
    16 bits; with --json a file with its numbers.
    """
    if place.plot_path:
        raise InputError("--plot must not be given to calibrate, which draws nothing")
    check_outputs([text_path], {"--json": place.json_path})
    text = read_text(text_path)
    network, tokenizer = place.load(model, "auto")
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0, :tokens]
    with refusals():
        found = outlier_of(network, ids)
    if place.json_path:
        told = {"model": model, "tokens": len(ids), "outlier": found._asdict()}
        output.write_json(place.json_path, told)
    click.echo(f"HiddenOutlier(channel={found.channel}, layer={found.layer})")
    places = ", ".join(map(str, found.tokens))
    click.echo(f"largest at tokens {places} of {len(ids)}", err=True)
