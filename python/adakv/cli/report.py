"""``adakv report``: one prompt on one page."""

from __future__ import annotations

import click
from rich.table import Table

from adakv import shown
from adakv.cli import output
from adakv.cli.inputs import (
    STANDARD_OUTPUT,
    check_outputs,
    check_prompt_length,
    dtype_name,
    model_name,
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
from adakv.eval.chat import encode_prompt


@click.command(short_help="Show on one page what MODEL keeps of a text.")
@click.argument("model", type=FILE)
@click.argument("text", type=FILE)
@question_option
@setting_options
@max_new_tokens_option(default=64, least=2)
@click.option(
    "--out",
    type=FILE,
    metavar="FILE",
    default="adakv-report.html",
    show_default=True,
    help="Write the page into this file.",
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

    The page has the text with what was kept marked in it, for each layer and kv head, the entries
    of each, the memory, and how far the answer is from the full cache's. It is one HTML file that
    needs nothing else; a browser shows it.
    """
    check_outputs([model, text], place.outputs | {"--out": out})
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
            question=question,
            name=model_name(model),
        )
        advance()
    output.write_text(out, page.html())
    if place.plot_path:
        title = f"{page.policy}: entries kept of {page.num_tokens}"
        with refusals():
            output.write_figure(place.plot_path, shown.kept_maps({title: page.lengths}))
    if place.json_path:
        about = {"model": model, "dtype": dtype_name(network), "machine": output.machine()}
        output.write_json(place.json_path, about | page.as_dict())
    if out in STANDARD_OUTPUT:
        return
    table = Table(show_header=False)
    for row in page.facts():
        table.add_row(*row)
    table.add_row("weights and cache", dtype_name(network))
    console = output.plain_console()
    console.print(table)
    console.print(f"written to {out}", soft_wrap=True)
