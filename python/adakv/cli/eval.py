"""``adakv eval``: quality against bytes, of any policies on any model."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

import adakv
from adakv.cli import output
from adakv.cli.inputs import InputError, check_outputs, dtype_name, refusals
from adakv.cli.options import Place, every_option, file_option, place_options, read_option
from adakv.cli.progress import progress_bar
from adakv.cli.protect import Span, protect_option, protect_tokens_option, tokens_with
from adakv.cli.types import FILE
from adakv.eval import data, plot, summary
from adakv.eval.metrics import Item
from adakv.eval.records import Key, Record, RecordFile
from adakv.formats import KV_DTYPES
from adakv.policy import MoreTokens, Policy
from adakv.tiers import Tiers

POLICIES = "ada_snapkv,critical_ada_snapkv,snapkv,streaming,random"
SHARES = "1/2,1/4,1/8,1/16,1/32"


@dataclass(frozen=True)
class Sources:
    """What is asked, of which files."""

    qa: str | None
    text: str | None
    needles: str | None
    aware: str  #: no, yes or both
    size: data.Size

    def __post_init__(self) -> None:
        if not (self.qa or self.text or self.needles):
            raise ValueError("give at least one of --qa, --text and --needles")

    def tasks(self, tokenizer: Any) -> dict[str, list[Item]]:
        """Items by the name of their task: questions, text to be continued, needles."""
        found: dict[str, list[Item]] = {}
        if self.text:
            found["text"] = data.continuations(self.text, tokenizer, self.size)
        ways = {"no": (False,), "yes": (True,), "both": (False, True)}[self.aware]
        for aware in ways:
            suffix = "_aware" if aware else ""
            if self.qa:
                found["qa" + suffix] = data.questions(self.qa, tokenizer, self.size, aware=aware)
            if self.needles:
                items = data.needles(self.needles, tokenizer, self.size, aware=aware)
                found["needles" + suffix] = items
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON: file names with the first digits of their SHA-256."""
        files = {"qa": self.qa, "text": self.text, "needles": self.needles}
        return {
            **{name: _fingerprint(path) for name, path in files.items() if path},
            "tokens": self.size.tokens,
            "prompts": self.size.prompts,
            "per_prompt": self.size.per_prompt,
        }


def source_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of :class:`Sources`, as its argument ``sources``."""

    @functools.wraps(command)
    def with_sources(
        *,
        qa: str | None,
        text: str | None,
        needles: str | None,
        aware: str,
        tokens: int,
        prompts: int,
        per_prompt: int,
        **rest: Any,
    ) -> None:
        with refusals():
            size = data.Size(tokens, prompts, per_prompt)
            sources = Sources(qa, text, needles, aware, size)
        command(sources=sources, **rest)

    numbers = (
        ("--per-prompt", "QUESTIONS", 2, "Ask so many of a prompt, or hide so many needles in it."),
        ("--prompts", "PROMPTS", 12, "Read so many prompts for each task."),
        ("--tokens", "TOKENS", 2000, "Take so many tokens of text for each prompt."),
    )
    for name, unit, default, text in numbers:
        option = click.option(
            name, type=int, default=default, show_default=True, metavar=unit, help=text
        )
        with_sources = option(with_sources)
    for option in (
        click.option(
            "--aware",
            type=click.Choice(["no", "yes", "both"]),
            default="no",
            show_default=True,
            help="Compress the question with its prompt, or read it later.",
        ),
        file_option("--needles", help="Hide sentences in this text and ask for them."),
        file_option("--text", help="Continue stretches of this text."),
        file_option("--qa", help="Ask the questions of this file in SQuAD's layout (JSON)."),
    ):
        with_sources = option(with_sources)
    return with_sources


def written_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command an argument ``written``: what :class:`adakv.eval.written.Written` is made of,
    or nothing."""

    @functools.wraps(command)
    def with_written(
        *, written: int | None, every: int | None, evict_prompt: bool, **rest: Any
    ) -> None:
        if written is None and (every is not None or evict_prompt):
            raise InputError("--every and --evict-prompt go only with --written")
        for name in ("protect", "protect_tokens"):
            if written is not None and rest[name]:
                raise InputError(f"--{name.replace('_', '-')} doesn't go with --written")
        every = every or adakv.policy.EveryTokens.every
        given = {"prompt": written, "every": every, "pin_prompt": not evict_prompt}
        command(written={} if written is None else given, **rest)

    for option in (
        click.option(
            "--evict-prompt", is_flag=True, help="With --written: evict from prompts, too."
        ),
        every_option("--written"),
        click.option(
            "--written",
            type=click.IntRange(min=1),
            metavar="N",
            help="Take all but the first N tokens of each prompt for a text being written.",
        ),
    ):
        with_written = option(with_written)
    return with_written


@click.command("eval", short_help="Measure how far compressed caches are from the full one.")
@click.argument("model", type=FILE)
@source_options
@click.option(
    "--policies",
    default=POLICIES,
    show_default=True,
    metavar="POLICIES",
    help="Measure these policies, with commas between; the first is what others are compared with.",
)
@click.option(
    "--kv-dtypes",
    default="auto",
    show_default=True,
    metavar="FORMATS",
    help=f"Measure every policy in these formats of pages, of {', '.join(KV_DTYPES)}, "
    "or tiers, as auto:1/4+int4:3/4 or channels=.6, or mixed keys, as mixed3.",
)
@click.option(
    "--shares",
    default=SHARES,
    show_default=True,
    metavar="SHARES",
    help="Keep these shares of each prompt.",
)
@click.option(
    "--equal-bytes",
    is_flag=True,
    help="Take the same bytes in every format: shares are those kept in auto, and other formats "
    "keep as many entries as have room.",
)
@protect_option
@protect_tokens_option
@written_options
@read_option
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="PROCESSES",
    help="Share the prompts and policies out to so many processes, each with its own model.",
)
@file_option("--records", help="Keep what is measured here; a stopped run goes on.")
@file_option("--markdown", help="Write the tables as Markdown.")
@place_options
def evaluate(
    model: str,
    sources: Sources,
    *,
    policies: str,
    kv_dtypes: str,
    shares: str,
    equal_bytes: bool,
    protect: tuple[Span, ...],
    protect_tokens: tuple[str, ...],
    written: dict[str, Any],
    read: str | None,
    processes: int,
    records: str | None,
    markdown: str | None,
    place: Place,
) -> None:
    """Measure how far compressed caches are from the full one, on given answers.

    MODEL (a folder, a GGUF file or a name on the Hugging Face hub) reads each prompt once. Then
    every policy keeps every share of it, and the model reads what follows the prompt: a question
    and its answer, or the text that comes next. --plot draws quality against bytes.

    With --written N only the first N tokens are a prompt, and all of them stay. What follows is
    taken for a text that the model has written, from which every policy evicts while it is read;
    shares are those of this text.
    """
    pages = check_formats(kv_dtypes)
    formats = labelled(check_policies(policies), pages)
    names, kept = list(formats), check_shares(shares)
    if written and (equal_bytes or read):
        raise InputError(f"--{'equal-bytes' if equal_bytes else 'read'} doesn't go with --written")
    chosen = chosen_policies(formats, equal_bytes=equal_bytes)
    outputs = {"--records": records, "--markdown": markdown, **place.outputs}
    check_outputs([model, sources.qa, sources.text, sources.needles], outputs)
    network, tokenizer = place.load(model, *pages)
    others: dict[str, Any] = {"protect": [f"{begin}:{end}" for begin, end in protect]}
    others |= {"protect_tokens": [*protect_tokens], "written": written}
    others |= {"equal_bytes": equal_bytes, "read": read}
    with refusals():
        tasks = sources.tasks(tokenizer)
        about = {
            "adakv": adakv.__version__,
            "model": Path(model).name,
            "dtype": dtype_name(network),
            **sources.as_dict(),
            **{name: value for name, value in others.items() if value},
        }
        file = RecordFile(records, about)
    from adakv.eval import runner  # needs transformers
    from adakv.eval.written import Written

    measure: Callable[..., Iterator[Record]] = functools.partial(runner.run, network)
    if processes > 1:
        measure = shared_out(processes, place, model, *pages)
    given = {"written": Written(**written) if written else None, "read": read}
    prompts = (item.prompt for items in tasks.values() for item in items)
    stay = tokens_with(tokenizer, protect_tokens, prompts)
    measure = functools.partial(measure, protect=protect, protect_tokens=stay, **given)
    run_all(measure, file, tasks, chosen, kept)
    wanted = in_order(file.records, runner.missing(tasks, names, kept, ()))
    cells = summary.summarize(wanted)
    tables = summary.tables(cells)
    tables += [summary.depth_table(wanted, name) for name in tasks if name.startswith("needles")]
    console = output.plain_console()
    console.print(f"{Path(model).name} in {dtype_name(network)}", soft_wrap=True)
    print_tables(console, tables)
    if markdown:
        output.write_text(markdown, "\n".join(table.markdown() for table in tables))
    save(place, about, cells)


def in_order(records: Sequence[Record], keys: Sequence[Key]) -> list[Record]:
    """Those of the keys, as the keys are in order."""
    places = {key: place for place, key in enumerate(keys)}
    return sorted((x for x in records if x.key in places), key=lambda x: places[x.key])


def save(place: Place, about: dict[str, Any], cells: Sequence[summary.Cell]) -> None:
    """Writes what was measured where --json and --plot say."""
    if place.json_path:
        results = {"machine": output.machine(), "cells": [cell.as_dict() for cell in cells]}
        output.write_json(place.json_path, about | results)
    if place.plot_path:
        with refusals():
            output.write_figure(place.plot_path, plot.curves(cells))


def run_all(
    measure: Callable[..., Iterator[Record]],
    file: RecordFile,
    tasks: dict[str, list[Item]],
    chosen: dict[str, tuple[Policy, str | None]],
    shares: Sequence[float],
) -> None:
    """Measures what the file lacks, with a progress bar; ``chosen`` are policies and formats, and
    ``measure`` is :func:`adakv.eval.runner.run`, its model and options given."""
    from adakv.eval import runner  # needs transformers

    done = {record.key for record in file.records}
    total = len(runner.missing(tasks, chosen, shares, done))
    policies = {label: policy for label, (policy, _) in chosen.items()}
    kv_dtypes = {label: kv_dtype for label, (_, kv_dtype) in chosen.items()}
    with progress_bar("measuring", total) as advance, refusals():
        for record in measure(tasks, policies, shares, done, kv_dtypes):
            file.add(record)
            advance()


def print_tables(console: Console, tables: Sequence[summary.Table]) -> None:
    """The same tables as in the Markdown file."""
    for table in tables:
        console.print(table.title, style="bold")
        shown = Table(box=box.SIMPLE_HEAD)
        for column in table.columns:
            shown.add_column(column)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)


def check_policies(names: str) -> list[str]:
    """Names of presets or policies written down, in a comma-separated list."""
    pieces = re.split(r",(?![^()]*(?:\([^()]*\)[^()]*)*\))", names)  # not inside of parentheses
    found = list(dict.fromkeys(name.strip() for name in pieces if name.strip()))
    if not found:
        raise InputError("--policies must name some of those that `adakv policies` lists, got none")
    for name in found:
        output.find_policy(name, "--policies")
    return found


def check_formats(kv_dtypes: str) -> list[str]:
    """Formats of pages in a comma-separated list."""
    found = list(dict.fromkeys(name.strip() for name in kv_dtypes.split(",")))
    wrong = [name for name in found if ":" not in name and name not in KV_DTYPES]
    if wrong:
        raise InputError(f"--kv-dtypes must be of {', '.join(KV_DTYPES)}, got {wrong[0]!r}")
    with refusals():
        return [str(Tiers.given(name)) for name in found]


def labelled(policies: Sequence[str], kv_dtypes: Sequence[str]) -> dict[str, tuple[str, str]]:
    """What tables and records call a policy in a format of pages, and the two."""
    return {
        name if kv_dtype == "auto" else f"{name} in {kv_dtype}": (name, kv_dtype)
        for kv_dtype in kv_dtypes
        for name in policies
    }


def chosen_policies(
    formats: dict[str, tuple[str, str]], *, equal_bytes: bool
) -> dict[str, tuple[Policy, str | None]]:
    """The policies and formats that are :func:`labelled`."""
    chosen: dict[str, tuple[Policy, str | None]] = {}
    for label, (name, kv_dtype) in formats.items():
        policy = adakv.policy.get(name)
        if policy.bits is not None:
            if kv_dtype != "auto":
                raise InputError(f"--kv-dtypes: {name} has a budget in bytes and its own format")
            chosen[label] = (policy, policy.bits.kv_dtype)
        elif equal_bytes and (kv_dtype != "auto" or policy.has_biases):
            chosen[label] = (replace(policy, bits=MoreTokens(kv_dtype)), kv_dtype)
        else:
            chosen[label] = (policy, kv_dtype)
    return chosen


def check_shares(shares: str) -> list[float]:
    """Shares like 1/8 or 0.125, in a comma-separated list."""
    try:
        found = list(dict.fromkeys(map(_share, shares.split(","))))
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(f"--shares must be numbers like 1/8 or 0.125, got {shares!r}") from error
    wrong = [share for share in found if not 0 < share <= 1]
    if wrong:
        raise InputError(f"--shares must be above 0 and at most 1, got {wrong[0]:g}")
    return found


def _share(text: str) -> float:
    above, _, below = text.partition("/")
    return float(above) / float(below or 1)


def shared_out(
    num_processes: int, place: Place, source: str, *kv_dtypes: str
) -> Callable[..., Iterator[Record]]:
    """What measures by several processes, each with a model from ``place``."""
    from adakv.eval import processes  # needs transformers

    load = functools.partial(_load_again, place, source, *kv_dtypes)
    return functools.partial(processes.run, load, num_processes)


def _load_again(place: Place, source: str, *kv_dtypes: str) -> Any:
    """The model once more, in another process."""
    return place.load_silently(source, *kv_dtypes)[0]


def _fingerprint(path: str) -> str:
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return f"{Path(path).name} {digest[:12]}"
