"""``adakv policies``: what each keeps, and what it costs."""

from __future__ import annotations

import textwrap

import click

import adakv
from adakv.cli import output

# What a policy reads beside the prompt's keys and values, cheapest first.
FREE = "nothing"
KEYS = "a pass over the keys"
VALUES = "a pass over the values"
WINDOW = "32 queries"
NORMS = "32 queries, values"
QUERIES = "all queries"
ALL = "all queries, values"
FOURTH = "1 query in 4, values"
TWICE = "a second prefill"

#: What it keeps, and what choosing reads, by the name of the policy.
ABOUT = {
    "streaming": ("the first 4 tokens and the newest", FREE),
    "random": ("any tokens, to compare with", FREE),
    "snapkv": ("what the last tokens look at", WINDOW),
    "pyramidkv": ("the same, more in the first layers", WINDOW),
    "ada_snapkv": ("the same, a length for each head", WINDOW),
    "ada_pyramidkv": ("pyramidkv and ada_snapkv together", WINDOW),
    "critical_snapkv": ("snapkv, weighed by the output", NORMS),
    "critical_ada_snapkv": ("ada_snapkv weighed: both papers", NORMS),
    "critical_ada_pyramidkv": ("ada_pyramidkv, weighed as well", NORMS),
    "defensive": ("what one query looks at, weighed", NORMS),
    "layer_defensive": ("the same, layers compete, too", NORMS),
    "ada_column_max": ("what any query looks at, weighed", ALL),
    "model_column_max": ("the same, layers compete, too", ALL),
    "model_rank_fusion": ("the same, or keys unlike others", FOURTH),
    "kvzip": ("what repeating the prompt looks at", TWICE),
    "expected": ("what coming queries may look at", QUERIES),
    "ada_expected": ("the same, a length for each head", QUERIES),
    "keydiff": ("keys unlike the others", KEYS),
    "knorm": ("short keys", KEYS),
    "tova": ("what the last token looks at", "1 query"),
    "h2o": ("what all queries together look at", QUERIES),
    "r_kv": ("what the last 8 see, no likenesses", "8 queries, keys"),
    "vase": ("values that stand out, + a sample", VALUES),
    "ahakv": ("snapkv with a wider softmax", NORMS),
    "corm": ("what was looked at lately, no more", "64 queries"),
    "prefixkv": ("h2o, a share for each layer", QUERIES),
    "prefixkv_heads": ("the same, a share for each head", QUERIES),
    "prefixkv_text": ("the first and the newest tokens", FREE),
    "lava": ("layers by entropy, heads by score", NORMS),
    "critical_lava": ("the same, weighed by the output", NORMS),
    "aircache": ("images: what the question looks at", "64 queries, classes"),
    "csp": ("what its own kind and others ask", "32 queries, classes"),
    "hae": ("images: what any word looks at", "all queries, classes"),
    "citrus": ("what an instruction looks at", "an instruction"),
    "more_tokens": ("snapkv, more tokens in fewer bits", WINDOW),
    "mikv": ("h2o, four fifths of it in 4 bits", QUERIES),
    "think": ("snapkv, with fewer key channels", WINDOW),
    "full": ("all: nothing is evicted", FREE),
}
OTHERS = {
    "ffy0": "FFY0/AdaKV",
    "kvpress": "NVIDIA/kvpress",
    "kvcache_factory": "Zefan-Cai/KVCache-Factory",
}


@click.command(short_help="List the policies: what each keeps, and what choosing reads.")
@click.argument("name", required=False)
def policies(name: str | None) -> None:
    """List the policies: what each keeps of a prompt, and what choosing reads.

    With NAME, show the parts that a policy is made of: scorer * allocator * selector.
    """
    if name is not None:
        policy = output.find_policy(name, "NAME")
        click.echo(str(policy))
        return
    click.echo(f"{'policy':23}{'what it keeps':35}what choosing reads\n{'-' * 79}")
    for preset, (keeps, reads) in ABOUT.items():
        mark = " *" if preset == adakv.policy.DEFAULT else ""
        click.echo(f"{preset + mark:23}{keeps:35}{reads}")
    click.echo("* the default\n\nAs other implementations do it, to reproduce their numbers:")
    for suffix, project in OTHERS.items():
        names = ", ".join(n for n in adakv.policies() if n.endswith(f"@{suffix}"))
        click.echo(textwrap.fill(f"{project}: {names}", 79, subsequent_indent="    "))
    told = (
        "Measured, choosing adds to a prefill: ada_snapkv up to 3 %, critical_ada_snapkv "
        "1 to 10 %, model_rank_fusion 5 to 14 %, model_column_max 15 to 30 % "
        "(docs/performance.md). docs/policies.md says which one to take."
    )
    click.echo("\n" + textwrap.fill(told, 79))
