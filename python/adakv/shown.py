"""How things are shown in a line, in a notebook and as a picture: small tables and heat maps.

HTML takes its colours from the page around it, so that it is readable on dark and on light ones.
"""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adakv.errors import Error

_HOT = "#ec7a14"
_MOST_TITLES = 2048  # cells of a map that say what they are when they are pointed at


def mebibytes(count: int) -> str:
    """Bytes, for people."""
    return f"{count / 2**20:.1f} MiB"


def table(rows: Iterable[Sequence[str]], heads: Sequence[str] = ()) -> str:
    """HTML of a small table; texts are escaped."""

    def line(tag: str, cells: Sequence[str]) -> str:
        style = ' style="text-align:left"'
        texts = "".join(f"<{tag}{style}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{texts}</tr>"

    lines = [line("th", heads)] if heads else []
    return f"<table>{''.join([*lines, *(line('td', row) for row in rows)])}</table>"


def heat_map(
    values: Sequence[Sequence[float]], *, label: str, rows: str, columns: str, height: int = 180
) -> str:
    """SVG of values ``[rows][columns]`` of at least 0: the stronger a cell, the higher its value.

    ``rows`` and ``columns`` say what one of each is; ``label`` is a sentence about all of it.
    """
    highest = max((max(row, default=0) for row in values), default=0) or 1
    tall = max(3.0, min(14.0, height / max(len(values), 1)))
    num_columns = max(map(len, values), default=0)
    wide = max(2.0, min(22.0, 480 / max(num_columns, 1)))
    gap = 1 if wide > 4 else 0
    has_titles = sum(map(len, values)) <= _MOST_TITLES
    cells = []
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            title = f"<title>{rows} {i}, {columns} {j}: {value:g}</title>" if has_titles else ""
            cells.append(
                f'<rect x="{j * wide:g}" y="{i * tall:g}" width="{wide - gap:g}" '
                f'height="{tall - 1:g}" fill="{_HOT}" '
                f'fill-opacity="{0.08 + 0.92 * value / highest:.2f}">{title}</rect>'
            )
    size = f'width="{wide * num_columns:g}" height="{tall * len(values):g}"'
    name = html.escape(label)
    return (
        f'<figure style="margin:.5em 0"><svg role="img" aria-label="{name}" {size}>'
        f"{''.join(cells)}</svg><figcaption>{name}</figcaption></figure>"
    )


def figure(**settings: Any) -> Any:
    """An empty matplotlib figure that notebooks show by themselves.

    Raises ``adakv.Error`` where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise Error("pictures need matplotlib; pip install 'adakv[cli]'") from error

    class Picture(Figure):
        def _repr_png_(self) -> bytes:
            data = io.BytesIO()
            self.savefig(data, format="png")
            return data.getvalue()

    return Picture(layout="constrained", dpi=110, **settings)


def kept_maps(maps: Mapping[str, Sequence[Sequence[int]]]) -> Any:
    """A matplotlib figure: under each title the entries kept, ``[L][Hkv]``, as a heat map."""
    highest = max(max(heads) for layers in maps.values() for heads in layers)
    picture = figure(figsize=(9, 0.9 + 1.7 * len(maps)))
    axes = picture.subplots(len(maps), 1, squeeze=False)[:, 0]
    for axis, (title, layers) in zip(axes, maps.items(), strict=True):
        heads = list(zip(*layers, strict=True))  # [Hkv][L]
        image = axis.imshow(heads, aspect="auto", cmap="viridis", vmin=0, vmax=highest)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("kv head")
        axis.set_yticks(range(len(heads)))
    axes[-1].set_xlabel("layer")
    picture.colorbar(image, ax=list(axes), label="entries")
    return picture
