"""``adakv report``: one prompt on one page."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from adakv.cli import output
from adakv.cli.inputs import check_prompt_length, encode_prompt, read_text, refusals
from adakv.cli.measure import Setting
from adakv.cli.options import Place, place_options, setting_options
from adakv.cli.progress import progress_bar
from adakv.eval import plot


@click.command()
@click.argument("model")
@click.argument("text")
@click.option("--question", help="Asked after the text, in the model's chat template if any.")
@setting_options
@click.option("--max-new-tokens", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--out", metavar="FOLDER", default="adakv-report", show_default=True)
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
    """What MODEL keeps of TEXT (a file, or - for standard input), on one page.

    Entries per layer and kv head, the text with what was kept marked in it, memory, and how far the
    answer is from the full cache's: report.html, report.md and kept.png in --out.
    """
    content = read_text(text)
    network, tokenizer = place.load(model)
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
            max_new_tokens=max_new_tokens,
        )
        advance()
    title = f"{page.policy}: entries kept of {page.num_tokens}"
    picture = io.BytesIO()
    with output.drawing():
        figure = plot.kept_maps({title: page.lengths})
    figure.savefig(picture, format="png")
    folder = Path(out)
    for path in filter(None, (str(folder / "kept.png"), place.plot_path)):
        output.write_figure(path, figure)
    output.write_text(str(folder / "report.html"), page.html(picture.getvalue()))
    output.write_text(str(folder / "report.md"), page.markdown("kept.png"))
    if place.json_path:
        about = {"model": model, "dtype": place.dtype, "machine": output.machine()}
        output.write_json(place.json_path, about | dataclasses.asdict(page))
    table = Table(show_header=False)
    for row in page.facts():
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(f"written to {folder / 'report.html'}", markup=False, highlight=False)
