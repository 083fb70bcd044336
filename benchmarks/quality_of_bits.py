"""Quality at equal bytes: eviction alone, fewer bits alone, and both, in real pages.

Shares are those kept in 16 bits; pages of other formats take the same bytes and hold as many
entries as have room, which is MoreTokens. At a share of 1 nothing is evicted, whatever the format.
The records and tables are those of `adakv eval --equal-bytes`. On a CPU without instructions for
bfloat16 the model's matrices stay in float32, which is five times as fast; queries, keys, values
and the cache are bfloat16.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adakv
from adakv.cli import output
from adakv.cli.eval import check_shares, chosen_policies, labelled, print_tables, run_all
from adakv.cli.inputs import load_model
from adakv.eval import data, plot, runner, summary
from adakv.eval.metrics import Item
from adakv.eval.records import RecordFile

FORMATS = ("auto", "int8", "int4")
SHARES = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)


def attend_in_bfloat16(model: Any) -> None:
    """Has a Llama in float32 attend, and fill caches, in bfloat16."""

    def to(dtype: torch.dtype, given: Any) -> Any:
        return given.to(dtype) if isinstance(given, Tensor) else tuple(x.to(dtype) for x in given)

    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in ("q_proj", "k_proj", "v_proj", "rotary_emb"):
            module.register_forward_hook(lambda _, __, out: to(torch.bfloat16, out))
        if last == "o_proj":
            module.register_forward_pre_hook(lambda _, inputs: to(torch.float32, inputs))


def tasks_of(given: argparse.Namespace, tokenizer: Any) -> dict[str, list[Item]]:
    """Items by the name of their task."""
    size, tasks = data.Size(given.tokens, given.prompts, 1), {}
    if given.text:
        tasks["text"] = data.continuations(given.text, tokenizer, size)
    if given.qa:
        tasks["qa"] = data.questions(given.qa, tokenizer, size, aware=False)
    if given.text:
        tasks["needles"] = data.needles(given.text, tokenizer, size, aware=False)
        tasks["needles_aware"] = data.needles(given.text, tokenizer, size, aware=True)
    return tasks


def rounded(record: dict[str, Any]) -> Any:
    """With four digits of each number."""
    return json.loads(json.dumps(record), parse_float=lambda x: float(f"{float(x):.4g}"))


def write(out: str, about: dict[str, Any], cells: list[summary.Cell]) -> None:
    """The cells as tables, lines of JSON and a picture."""
    tables = summary.tables(cells)
    print_tables(output.plain_console(), tables)
    output.write_text(f"{out}.md", "\n".join(table.markdown() for table in tables))
    lines = [about | {"machine": output.machine()}, *(cell.as_dict() for cell in cells)]
    compact = (json.dumps(rounded(line), separators=(",", ":")) for line in lines)
    output.write_text(f"{out}.jsonl", "\n".join(compact) + "\n")
    output.write_figure(f"{out}.png", plot.curves(cells))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model", help="a folder or GGUF file of a Llama")
    options.add_argument("--qa", help="questions in SQuAD's layout (JSON)")
    options.add_argument("--text", help="text to be continued, and to hide needles in")
    options.add_argument("--policies", default="ada_snapkv", help="names, with commas between")
    options.add_argument("--formats", default=",".join(FORMATS), help="of pages, or tiers")
    options.add_argument("--shares", default=",".join(map(str, SHARES)), help="in 16 bits")
    options.add_argument("--tokens", type=int, default=1500)
    options.add_argument("--prompts", type=int, default=8)
    options.add_argument(
        "--out", required=True, metavar="NAME", help="NAME.records, NAME.jsonl ..."
    )
    given = options.parse_args()
    model, tokenizer = load_model(given.model, dtype=torch.float32, device=torch.device("cpu"))
    attend_in_bfloat16(model)
    about = {
        "adakv": adakv.__version__,
        "model": Path(given.model).name,
        "dtype": "bfloat16, weights in float32",
        **{name: Path(path).name for name in ("qa", "text") if (path := getattr(given, name))},
        "tokens": given.tokens,
        "prompts": given.prompts,
        "per_prompt": 1,
        "equal_bytes": True,
    }
    file = RecordFile(f"{given.out}.records", about)
    formats = labelled(given.policies.split(","), given.formats.split(","))
    chosen = chosen_policies(formats, equal_bytes=True)
    measure = functools.partial(runner.run, model)
    run_all(measure, file, tasks_of(given, tokenizer), chosen, check_shares(given.shares))
    names = list(formats)
    wanted = sorted(file.records, key=lambda record: names.index(record.key.policy))
    write(given.out, about, summary.summarize(wanted))


if __name__ == "__main__":
    main()
