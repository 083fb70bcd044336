"""What is lost where each tensor-parallel rank shares its own heads' budget out, as inside vLLM,
against budgets that cross ranks, as inside vLLM and without a limit; emulated in one process.

    python benchmarks/quality_of_ranks.py MODEL --qa FILE --text FILE --ranks 2

Rows of the tables: what one rank writes (the policy's name), what N ranks write ("/ N"),
and what they write with budgets that cross ranks, as far as each rank has pages. With one kv head
per rank Ada-KV's budgets are SnapKV's where they don't cross. The figures are those of ``adakv
eval``.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from adakv.cli.inputs import load_model
from adakv.eval import data, summary
from adakv.eval.runner import run
from adakv.policy import Policy, get
from adakv.vllm.ranks import can_cross

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from per_rank import AcrossRanks, PerRank


def on_ranks(policy: Policy, ranks: int) -> Policy:
    """The same policy on so many ranks."""
    return replace(policy, allocator=PerRank(policy.allocator, ranks))


def across_ranks(policy: Policy, ranks: int, page_size: int) -> Policy:
    """The same with budgets that cross them."""
    return replace(policy, allocator=AcrossRanks(policy.allocator, ranks, page_size))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model", help="a folder, a hub name or a GGUF file")
    options.add_argument("--qa", required=True, help="questions in SQuAD's layout (JSON)")
    options.add_argument("--text", required=True, help="a file of plain text")
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--tokens", type=int, default=1000, help="of text in a prompt")
    options.add_argument("--prompts", type=int, default=8)
    options.add_argument("--shares", default="0.25,0.125")
    options.add_argument("--policies", default="ada_snapkv,model_column_max")
    options.add_argument("--page-size", type=int, default=16)
    options.add_argument("--dtype", default="float32")
    options.add_argument("--device", default="cpu")
    given = options.parse_args()
    dtype, device = getattr(torch, given.dtype), torch.device(given.device)
    model, tokenizer = load_model(given.model, dtype=dtype, device=device)
    size = data.Size(given.tokens, given.prompts, 2)
    tasks = {
        "questions": data.questions(given.qa, tokenizer, size, aware=False),
        "continuations": data.continuations(given.text, tokenizer, size),
    }
    policies: dict[str, Policy] = {}
    for name in given.policies.split(","):
        policies[name] = on_ranks(get(name), 1)
        policies[f"{name} / {given.ranks}"] = on_ranks(get(name), given.ranks)
        if can_cross(get(name).allocator):
            crossing = across_ranks(get(name), given.ranks, given.page_size)
            policies[f"{name} / {given.ranks}, crossing"] = crossing
    shares = [float(share) for share in given.shares.split(",")]
    records = []
    for record in run(model, tasks, policies, shares):
        records.append(record)
        print(record.as_dict(), flush=True)
    for table in summary.tables(summary.summarize(records)):
        print(table.markdown())


if __name__ == "__main__":
    main()
