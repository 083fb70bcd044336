"""The commands and their options."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table
from torch import Tensor

import adakv
from adakv.cli import report
from adakv.cli.inputs import (
    InputError,
    check_prompt_length,
    encode_prompt,
    manual_text,
    read_text,
    refusals,
)
from adakv.cli.many import open_results, read_prompts, result_file
from adakv.cli.measure import FULL, Run, Setting, compare, run
from adakv.cli.options import (
    DEFAULT_RATIO,
    Place,
    check_setting,
    place_options,
    progress_bar,
    setting_options,
)
from adakv.cli.quality import evaluate
from adakv.cli.show import show

DEMO_POLICIES = ("critical_ada_snapkv", adakv.policy.DEFAULT)
DEMO_QUESTION = "How do I print a number with two digits after the point?"


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


cli.add_command(evaluate)
cli.add_command(show)


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


@cli.command()
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
    report.print_runs(console, runs)
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


@cli.command()
@click.argument("model")
@click.option("--tokens", type=click.IntRange(min=256), default=7000, show_default=True)
@click.option("--question", default=DEMO_QUESTION, show_default=True)
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
    settings = [check_setting(policy, None, ratio) for policy in DEMO_POLICIES]
    network, tokenizer = place.load(model)
    prompt = encode_prompt(tokenizer, manual_text(tokenizer, tokens), question)
    runs = run_all(network, tokenizer, prompt, [FULL, *settings], max_new_tokens)
    console = Console()
    console.print(f"[bold]question[/bold] (after {tokens} tokens of Python's manual): {question}")
    report.print_texts(console, runs)
    console.print()
    report.print_runs(console, runs)
    place.save(runs, model)


@cli.command()
def info() -> None:
    """What is installed, what this machine can run, and the policies."""
    console = Console()
    table = Table(show_header=False)
    for name, value in report.machine().items():
        table.add_row(name, str(value))
    table.add_row("backends", ", ".join(adakv.backends()))
    table.add_row("cuda", adakv.cuda_unavailable_reason() or "available")
    console.print(table)
    presets = Table()
    presets.add_column("policy", no_wrap=True)
    for name in ("scorer", "allocator", "selector"):
        presets.add_column(name, overflow="fold")
    for name in adakv.policies():
        policy = adakv.policy.get(name)
        presets.add_row(
            name, *map(report.brief, (policy.scorer, policy.allocator, policy.selector))
        )
    console.print(presets)


def run_all(
    model: Any, tokenizer: Any, prompt: Tensor, settings: list[Setting], new: int
) -> list[Run]:
    """Runs each setting in turn; those after the full cache are compared with it."""
    check_prompt_length(model, prompt.shape[1], new)
    with refusals():
        for setting in settings:
            setting.cache(model)  # what is wrong shows before the long work
    runs: list[Run] = []
    for setting in settings:
        with progress_bar(setting.title, new + 1) as advance, refusals():
            runs.append(run(model, tokenizer, prompt, setting, new=new, on_token=advance))
        if settings[0] == FULL and len(runs) > 1:
            with progress_bar(f"{setting.title}: comparing") as advance, refusals():
                runs[-1] = compare(model, prompt, setting, run=runs[-1], full=runs[0])
                advance()
    return runs
