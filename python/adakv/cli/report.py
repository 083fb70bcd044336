"""``adakv report``: one prompt on one page."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import click
from rich.table import Table

from adakv.cli import output
from adakv.cli.inputs import (
    check_outputs,
    check_prompt_length,
    dtype_name,
    read_text,
    refusals,
)
from adakv.cli.measure import Setting
from adakv.cli.options import (
    Place,
    max_new_tokens_option,
    place_options,
    question_option,
    setting_options,
)
from adakv.cli.progress import progress_bar
from adakv.cli.types import FILE
from adakv.eval import plot
from adakv.eval.chat import encode_prompt


@click.command()
@click.argument("model", type=FILE)
@click.argument("text", type=FILE)
@question_option
@setting_options
@max_new_tokens_option(default=64, least=2)
@click.option(
    "--out",
    type=FILE,
    metavar="FOLDER",
    default="adakv-report",
    show_default=True,
    help="Write the page into this folder.",
)
@place_options
def report(
    model: str,
    text: str,
    question: str | None,
    setting: Setting,
    max_new_tokens: int,
    out: str,
    place: Place,
) -> None:
    """Show on one page what MODEL keeps of TEXT (a file, or - for standard input).

    The page has the entries of each layer and kv head, the text with what was kept marked in it,
    the memory, and how far the answer is from the full cache's. It is written as report.html,
    report.md and kept.png.
    """
    folder = Path(out)
    names = ("report.html", "report.md", "kept.png")
    pages = {f"--out ({name})": str(folder / name) for name in names}
    check_outputs([model, text], place.outputs | pages)
    content = read_text(text)
    network, tokenizer = place.load(model, setting.kv_dtype)
    prompt = encode_prompt(tokenizer, content, question)
    check_prompt_length(network, prompt.shape[1], max_new_tokens)
    from adakv.eval.page import make_page  # needs transformers

    assert setting.policy is not None
    with progress_bar(setting.title) as advance, refusals():
        page = make_page(
            network,
            tokenizer,
            prompt,
            setting.policy,
            budget=setting.budget,
            ratio=setting.ratio,
            budget_bytes=setting.budget_bytes,
            kv_dtype=setting.kv_dtype,
            max_new_tokens=max_new_tokens,
        )
        advance()
    title = f"{page.policy}: entries kept of {page.num_tokens}"
    picture = io.BytesIO()
    with output.drawing():
        figure = plot.kept_maps({title: page.lengths})
    figure.savefig(picture, format="png")
    for path in filter(None, (str(folder / "kept.png"), place.plot_path)):
        output.write_figure(path, figure)
    output.write_text(str(folder / "report.html"), page.html(picture.getvalue()))
    output.write_text(str(folder / "report.md"), page.markdown("kept.png"))
    if place.json_path:
        about = {"model": model, "dtype": dtype_name(network), "machine": output.machine()}
        output.write_json(place.json_path, about | dataclasses.asdict(page))
    table = Table(show_header=False)
    for row in page.facts():
        table.add_row(*row)
    table.add_row("weights and cache", dtype_name(network))
    console = output.plain_console()
    console.print(table)
    console.print(f"written to {folder / 'report.html'}", soft_wrap=True)
