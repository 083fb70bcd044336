"""``adakv generate``: what a model writes after a text, or after each of many."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

import adakv
from adakv.cli import output
from adakv.cli.inputs import (
    InputError,
    check_outputs,
    dtype_name,
    read_text,
    refusals,
)
from adakv.cli.measure import FULL, Setting, run_all
from adakv.cli.options import (
    Place,
    file_option,
    max_new_tokens_option,
    place_options,
    question_option,
    setting_options,
    text_options,
)
from adakv.cli.progress import progress_bar
from adakv.cli.prompts import read_prompts
from adakv.cli.protect import protect_options, system_spans, tokens_with
from adakv.cli.results import ResultFile, prompt_digest
from adakv.cli.types import FILE
from adakv.eval.chat import encode_prompt, messages_of


@dataclass(frozen=True)
class Many:
    """Where many prompts come from and go to, and how they run."""

    prompts: str
    prefix: str | None
    out: str
    overwrite: bool
    max_batch: int
    compile: bool


NOT_WITH_PROMPTS = ("text", "question", "compare_full", "json_path", "plot_path", "read")
ONLY_WITH_PROMPTS = ("prefix", "out", "overwrite", "max_batch", "compile")


def many_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command --prompts and what goes with it, for :func:`generate_many` to run instead."""

    @functools.wraps(command)
    def one_or_many(
        *,
        prompts: str | None,
        prefix: str | None,
        out: str | None,
        overwrite: bool,
        max_batch: int,
        compile: bool,
        **rest: Any,
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
        many = Many(prompts, prefix, out, overwrite, max_batch, compile)
        generate_many(many, *(rest[name] for name in wanted))

    out_help = "Write their results here, as JSON lines; a stopped run goes on."
    prefix_help = "Read the text of this file once, and let all prompts go on behind it."
    prompts_help = "Read many prompts from this file instead of TEXT: see above."
    for option in (
        click.option("--compile", is_flag=True, help="Let torch.compile fuse the decode steps."),
        click.option(
            "--max-batch",
            type=click.IntRange(min=1),
            default=64,
            show_default=True,
            metavar="PROMPTS",
            help="Run at most so many prompts at a time.",
        ),
        click.option("--overwrite", is_flag=True, help="Throw away what --out holds."),
        file_option("--out", help=out_help),
        file_option("--prefix", help=prefix_help),
        file_option("--prompts", help=prompts_help),
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


@click.command(short_help="Read one text or many with MODEL, and go on writing.")
@click.argument("model", type=FILE)
@click.argument("text", type=FILE, required=False)
@question_option
@setting_options
@text_options
@protect_options
@max_new_tokens_option(default=128, least=1)
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

    The text appears as it is written; a table of memory and time follows it. MODEL is a folder, a
    GGUF file or a name on the Hugging Face hub.

    With --prompts many texts are read and decoded together. Each line of the file has either
    "prompt", "messages" (for the chat template) or "input_ids", and "max_new_tokens" where it
    differs from the option. Results are written as they are done; at the end they stand in the
    order of the prompts. Each has "index", "prompt_tokens", "tokens", "text", "end", and what it
    was made from, "prompt_sha256" and "settings". Results that --out holds of an earlier run are
    not made again; if that run had other prompts or settings, the file is refused. --overwrite
    makes all of them anew. With --out - results go to standard output.

    With --prefix that text is read first, and each line's "prompt" or "input_ids" comes behind it.
    Budget, --protect and --protect-tokens are for the text, and what is kept of it is stored once.
    """
    check_outputs([model, text], place.outputs)
    content = read_text(text)
    network, tokenizer = place.load(model, setting.kv_dtype)
    prompt = encode_prompt(tokenizer, content, question)
    if setting.protect_system:
        if question is None or not tokenizer.chat_template:
            raise InputError("--protect-system needs --question and a chat template")
        spans = system_spans(tokenizer, messages_of(content, question))
        setting = replace(setting, protect=(*setting.protect, *spans))
    stay = tokens_with(tokenizer, setting.protect_tokens, prompt.tolist())
    spans = adakv.spans_of(prompt[0], stay)
    setting = replace(setting, protect=(*setting.protect, *spans))
    full = [FULL] if compare_full else []
    runs = run_all(
        network, tokenizer, prompt, [*full, setting], max_new_tokens, on_text=output.write_piece
    )
    click.echo()
    output.print_runs(output.plain_console(), runs, network)
    place.save(runs, model, network)


def generate_many(
    many: Many, model: str, setting: Setting, max_new_tokens: int, place: Place
) -> None:
    """Goes on writing after each of many prompts."""
    inputs = [model, many.prompts, *([] if many.prefix is None else [many.prefix])]
    check_outputs(inputs, {"--out": many.out})
    lines = read_prompts(many.prompts)
    with closing(ResultFile(many.out, overwrite=many.overwrite)) as results:
        network, tokenizer = place.load(model, setting.kv_dtype)
        prefix = read_prefix(many, setting, network, tokenizer)
        counts = [line.max_new_tokens or max_new_tokens for line in lines]
        ids = [
            line.encode(network, tokenizer, new, prefix)
            for line, new in zip(lines, counts, strict=True)
        ]
        about = settings_of(setting, model, network)
        if prefix is not None:
            about["prefix_sha256"] = prompt_digest(prefix.tolist())
        results.check([prompt.tolist() for prompt in ids], counts, about)
        protect: Any = setting.protect
        if prefix is None:
            protect = [
                [*setting.protect, *(line.system(tokenizer) if setting.protect_system else ())]
                for line in lines
            ]
        todo = [index for index in range(len(ids)) if index not in results.done]
        start, written = time.perf_counter(), 0
        with refusals():
            stream = adakv.generate_stream(
                network,
                [ids[index] for index in todo],
                **setting.arguments,
                protect=protect if prefix is not None else [protect[index] for index in todo],
                protect_tokens=tokens_with(
                    tokenizer,
                    setting.protect_tokens,
                    (x.tolist() for x in (ids if prefix is None else [prefix])),
                ),
                prefix=prefix,
                max_new_tokens=[counts[index] for index in todo],
                tokenizer=tokenizer,
                options=adakv.BatchOptions(max_batch=many.max_batch, compile=many.compile),
            )
        results.begin()
        with progress_bar(setting.title, sum(counts[index] for index in todo)) as advance:
            for new in stream:
                advance()
                if new.result is not None:
                    index = todo[new.index]
                    results.write(replace(new.result, index=index))
                    advance(counts[index] - len(new.result.tokens))
                    written += len(new.result.tokens)
        results.finish()
    seconds = time.perf_counter() - start
    read = sum(len(ids[index]) for index in todo)
    before = f"{len(results.done)} prompts were done before; " if results.done else ""
    click.echo(
        f"{before}{len(todo)} prompts with {read} tokens read, {written} tokens written in "
        f"{seconds:.1f} s, in {dtype_name(network)}",
        err=True,
    )


def read_prefix(many: Many, setting: Setting, model: Any, tokenizer: Any) -> Any:
    """``[T]`` tokens of what all prompts begin with, or None."""
    if many.prefix is None:
        return None
    if setting.protect_system:
        raise InputError("--protect-system doesn't go with --prefix")
    from adakv.hf.prompts import token_ids

    with refusals():
        return token_ids(model, tokenizer, many.prefix, read_text(many.prefix))


def settings_of(setting: Setting, source: str, model: Any) -> dict[str, Any]:
    """What a text depends on besides its prompt, for JSON: the policy and its budget, and what else
    is not as it is by default."""
    about = {"adakv": adakv.__version__, "model": Path(source).name, "dtype": dtype_name(model)}
    always = ("policy", "budget", "ratio", "kv_dtype")
    default = asdict(Setting(setting.policy))
    made_of = {
        name: value
        for name, value in asdict(setting).items()
        if name in always or value != default[name]
    }
    if "protect" in made_of:
        made_of["protect"] = [f"{begin}:{end}" for begin, end in setting.protect]
    if "protect_tokens" in made_of:
        made_of["protect_tokens"] = [*setting.protect_tokens]
    return about | made_of
