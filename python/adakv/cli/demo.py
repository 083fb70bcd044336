"""``adakv demo``: the full cache against compressed ones, on a text that Python brings along."""

from __future__ import annotations

import click

import adakv
from adakv.cli import output
from adakv.cli.inputs import check_outputs, encode_prompt, manual_text
from adakv.cli.measure import FULL, run_all
from adakv.cli.options import (
    DEFAULT_RATIO,
    Place,
    check_setting,
    max_new_tokens_option,
    place_options,
)
from adakv.cli.types import FILE, TEXT

POLICIES = ("critical_ada_snapkv", adakv.policy.DEFAULT)
QUESTION = "How do I print a number with two digits after the point?"


@click.command()
@click.argument("model", type=FILE)
@click.option(
    "--tokens",
    type=click.IntRange(min=256),
    default=7000,
    show_default=True,
    help="Read so many tokens of the manual.",
)
@click.option(
    "--question", type=TEXT, default=QUESTION, show_default=True, help="Ask this about it."
)
@click.option(
    "--ratio",
    type=float,
    default=DEFAULT_RATIO,
    show_default=True,
    help="Keep this share of its entries.",
)
@max_new_tokens_option(default=64, least=2)
@place_options
def demo(
    model: str, tokens: int, question: str, ratio: float, max_new_tokens: int, place: Place
) -> None:
    """Compare the full cache with compressed ones of the same size.

    MODEL (a folder, a GGUF file or a name on the Hugging Face hub) reads a long real text, the
    first --tokens of Python's reference manual, and answers a question about it.
    """
    check_outputs([model], place.outputs)
    settings = [check_setting(policy, None, ratio) for policy in POLICIES]
    network, tokenizer = place.load(model)
    prompt = encode_prompt(tokenizer, manual_text(tokenizer, tokens), question)
    runs = run_all(network, tokenizer, prompt, [FULL, *settings], max_new_tokens)
    console = output.plain_console()
    console.print(f"question (after {tokens} tokens of Python's manual): {question}")
    output.print_texts(console, runs)
    console.print()
    output.print_runs(console, runs, network)
    place.save(runs, model, network)
