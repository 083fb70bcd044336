"""``adakv generate``: what a model writes after a text, or after each of many."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console

import adakv
from adakv.cli import output
from adakv.cli.inputs import InputError, encode_prompt, read_text, refusals
from adakv.cli.measure import FULL, Setting, run_all
from adakv.cli.options import Place, place_options, setting_options
from adakv.cli.progress import progress_bar
from adakv.cli.prompts import open_results, read_prompts, result_file


@dataclass(frozen=True)
class Many:
    """Where many prompts come from and go to, and how they run."""

    prompts: str
    out: str
    max_batch: int
    compile: bool


NOT_WITH_PROMPTS = ("text", "question", "compare_full", "json_path", "plot_path")
ONLY_WITH_PROMPTS = ("out", "max_batch", "compile")


def many_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command --prompts and what goes with it, for :func:`generate_many` to run instead."""

    @functools.wraps(command)
    def one_or_many(
        *, prompts: str | None, out: str | None, max_batch: int, compile: bool, **rest: Any
    ) -> None:
        if prompts is None:
            refuse_options(ONLY_WITH_PROMPTS, "goes only with --prompts")
            if rest["text"] is None:
                raise InputError("give TEXT or --prompts")
            command(**rest)
            return
        refuse_options(NOT_WITH_PROMPTS, "doesn't go with --prompts")
        if out is None or out == prompts:
            raise InputError("--prompts needs --out, another file for the results")
        wanted = ("model", "setting", "max_new_tokens", "place")
        generate_many(Many(prompts, out, max_batch, compile), *(rest[name] for name in wanted))

    max_batch_help = "Most prompts at a time.  [default: 64]"
    for option in (
        click.option("--compile", is_flag=True, help="Let torch.compile fuse the decode steps."),
        click.option("--max-batch", type=click.IntRange(min=1), default=64, help=max_batch_help),
        click.option("--out", metavar="FILE", help="Where their results go, as JSON lines."),
        click.option("--prompts", metavar="FILE", help="Many prompts instead of TEXT, see above."),
    ):
        one_or_many = option(one_or_many)
    return one_or_many


def refuse_options(names: tuple[str, ...], reason: str) -> None:
    """Refuses what is on the command line but makes no sense there."""
    context = click.get_current_context()
    for parameter in context.command.params:
        is_given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if parameter.name in names and is_given:
            raise InputError(f"{parameter.opts[0]} {reason}")


@click.command()
@click.argument("model")
@click.argument("text", required=False)
@click.option("--question", help="Asked after the text, in the model's chat template if any.")
@setting_options
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--compare-full", is_flag=True, help="Also run with transformers' own cache.")
@place_options
@many_options
def generate(
    model: str,
    text: str,
    question: str | None,
    setting: Setting,
    max_new_tokens: int,
    compare_full: bool,
    place: Place,
) -> None:
    """Read TEXT (a file, or - for standard input) with MODEL and go on writing.

    MODEL is a folder, a GGUF file or a name on the Hugging Face hub.

    With --prompts many texts are read and decoded together. Each line of the file has either
    "prompt", "messages" (for the chat template) or "input_ids", and "max_new_tokens" if it isn't
    the common one. Results are written as they are done, and are in the order of prompts in the
    end: "index", "prompt_tokens", "tokens", "text", "end".
    """
    content = read_text(text)
    network, tokenizer = place.load(model)
    prompt = encode_prompt(tokenizer, content, question)
    full = [FULL] if compare_full else []
    runs = run_all(network, tokenizer, prompt, [*full, setting], max_new_tokens)
    console = Console()
    console.print(runs[-1].text, markup=False, highlight=False)
    output.print_runs(console, runs)
    place.save(runs, model)


def generate_many(
    many: Many, model: str, setting: Setting, max_new_tokens: int, place: Place
) -> None:
    """Goes on writing after each of many prompts."""
    lines = read_prompts(many.prompts)
    open_results(many.out, "a").close()  # what is wrong shows before the long work
    network, tokenizer = place.load(model)
    counts = [line.max_new_tokens or max_new_tokens for line in lines]
    ids = [line.encode(network, tokenizer, new) for line, new in zip(lines, counts, strict=True)]
    start, written = time.perf_counter(), 0
    with refusals():
        stream = adakv.generate_stream(
            network,
            ids,
            policy=setting.policy or "full",
            budget=setting.budget,
            ratio=setting.ratio,
            max_new_tokens=counts,
            tokenizer=tokenizer,
            options=adakv.BatchOptions(max_batch=many.max_batch, compile=many.compile),
        )
    with progress_bar(setting.title, sum(counts)) as advance, result_file(many.out) as write:
        for new in stream:
            advance()
            if new.result is not None:
                write(new.result)
                advance(counts[new.index] - len(new.result.tokens))
                written += len(new.result.tokens)
    seconds = time.perf_counter() - start
    read = sum(map(len, ids))
    click.echo(
        f"{len(ids)} prompts with {read} tokens read, {written} tokens written in {seconds:.1f} s"
    )
