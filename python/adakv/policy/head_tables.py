"""Numbers of attention heads that others measured and published: how much each one matters."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

Table = tuple[tuple[float, ...], ...]  # [layers][heads]


def read_head_table(path: str) -> Table:
    """``[layers][heads]`` of a file in UTF-8, which holds

    * JSON lists, one for each layer, of a number for each head,
    * a JSON object of ``"layer-head"`` and a number, or a list of them, of which the mean counts:
      what is published for Retrieval Head (arXiv 2404.15574), of q heads, or
    * lines of numbers between tabs or spaces, one for each layer: the ``full_attention_heads.tsv``
      of DuoAttention (arXiv 2410.10819), of kv heads.

    Raises ``ValueError`` if it can't be read or holds anything else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        if text.lstrip()[:1] not in ("[", "{"):
            return tuple(tuple(map(float, line.split())) for line in text.splitlines() if line)
        table: Any = json.loads(text)
        rows = _by_layers(table) if isinstance(table, dict) else table
        return tuple(tuple(map(float, row)) for row in rows)
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"file must hold numbers of heads, got {path!r}: {error}") from None


def _by_layers(table: dict[str, Any]) -> list[list[float]]:
    numbers: dict[tuple[int, int], float] = {}
    for name, given in table.items():
        layer, head = map(int, name.split("-"))
        numbers[layer, head] = statistics.fmean(given) if isinstance(given, list) else given
    layers, heads = (max(place) + 1 for place in zip(*numbers, strict=True))
    places = ((layer, head) for layer in range(layers) for head in range(heads))
    missing = next((place for place in places if place not in numbers), None)
    if missing is not None:
        raise ValueError("it lacks '{}-{}'".format(*missing))
    return [[numbers[layer, head] for head in range(heads)] for layer in range(layers)]
