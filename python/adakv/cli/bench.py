"""``adakv bench``: how fast adakv is on this machine, and with a model."""

from __future__ import annotations

import os
from dataclasses import asdict

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from adakv.cli import output
from adakv.cli.inputs import (
    DTYPES,
    check_outputs,
    choose_device,
    dtype_name,
    manual_text,
    model_name,
    multiplies_bfloat16,
    refusals,
)
from adakv.cli.measure import FULL, Run, Setting, run_in_turn
from adakv.cli.options import Place, max_new_tokens_option, place_options, setting_options
from adakv.cli.progress import progress_bar
from adakv.cli.types import FILE
from adakv.eval import plot, speed

ENTRIES = (1024, 4096, 16384)  # of a kv head on average
BAR = 24  # characters


@click.command()
@click.argument("model", type=FILE, required=False)
@click.option(
    "--tokens",
    type=click.IntRange(min=256),
    default=2048,
    show_default=True,
    metavar="TOKENS",
    help="Let MODEL read so many tokens.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    metavar="TIMES",
    help="Measure everything so many times.  [default: 20, and 3 with MODEL]",
)
@setting_options
@max_new_tokens_option(default=32, least=2)
@place_options
def bench(
    model: str | None,
    tokens: int,
    rounds: int | None,
    setting: Setting,
    max_new_tokens: int,
    place: Place,
) -> None:
    """Measure how fast adakv is on this machine.

    First decode attention: a token attends to the entries of one layer of Llama-3.1-8B's shape, by
    adakv and by torch's scaled_dot_product_attention. Then, with MODEL, a prompt is read and
    answered with the full cache and with a compressed one: memory, prefill and time per token.

    All ways take turns after a warm-up, with random numbers from a fixed seed; medians are shown.
    """
    check_outputs([model] if model else [], place.outputs)
    console = output.plain_console()
    for name, value in output.machine().items():
        console.print(f"{name}: {value}", soft_wrap=True)
    _warn_of_others(console)
    attended = _attend(place, rounds or 20)
    _print_attended(console, attended)
    content = {"machine": output.machine(), "attend": [asdict(each) for each in attended]}
    runs: list[Run] = []
    if model:
        network, tokenizer = place.load(model, setting.kv_dtype)
        prompt = tokenizer(manual_text(tokenizer, tokens), return_tensors="pt")["input_ids"]
        settings = [FULL, setting]
        runs = run_in_turn(network, tokenizer, prompt, settings, max_new_tokens, rounds=rounds or 3)
        _print_runs(console, runs, f"{model_name(model)} in {dtype_name(network)}")
        content |= {"model": model, "dtype": dtype_name(network)}
        content |= {"runs": [run.as_dict() for run in runs]}
    if place.json_path:
        output.write_json(place.json_path, content)
    if place.plot_path:
        with refusals():
            output.write_figure(place.plot_path, plot.speed(attended, runs))


def _warn_of_others(console: Console) -> None:
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        told = f"other programs compute, too (load {load:.1f}, {cores} cores): times are too long"
        console.print(told, style="bold")


def _attend(place: Place, rounds: int) -> list[speed.Attended]:
    device = choose_device(place.device)
    auto = "bfloat16" if multiplies_bfloat16(device) else "float32"
    dtype = DTYPES[auto if place.dtype == "auto" else place.dtype]
    cases = [(entries, is_even) for entries in ENTRIES for is_even in (True, False)]
    found = []
    with progress_bar("decode attention", len(cases)) as advance, torch.inference_mode():
        for entries, is_even in cases:
            found.append(
                speed.attend(entries, is_even=is_even, dtype=dtype, device=device, rounds=rounds)
            )
            advance()
    return found


def _print_attended(console: Console, attended: list[speed.Attended]) -> None:
    table = Table(title="\nDecode attention: microseconds for a layer", box=box.SIMPLE_HEAD)
    for name in ("entries\nper head", "kv\nheads", "adakv", "torch", "speed-\nup"):
        table.add_column(name, justify="right")
    table.add_column("adakv ━, torch ─", no_wrap=True)
    for each in attended:
        times = each.adakv.median_us, each.torch.median_us
        table.add_row(
            f"{each.entries}",
            each.heads,
            *(f"{t:.0f}" for t in times),
            f"{each.speedup:.2f}x",
            "\n".join(_bar(t / max(times), line) for t, line in zip(times, "━─", strict=True)),
        )
    console.print(table)
    console.print(
        "uneven: heads differ in length, as Ada-KV makes them; torch pads them to the longest",
        style="dim",
    )


def _print_runs(console: Console, runs: list[Run], title: str) -> None:
    tokens, written = runs[0].prompt_tokens, len(runs[0].tokens)
    table = Table(title=f"\n{title}: {tokens} tokens read, {written} written", box=box.SIMPLE_HEAD)
    table.add_column("cache", no_wrap=True)
    for name in ("KV\nMiB", "prefill\nseconds", "ms per\ntoken", "speed-\nup"):
        table.add_column(name, justify="right")
    table.add_column("ms per token", no_wrap=True)
    slowest = max(run.token_seconds for run in runs)
    for run in runs:
        table.add_row(
            run.title,
            f"{run.cache_bytes / 2**20:.1f}",
            f"{run.prefill_seconds:.2f}",
            f"{1e3 * run.token_seconds:.1f}",
            f"{runs[0].token_seconds / run.token_seconds:.2f}x",
            _bar(run.token_seconds / slowest, "━"),
        )
    console.print(table)


def _bar(share: float, line: str) -> str:
    return line * max(1, round(BAR * share))
