"""An allocator whose proportions were measured beforehand: how much each attention head matters."""

from __future__ import annotations

import functools
import json
import math
import re
import statistics
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from adakv.errors import short
from adakv.policy.base import LayerSchedule, Need
from adakv.policy.inputs import LayerInputs, check_range

Table = tuple[tuple[float, ...], ...]  # [layers][heads]

#: Of what ``adakv calibrate --json`` writes. An older reader would misread another one.
CALIBRATION_VERSION = 1


@dataclass(frozen=True)
class Profile:
    """Budgets in fixed proportions, measured beforehand, as HeadKV's (arXiv 2410.19258).

    ``shares[layer][head]`` are numbers of at least 0, of which only the proportions count. Every
    head gets its share of the candidates, ``L * Hkv * (mean - window)`` in sum over the model: by
    largest remainder first the layers (in multiples of ``Hkv``), then the heads of each. What a
    head can't use, because its prompt is too short, the others get in the same proportions.

    Instead of ``shares`` there may be a ``file`` in UTF-8, which is read at once and holds

    * JSON lists, one for each layer, of a number for each head,
    * the JSON object that ``adakv calibrate --json`` writes, with ``"shares"`` of kv heads,
    * a JSON object of ``"layer-head"`` and a number, or a list of them, of which the mean counts:
      what is published for Retrieval Head (arXiv 2404.15574), of q heads,
    * the same with names as ``"L0H0"``: what is published for Attention Matching (arXiv
      2602.16284), of kv heads, or
    * lines of numbers between tabs or spaces, one for each layer: the ``full_attention_heads.tsv``
      of DuoAttention (arXiv 2410.10819), of kv heads.

    Where numbers are of q heads, ``group`` says how many of them share a kv head, whose share is
    their sum. Raises ``ValueError`` if a file can't be read or holds anything else.
    """

    shares: Table = ()
    file: str | None = None
    group: int = 1
    needs: ClassVar[frozenset[Need]] = frozenset({"layer"})
    is_model_wide: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range("group", self.group, 1)
        if (self.file is None) == (not self.shares):
            raise ValueError("shares or file must be given to Profile, and not both")
        object.__setattr__(self, "shares", tuple(tuple(map(float, x)) for x in self.shares))
        self.of_kv_heads  # noqa: B018 - which reads the file and checks the numbers

    @functools.cached_property
    def of_kv_heads(self) -> Table:
        """``[layers][Hkv]``: the shares."""
        shares, name = self.shares, "shares"
        if self.file is not None:
            shares, name = _read(self.file), f"file {self.file!r}"
        sizes = {len(layer) for layer in shares}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(
                f"{name} must be [layers][heads], with the same number of heads in every layer, "
                f"got {len(shares)} layers of {sorted(sizes)} heads"
            )
        if any(not 0 <= x < math.inf for layer in shares for x in layer) or not any(
            map(any, shares)
        ):
            raise ValueError(f"{name} must be finite, at least 0, and not all of them 0")
        heads = sizes.pop()
        if heads % self.group:
            raise ValueError(f"group must divide the {heads} heads of a layer, got {self.group}")
        groups = [slice(h, h + self.group) for h in range(0, heads, self.group)]
        return tuple(tuple(math.fsum(layer[group]) for group in groups) for layer in shares)

    @property
    def layers(self) -> LayerSchedule:
        return _ProfileLayers(tuple(math.fsum(layer) for layer in self.of_kv_heads))

    def allocate(
        self, scores: Tensor, inputs: LayerInputs, budgets: tuple[int, ...], *, window: int
    ) -> Tensor:
        heads = self.of_kv_heads[inputs.layer]
        if len(heads) != inputs.num_kv_heads:
            raise ValueError(
                f"shares must be those of {inputs.num_kv_heads} kv heads, got {len(heads)} a layer"
                " (those of q heads need a group)"
            )
        rows = [
            self._row(budget, window, length, inputs.layer)
            for budget, length in zip(budgets, inputs.prompt_lens, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.int32).to(scores.device, non_blocking=True)

    def least(self, budget: int, *, window: int, prompt_len: int, layer: int, pinned: int) -> int:
        """Entries that every kv head gets, whatever is pinned."""
        return min(self._row(budget, window, prompt_len, layer))

    def _row(self, budget: int, window: int, length: int, layer: int) -> list[int]:
        """What each head of a layer gets of a prompt."""
        heads, most = self.of_kv_heads[layer], max(length - window, 0)
        count = min(max(budget - window, 0), most) * len(heads)
        return [min(window, length) + n for n in _in_proportion(heads, count, most)]

    def total(self, budget: int, *, window: int, prompt_len: int, num_kv_heads: int) -> int:
        return num_kv_heads * min(budget, prompt_len)


@dataclass(frozen=True)
class _ProfileLayers:
    """The layers of a :class:`Profile`: sums over the heads."""

    shares: tuple[float, ...]

    def budget(
        self, mean: int, *, window: int, prompt_len: int, layer: int, num_layers: int
    ) -> int:
        if len(self.shares) != num_layers:
            raise ValueError(f"shares must be those of {num_layers} layers, got {len(self.shares)}")
        n = prompt_len - window
        if mean - window >= n:
            return mean
        return window + _in_proportion(self.shares, num_layers * (mean - window), n)[layer]


@functools.lru_cache(maxsize=1024)
def _in_proportion(shares: tuple[float, ...], count: int, most: int) -> tuple[int, ...]:
    """``count <= len(shares) * most`` in proportion to ``shares``, at most ``most`` each.

    By largest remainder, lower index first. Who would get more than ``most`` gets that, and the
    others what is left in the same proportions; if nobody who is left has a share, evenly.
    """
    parts, open_, left = [0] * len(shares), list(range(len(shares))), count
    while left:
        weights = {i: Fraction(shares[i]) for i in open_}
        if not any(weights.values()):
            weights = dict.fromkeys(open_, Fraction(1))
        whole = sum(weights.values())
        wanted = {i: weight * left / whole for i, weight in weights.items()}
        full = [i for i in open_ if wanted[i] >= most]
        if not full:
            for i in open_:
                parts[i] = math.floor(wanted[i])
            by_remainder = sorted(open_, key=lambda i: parts[i] - wanted[i])
            for i in by_remainder[: left - sum(parts[i] for i in open_)]:
                parts[i] += 1
            break
        for i in full:
            parts[i] = most
        open_ = [i for i in open_ if i not in full]
        left -= most * len(full)
    return tuple(parts)


def _read(path: str) -> Table:
    """What a file holds, unchecked but for its form."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if text.lstrip()[:1] not in ("[", "{"):
            return tuple(tuple(map(float, line.split())) for line in text.splitlines() if line)
        table: Any = json.loads(text)
        if isinstance(table, dict):
            table = _calibrated(table) if "shares" in table else _by_layers(table)
        return tuple(tuple(map(float, row)) for row in table)
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"file must hold numbers of heads, got {path!r}: {error}") from None


def _calibrated(file: dict[str, Any]) -> Any:
    version = file.get("version")
    if version != CALIBRATION_VERSION:
        raise ValueError(f"its version must be {CALIBRATION_VERSION}, got {version!r}")
    return file["shares"]


def _by_layers(table: dict[str, Any]) -> list[list[float]]:
    numbers: dict[tuple[int, int], float] = {}
    for name, given in table.items():
        place = re.fullmatch(r"(\d+)-(\d+)|L(\d+)H(\d+)", name, re.ASCII)
        if place is None:
            raise ValueError(f"its names must be 'layer-head' or 'L0H0', got {short(name)}")
        layer, head = (int(number) for number in place.groups() if number is not None)
        numbers[layer, head] = statistics.fmean(given) if isinstance(given, list) else given
    layers, heads = (max(place) + 1 for place in zip(*numbers, strict=True))
    places = ((layer, head) for layer in range(layers) for head in range(heads))
    missing = next((place for place in places if place not in numbers), None)
    if missing is not None:
        raise ValueError("it lacks '{}-{}'".format(*missing))
    return [[numbers[layer, head] for head in range(heads)] for layer in range(layers)]
