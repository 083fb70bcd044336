"""``adakv compress``, ``adakv shrink`` and ``adakv ask``: a text is read once, and asked about
later."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import torch

import adakv
from adakv.cli import output
from adakv.cli.inputs import (
    DTYPES,
    InputError,
    check_outputs,
    check_prompt_length,
    dtype_name,
    read_text,
    refusals,
)
from adakv.cli.measure import Setting
from adakv.cli.options import TRUST_HELP, Place, max_new_tokens_option, setting_options
from adakv.cli.types import FILE, TEXT
from adakv.eval import files
from adakv.eval.chat import messages_of
from adakv.hf.attachment import CACHE

device_option = click.option(
    "--device",
    metavar="cpu|cuda",
    help="Run the model on this device.  [default: cuda where it can be used]",
)
trust_option = click.option("--trust-remote-code", is_flag=True, help=TRUST_HELP)

model_option = click.option(
    "--model", type=FILE, help="Load the model from here, if it has moved since."
)

_MARK = "\x00question\x00"  # where a question goes


def frame_of(tokenizer: Any, text: str) -> tuple[str, str, str]:
    """What stands before a question about a text, the text included, right before the question, and
    behind it."""
    if not tokenizer.chat_template:
        return text, "\n\nQuestion: ", "\nAnswer:"
    messages = messages_of(text, _MARK)
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, mark, behind = whole.partition(_MARK)
    if not mark:
        raise InputError("the chat template doesn't show what the user says as it is")
    return before, "", behind


@click.command(short_help="Read a text, keep what a policy chooses, write that to a file.")
@click.argument("model", type=FILE)
@click.argument("text", type=FILE)
@click.option("--out", type=FILE, required=True, help="Write the cache to this file.")
@setting_options
@click.option(
    "--dtype",
    type=click.Choice(["auto", *DTYPES]),
    default="auto",
    show_default=True,
    help="Hold weights and cache in this type, as `adakv generate` does.",
)
@device_option
@trust_option
def compress(
    model: str,
    text: str,
    out: str,
    setting: Setting,
    dtype: str,
    device: str | None,
    trust_remote_code: bool,
) -> None:
    """Read TEXT (a file, or - for standard input) with MODEL, keep what the policy chooses of it,
    and write that to --out, for `adakv ask`.

    The question comes later, so that a policy has to do without it.
    """
    place = Place(dtype, device, None, None, trust_remote_code)
    check_outputs([model, text], {"--out": out})
    content = read_text(text)
    network, tokenizer = place.load(model, setting.kv_dtype)
    before, lead, behind = frame_of(tokenizer, content)
    is_template = bool(tokenizer.chat_template)
    ids = tokenizer(before, return_tensors="pt", add_special_tokens=not is_template)["input_ids"]
    check_prompt_length(network, ids.shape[1], 1, name=text)
    start = time.perf_counter()
    arguments = {k: v for k, v in setting.arguments.items() if k in _ARGUMENTS}
    with refusals(), torch.no_grad(), adakv.attach(network):
        cache = adakv.Cache(network, **arguments, keep_scores=True)
        network(ids.to(network.device), **{CACHE: cache})
        notes = {"model": model, "dtype": dtype_name(network), "lead": lead, "behind": behind}
        cache.save(out, notes)
    seconds = time.perf_counter() - start
    click.echo(f"{ids.shape[1]} tokens read in {seconds:.1f} s: {_size(cache)} in {out}", err=True)


_ARGUMENTS = ("policy", "budget", "ratio", "budget_bytes", "kv_dtype")


def _size(cache: adakv.Cache) -> str:
    stats = cache.stats()
    return f"{stats['bytes'] / 2**20:.1f} MiB of {stats['full_bytes'] / 2**20:.1f}"


@click.command(short_help="Keep less of the text that `adakv compress` wrote to FILE.")
@click.argument("file", type=FILE)
@click.option("--out", type=FILE, required=True, help="Write the smaller cache to this file.")
@click.option("--ratio", type=float, metavar="SHARE", help="Keep this share of the text's entries.")
@click.option(
    "--budget",
    type=int,
    metavar="ENTRIES",
    help="Keep so many entries in each kv head on average.",
)
@model_option
@device_option
@trust_option
def shrink(
    file: str,
    out: str,
    ratio: float | None,
    budget: int | None,
    model: str | None,
    device: str | None,
    trust_remote_code: bool,
) -> None:
    """Keep less of the text that `adakv compress` wrote to FILE, without reading it again.

    The policy chooses as it did then, among the entries that are there.
    """
    if (ratio is None) == (budget is None):
        raise InputError("give either --ratio or --budget")
    check_outputs([file], {"--out": out})
    notes = _notes_of(file)
    network, _ = _model_of(notes, model, device, trust_remote_code)
    with refusals(), adakv.attach(network):
        cache = adakv.Cache.load(network, file)
        cache.shrink(ratio, budget=budget)
        cache.save(out, notes)
    click.echo(f"{_size(cache)} in {out}", err=True)


@click.command(short_help="Ask about the text that `adakv compress` wrote to FILE.")
@click.argument("file", type=FILE)
@click.option(
    "--question",
    "questions",
    type=TEXT,
    multiple=True,
    required=True,
    help="Ask this about the text; may be given many times.",
)
@model_option
@max_new_tokens_option(default=128, least=1)
@device_option
@trust_option
def ask(
    file: str,
    questions: tuple[str, ...],
    model: str | None,
    max_new_tokens: int,
    device: str | None,
    trust_remote_code: bool,
) -> None:
    """Ask about the text that `adakv compress` wrote to FILE, without reading it again.

    Every --question is asked by itself: the answers know nothing of each other.
    """
    notes = _notes_of(file)
    network, tokenizer = _model_of(notes, model, device, trust_remote_code)
    with refusals(), torch.no_grad(), adakv.attach(network):
        cache = adakv.Cache.load(network, file, max_new_tokens=max_new_tokens + 256)
        for question in questions:
            (branch,) = cache.fork()
            text = notes["lead"] + question + notes["behind"]
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            check_prompt_length(network, cache.seen[0] + ids.shape[1], max_new_tokens, name=file)
            _write_answer(network, tokenizer, branch, ids, max_new_tokens)


def _notes_of(file: str) -> dict[str, str]:
    """What `adakv compress` wrote beside a cache."""
    from adakv.hf.saving import notes_of

    try:
        with refusals():
            notes = notes_of(file)
    except OSError as error:
        reason = f"{error.strerror or error}{files.nearest(Path(file))}"
        raise InputError(f"{file} can't be read: {reason}") from error
    if not {"model", "dtype", "lead", "behind"} <= set(notes):
        raise InputError(f"{file} was not written by `adakv compress`")
    return notes


def _model_of(
    notes: dict[str, str], model: str | None, device: str | None, trust_remote_code: bool
) -> tuple[Any, Any]:
    """The model that a file was made for, and its tokenizer."""
    place = Place(notes["dtype"], device, None, None, trust_remote_code)
    return place.load(model or notes["model"])


def _write_answer(network: Any, tokenizer: Any, cache: Any, ids: Any, max_new_tokens: int) -> None:
    """Greedy, as it comes."""
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            output.write_piece(text)

    ends = network.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    streamer, new = Pieces(tokenizer, skip_special_tokens=True), ids.to(network.device)
    for _ in range(max_new_tokens):
        new = network(new, logits_to_keep=1, **{CACHE: cache}).logits[:, -1:].argmax(-1)
        if int(new) in ends:
            break
        streamer.put(new[0].cpu())
    streamer.end()
    click.echo()
