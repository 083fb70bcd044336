"""Records of `adakv eval` become a small file of results, and such a file the tables of the docs.

    python benchmarks/quality_tables.py collect RUN.records RESULTS.jsonl --about '{"machine": ...}'
    python benchmarks/quality_tables.py show RESULTS.jsonl...

`collect` takes the prompts that all policies of a task have in common, so that a run may have been
stopped, and writes a line for each task and policy, with a list over shares of each number: the
mean of KL over prompts, its standard error, p of the paired test against the default, the share of
tokens that agree and that of bytes. The shares and the number of prompts that most lines have are
in the first line, as "lines", and left out of theirs. With --formats p is against the same policy
in 16 bits. `show` prints a table for each task, policies by shares; those come first whose
geometric mean over all is lowest. Bold is the lowest of those that read a prompt once, and a dagger
marks p below .05, a difference from the default in either direction that chance rarely gives. With
--formats bold is better than 16 bits by p below .05. With --compare one table has the geometric
mean over shares of what each KL is of the default's, and in how many tasks and shares it is better
and worse by p below .05. With --agreement one table has the share of tokens that the full cache
would have chosen, too; with --agreement-by-kl it is that share of all cells of like KL, whatever
their policy.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from adakv.eval.records import Record
from adakv.eval.summary import Table, difference, mean, share_name
from adakv.policy import DEFAULT

READS_TWICE = "kvzip"
LEAST = 1e-6  # nats, for logarithms
RARELY = 0.05  # p below which a difference is named

STEPS = (0.01, 0.03, 0.1, 0.3, 1, 3)  # nats, between the rows of :func:`agreement_by_kl`

OF_LINE = ("task", "policy", "texts")  # what is the same for all shares
OF_MOST = ("share", "texts")  # what most lines have alike, and the first line says

Cell = dict[str, Any]  # task, policy, share, texts, kl, error, and where they are known more
Values = dict[tuple[str, float], dict[str, float]]  # KL by prompt, by policy and share


def plain(policy: str) -> str:
    """The same policy in 16 bits."""
    return policy.rpartition(" in ")[0] or policy


def common(records: list[Record]) -> Values:
    """The prompts of one task that every policy has at every share."""
    found: Values = defaultdict(dict)
    for record in records:
        found[record.key.policy, record.key.share][record.key.item] = record.quality.kl
    items = set.intersection(*(set(kl) for kl in found.values()))
    return {key: {item: kl[item] for item in sorted(items)} for key, kl in found.items()}


def cells(records: list[Record], *, formats: bool, default: str = DEFAULT) -> list[Cell]:
    """A cell for each task, policy and share."""
    found = []
    for task in dict.fromkeys(record.key.task for record in records):
        own = [record for record in records if record.key.task == task]
        values = common(own)
        for (policy, share), kl in values.items():
            against = plain(policy) if formats else default
            cell = {"task": task, "policy": policy, "share": share, "texts": len(kl)}
            cell |= {
                "kl": rounded(mean(kl.values()).mean),
                "error": rounded(mean(kl.values()).error),
            }
            if policy != against and (base := values.get((against, share))):
                cell["p"] = rounded(difference(kl[item] - base[item] for item in kl).p)
            these = [r for r in own if r.key[2:] == (policy, share) and r.key.item in kl]
            cell["agreement"] = rounded(statistics.fmean(r.quality.agreement for r in these))
            cell["bytes_share"] = rounded(statistics.fmean(r.bytes / r.full_bytes for r in these))
            found.append(cell)
    return found


def packed(found: list[Cell]) -> list[Cell]:
    """A line for each task and policy, with lists over shares; null where a number is missing."""
    lines: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in found:
        lines[cell["task"], cell["policy"]].append(cell)
    names = [x for x in dict.fromkeys(x for cell in found for x in cell) if x not in OF_LINE]
    return [
        {name: own[0][name] for name in OF_LINE}
        | {name: [x.get(name) for x in own] for name in names if any(name in x for x in own)}
        for own in lines.values()
    ]


def written(first: dict[str, Any], lines: list[Cell]) -> list[dict[str, Any]]:
    """What a file of results holds: what most lines have alike is said once."""
    alike = {}
    for name in OF_MOST:
        counts = Counter(json.dumps(line[name]) for line in lines)
        alike[name] = json.loads(counts.most_common(1)[0][0])
    own = [{x: line[x] for x in line if x not in alike or line[x] != alike[x]} for line in lines]
    return [first | {"lines": alike}, *own]


def unpacked(lines: list[Cell]) -> list[Cell]:
    """The cells of such lines."""
    return [
        {name: line[name] for name in OF_LINE}
        | {
            name: line[name][i]
            for name in line
            if name not in OF_LINE and line[name][i] is not None
        }
        for line in lines
        for i in range(len(line["share"]))
    ]


def read(results: Path) -> list[Cell]:
    """The cells of a file of results."""
    first, *lines = map(json.loads, results.read_text().splitlines())
    return unpacked([first.get("lines", {}) | line for line in lines])


def rounded(value: float) -> float:
    """Its first three digits."""
    return float(f"{value:.3g}")


def order(results: list[Cell]) -> list[str]:
    """Policies, those of the lowest geometric mean of KL over all tasks and shares first."""
    logs: dict[str, list[float]] = defaultdict(list)
    for cell in results:
        logs[cell["policy"]].append(math.log(max(cell["kl"], LEAST)))
    return sorted(logs, key=lambda policy: statistics.fmean(logs[policy]))


def tables(
    results: list[Cell], *, formats: bool, shown_only: list[str] | None = None
) -> list[Table]:
    """A table for each task, its policies in the order of all tasks together."""
    found = []
    for task in dict.fromkeys(cell["task"] for cell in results):
        own = {(c["policy"], c["share"]): c for c in results if c["task"] == task}
        shares = sorted({share for _, share in own}, reverse=True)
        policies = [x for x in order(results) if shown_only is None or x in shown_only]
        policies = [x for x in policies if any(policy == x for policy, _ in own)]
        is_bold = is_better if formats else is_lowest
        rows = []
        for policy in policies:
            row = (own.get((policy, share)) for share in shares)
            found_ones = (x and shown(x, is_bold(x, own), not formats) for x in row)
            rows.append((f"`{policy}`", *(x or "" for x in found_ones)))
        prompts = f"`{task}`, {next(iter(own.values()))['texts']} prompts"
        found.append(Table(task, (prompts, *map(share_name, shares)), tuple(rows)))
    return found


def comparison(
    results: list[Cell], default: str = DEFAULT, *, shown_only: list[str] | None = None
) -> Table:
    """What each policy has of the default's KL, by task."""
    tasks = list(dict.fromkeys(cell["task"] for cell in results))
    base = {(c["task"], c["share"]): c["kl"] for c in results if c["policy"] == default}
    rows = []
    for policy in order(results):
        own = [cell for cell in results if cell["policy"] == policy]
        logs: dict[str, list[float]] = {task: [] for task in tasks}
        for cell in own:
            ratio = max(cell["kl"], LEAST) / max(base[cell["task"], cell["share"]], LEAST)
            logs[cell["task"]].append(math.log(ratio))
        ratios = [f"{math.exp(statistics.fmean(logs[task])):.2f}" for task in tasks]
        clear = [c["kl"] < base[c["task"], c["share"]] for c in own if c.get("p", 1) < RARELY]
        counts = (f"{clear.count(True)}", f"{clear.count(False)}")
        if policy != default and (shown_only is None or policy in shown_only):
            rows.append((f"`{policy}`", *ratios, *counts))
    names = (f"`{task}`" for task in tasks)
    return Table("", ("times the default's KL", *names, "better", "worse"), tuple(rows))


def agreement(results: list[Cell], shown_only: list[str] | None = None) -> Table:
    """The share of tokens that the full cache would have chosen, too, policies by tasks."""
    own = {
        (c["task"], c["policy"], c["share"]): c["agreement"] for c in results if "agreement" in c
    }
    shares = sorted({share for *_, share in own}, reverse=True)
    policies = [x for x in order(results) if shown_only is None or x in shown_only]
    rows = [
        (f"`{task}`", f"`{policy}`", *(f"{100 * own[task, policy, x]:.0f} %" for x in shares))
        for task in dict.fromkeys(task for task, *_ in own)
        for policy in policies
        if (task, policy, shares[0]) in own
    ]
    return Table("", ("same next token", "policy", *map(share_name, shares)), tuple(rows))


def agreement_by_kl(results: list[Cell]) -> Table:
    """The share of tokens that the full cache would have chosen, too, of cells of like KL."""
    rows = []
    for low, high in itertools.pairwise((0, *STEPS, math.inf)):
        own = [c["agreement"] for c in results if "agreement" in c and low <= c["kl"] < high]
        if len(own) < 2:
            continue
        least, *_, most = statistics.quantiles(own, n=10, method="inclusive")
        name = f"below {high:g}" if low == 0 else f"{low:g} to {high:g}"
        name = f"above {low:g}" if high == math.inf else name
        shares = (f"{100 * statistics.median(own):.0f} %", f"{100 * least:.0f} to {100 * most:.0f}")
        rows.append((name, str(len(own)), *shares))
    return Table("", ("KL", "cells", "same next token: median", "four cells in five"), tuple(rows))


def is_better(cell: Cell, own: dict[tuple[str, float], Cell]) -> bool:
    """Whether it is better than the same policy with the same bytes in 16 bits."""
    base = own[plain(cell["policy"]), cell["share"]]
    return bool(cell["kl"] < base["kl"] and cell.get("p", 1) < RARELY)


def is_lowest(cell: Cell, own: dict[tuple[str, float], Cell]) -> bool:
    """Whether nothing that reads a prompt once is lower."""
    once = [
        c["kl"]
        for (policy, share), c in own.items()
        if policy != READS_TWICE and share == cell["share"]
    ]
    return bool(cell["policy"] != READS_TWICE and cell["kl"] == min(once))


def shown(cell: Cell, bold: bool, marked: bool) -> str:
    """KL with the digits that matter."""
    kl = cell["kl"]
    digits = 1 if kl >= 10 else 2 if kl >= 0.1 else 3 if kl >= 0.01 else 4
    number = f"**{kl:.{digits}f}**" if bold else f"{kl:.{digits}f}"
    return number + (" †" if marked and cell.get("p", 1) < RARELY else "")


def markdown(table: Table) -> str:
    """Without the title: the first column says it."""
    return table.markdown().partition("\n\n")[2]


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = options.add_subparsers(dest="command", required=True)
    collect = commands.add_parser("collect")
    collect.add_argument("records", type=Path)
    collect.add_argument("results", type=Path)
    collect.add_argument("--about", type=json.loads, default={}, help="more for the first line")
    show = commands.add_parser("show")
    show.add_argument("results", type=Path, nargs="+", help="one file or several, read as one")
    show.add_argument("--policies", type=lambda names: names.split(","), help="only these rows")
    show.add_argument("--compare", action="store_true")
    show.add_argument("--agreement", action="store_true", help="instead of KL, in one table")
    show.add_argument("--agreement-by-kl", action="store_true", help="of all cells of like KL")
    for command in (collect, show):
        command.add_argument("--formats", action="store_true")
        command.add_argument("--default", default=DEFAULT, help="what others are compared with")
    given = options.parse_args()
    if given.command == "show":
        results = [cell for file in given.results for cell in read(file)]
        only = given.policies
        if given.agreement:
            found = [agreement(results, only)]
        elif given.agreement_by_kl:
            found = [agreement_by_kl(results)]
        elif given.compare:
            found = [comparison(results, given.default, shown_only=only)]
        else:
            found = tables(results, formats=given.formats, shown_only=only)
        for table in found:
            print(markdown(table))
        return
    first, *lines = map(json.loads, given.records.read_text().splitlines())
    records = [Record.from_dict(line) for line in lines]
    found_cells = cells(records, formats=given.formats, default=given.default)
    kept = written(first | given.about, packed(found_cells))
    compact = (json.dumps(line, separators=(",", ":")) for line in kept)
    given.results.write_text("\n".join(compact) + "\n")


if __name__ == "__main__":
    main()
