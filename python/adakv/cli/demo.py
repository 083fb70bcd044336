"""``adakv demo``: the full cache against compressed ones, on a text that Python brings along."""

from __future__ import annotations

import click
from rich.console import Console

import adakv
from adakv.cli import output
from adakv.cli.inputs import encode_prompt, manual_text
from adakv.cli.measure import FULL, run_all
from adakv.cli.options import DEFAULT_RATIO, Place, check_setting, place_options

POLICIES = ("critical_ada_snapkv", adakv.policy.DEFAULT)
QUESTION = "How do I print a number with two digits after the point?"


@click.command()
@click.argument("model")
@click.option("--tokens", type=click.IntRange(min=256), default=7000, show_default=True)
@click.option("--question", default=QUESTION, show_default=True)
@click.option("--ratio", type=float, default=DEFAULT_RATIO, show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(min=2), default=64, show_default=True)
@place_options
def demo(
    model: str, tokens: int, question: str, ratio: float, max_new_tokens: int, place: Place
) -> None:
    """The full cache against Ada-KV and CriticalKV at the same bytes.

    MODEL (a folder, a GGUF file or a name on the Hugging Face hub) reads a long real text, the
    first --tokens of Python's reference manual, and answers a question about it.
    """
    settings = [check_setting(policy, None, ratio) for policy in POLICIES]
    network, tokenizer = place.load(model)
    prompt = encode_prompt(tokenizer, manual_text(tokenizer, tokens), question)
    runs = run_all(network, tokenizer, prompt, [FULL, *settings], max_new_tokens)
    console = Console()
    console.print(f"[bold]question[/bold] (after {tokens} tokens of Python's manual): {question}")
    output.print_texts(console, runs)
    console.print()
    output.print_runs(console, runs)
    place.save(runs, model)
