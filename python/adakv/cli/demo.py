"""``adakv demo``: one text, several questions, three caches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import adakv
from adakv import shown
from adakv.cli import output
from adakv.cli.inputs import (
    check_outputs,
    check_prompt_length,
    dtype_name,
    refusals,
)
from adakv.cli.measure import FULL, Setting, cache_bytes
from adakv.cli.options import (
    DEFAULT_RATIO,
    Place,
    check_setting,
    max_new_tokens_option,
    place_options,
)
from adakv.cli.progress import progress_bar
from adakv.cli.types import FILE, TEXT
from adakv.eval.chat import encode_prompt
from adakv.hf.attachment import CACHE

POLICIES = ("critical_ada_snapkv", adakv.policy.DEFAULT)
GUIDE = Path(__file__).with_name("demo.txt")  # about an island that there isn't

Questions = tuple[tuple[str, str | None], ...]

#: Questions about the guide, and what a right answer has in it. Each answer stands in it twice, so
#: that a model of 135 million parameters finds it in its full cache, in float32 and in bfloat16.
#: Text and questions were chosen seeing what all three caches answer: how many are right says that
#: a cache works, and nothing about which policy is better.
QUESTIONS: Questions = (
    ("What is the ferry to Torvay called?", "Grey Swan"),
    ("What is the best hotel on the island called?", "Golden Anchor"),
    ("What is the newspaper of the island called?", "Morning Gull"),
    ("What is the highest hill of the island called?", "Raven's Seat"),
    ("What was the ship that brought the ponies called?", "Northern Star"),
    ("In which month is the Night of Lanterns held?", "September"),
    ("Who is the police officer of the island?", "Thomas Gray"),
    ("What is the telephone number of the doctor?", "4417"),
)


@dataclass
class Answers:
    """What one cache made of all questions."""

    title: str
    texts: list[str] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    choose_seconds: list[float] = field(default_factory=list)  #: to fill the cache, by question
    token_seconds: list[float] = field(default_factory=list)  #: of each decode step
    cache_bytes: int = 0  #: when the last answer was written
    full_bytes: int = 0  #: of a cache that holds every entry then
    kept: list[list[int]] = field(default_factory=list)  #: ``[L][Hkv]`` of the last prompt

    @property
    def tokens_per_second(self) -> float:
        """How fast answers were written."""
        return 1 / statistics.median(self.token_seconds) if self.token_seconds else 0.0


@click.command(short_help="Compare full and compressed caches: answers, memory and time.")
@click.argument("model", type=FILE)
@click.option(
    "--tokens",
    type=click.IntRange(min=256),
    metavar="TOKENS",
    help="Read so many tokens of the text.  [default: all]",
)
@click.option("--question", type=TEXT, help="Ask this instead of the questions about the text.")
@click.option(
    "--ratio",
    type=float,
    default=DEFAULT_RATIO,
    show_default=True,
    metavar="SHARE",
    help="Keep this share of the text's entries.",
)
@max_new_tokens_option(default=16, least=2)
@place_options
def demo(
    model: str,
    tokens: int | None,
    question: str | None,
    ratio: float,
    max_new_tokens: int,
    place: Place,
) -> None:
    """Compare the full cache with compressed ones: right answers, memory and time.

    MODEL (a folder, a GGUF file or a name on the Hugging Face hub) reads a guide to an island once,
    and is asked several questions about it. For each of them every policy chooses anew what it
    keeps.
    """
    check_outputs([model], place.outputs)
    settings = [FULL, *(check_setting(policy, None, ratio) for policy in POLICIES)]
    click.echo("loading the model", err=True)
    network, tokenizer = place.load(model)
    questions: Questions = QUESTIONS if question is None else ((question, None),)
    text, prompts = _split(tokenizer, questions)
    text = text[:tokens]
    longest = len(text) + max(map(len, prompts))
    check_prompt_length(network, longest, max_new_tokens)
    console = output.plain_console()
    results = [Answers(setting.title) for setting in settings]
    from adakv.eval.prefill import Prefill  # needs transformers

    with adakv.attach(network), refusals():
        click.echo(f"reading {len(text)} tokens, in {dtype_name(network)}", err=True)
        start = time.perf_counter()
        read = Prefill(network, text[None])
        read_seconds = time.perf_counter() - start
        for prompt, (asked, expected) in zip(prompts, questions, strict=True):
            console.print(f"\n{asked}", style="bold")
            prefill = read.followed_by(prompt[None])
            for setting, result in zip(settings, results, strict=True):
                with progress_bar(setting.title, max_new_tokens) as advance:
                    _answer(network, tokenizer, prefill, setting, result, max_new_tokens, advance)
                _print_answer(console, result, expected)
    console.print()
    _print_table(console, results, longest, read_seconds)
    _save(place, model, network, results, questions, longest, read_seconds)


def _split(tokenizer: Any, questions: Questions) -> tuple[Tensor, list[Tensor]]:
    """Tokens of the guide, and behind it those of each question: at least one."""
    guide = GUIDE.read_text().strip()
    asked = [question for question, _ in (*questions, QUESTIONS[0])]
    prompts = [encode_prompt(tokenizer, guide, question)[0] for question in asked]
    columns = zip(*(prompt.tolist() for prompt in prompts), strict=False)
    common = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))
    common = min(common, min(map(len, prompts)) - 1)
    return prompts[0][:common], [prompt[common:] for prompt in prompts[:-1]]


def _answer(
    model: Any,
    tokenizer: Any,
    asked: Any,
    setting: Setting,
    result: Answers,
    new: int,
    advance: Callable[..., None],
) -> None:
    """Fills a cache from what was read, and writes up to ``new`` tokens greedily."""
    start = time.perf_counter()
    if setting.policy is None:
        cache = asked.full_cache()
    else:
        cache = asked.cache(setting.policy, ratio=setting.ratio, max_new_tokens=new)
        result.kept = cache.stats()["lengths"][:, 0].tolist()
    result.choose_seconds.append(time.perf_counter() - start)
    ends = model.generation_config.eos_token_id
    token, tokens = asked.logits.argmax(), []
    while token.item() not in (ends if isinstance(ends, list) else [ends]):
        tokens.append(token.item())
        advance()
        if len(tokens) == new:
            break
        start = time.perf_counter()
        with torch.inference_mode():
            logits = model(token.view(1, 1), use_cache=True, **{CACHE: cache}).logits
        token = logits[0, -1].argmax()
        result.token_seconds.append(time.perf_counter() - start)
    text = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    result.texts.append(" ".join(text.split()))
    result.cache_bytes, result.full_bytes = cache_bytes(cache)


def _print_answer(console: Console, result: Answers, expected: str | None) -> None:
    """The newest one, and whether it is right, if that can be told."""
    mark = ""
    if expected is not None:
        result.right.append(expected.lower() in result.texts[-1].lower())
        mark = "right  " if result.right[-1] else "wrong  "
    console.print(f"  {result.title:20} {mark}{result.texts[-1]}", soft_wrap=True)


def _print_table(
    console: Console, results: list[Answers], prompt_tokens: int, read_seconds: float
) -> None:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("cache", no_wrap=True)
    names = ("right\nanswers", "KV\nMiB", "of\nfull", "choosing\nseconds", "decode\ntokens/s")
    for name in (*names, "speed-\nup"):
        table.add_column(name, justify="right")
    for result in results:
        table.add_row(
            result.title,
            f"{sum(result.right)} of {len(result.right)}" if result.right else "",
            f"{result.cache_bytes / 2**20:.1f}",
            f"{result.cache_bytes / result.full_bytes:.1%}",
            f"{statistics.median(result.choose_seconds):.2f}" if result.kept else "",
            f"{result.tokens_per_second:.1f}",
            f"{result.tokens_per_second / results[0].tokens_per_second:.2f}x",
        )
    console.print(table)
    console.print(
        f"The text of about {prompt_tokens} tokens was read once, in {read_seconds:.1f} seconds. "
        "Small models err, and evicting makes them err more; what is saved grows with the text.",
        style="dim",
    )


def _save(
    place: Place,
    source: str,
    model: Any,
    results: list[Answers],
    questions: Questions,
    prompt_tokens: int,
    read_seconds: float,
) -> None:
    """Writes the files that were asked for."""
    if place.json_path:
        content: dict[str, Any] = {
            "model": source,
            "dtype": dtype_name(model),
            "machine": output.machine(),
            "prompt_tokens": prompt_tokens,
            "read_seconds": read_seconds,
        }
        runs = [asdict(r) | {"tokens_per_second": r.tokens_per_second} for r in results]
        output.write_json(place.json_path, content | {"questions": questions, "runs": runs})
    if place.plot_path:
        kept = {f"{r.title}: entries kept of {prompt_tokens}": r.kept for r in results if r.kept}
        with refusals():
            figure = shown.kept_maps(kept)
        output.write_figure(place.plot_path, figure)
