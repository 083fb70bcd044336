"""Every item x policy x share: records, one JSON line each, so that a stopped run goes on later."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

import adakv
from adakv.eval.gauges import Item, Quality, answer_logits, compare
from adakv.eval.prefill import Prefill
from adakv.policy import Policy


class Key(NamedTuple):
    """What a record is about."""

    gauge: str
    item: str
    policy: str
    share: float


@dataclass(frozen=True)
class Record:
    """Quality of one item under one policy and share, and the bytes it was had for.

    Parameters
    ----------
    key : :class:`Key`
    prompt : str
        Name of the first item with the same prompt: records that share a prompt aren't independent.
    quality : :class:`Quality`
    tokens : int
        Of the prompt.
    bytes, full_bytes : int
        Of the compressed prompt, whole pages counted, and of a full cache's.
    depth : float, optional
        Of the item.
    """

    key: Key
    prompt: str
    quality: Quality
    tokens: int
    bytes: int
    full_bytes: int
    depth: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Flat, for JSON."""
        values = asdict(self)
        del values["key"], values["quality"]
        return self.key._asdict() | asdict(self.quality) | values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """The inverse of :meth:`as_dict`."""
        key = Key(*(values[name] for name in Key._fields))
        quality = Quality(**{name: values[name] for name in Quality.__dataclass_fields__})
        names = ("prompt", "tokens", "bytes", "full_bytes", "depth")
        return cls(key=key, quality=quality, **{name: values[name] for name in names})


class RecordFile:
    """Records in a file of JSON lines; the first line says what they belong to.

    Raises
    ------
    ValueError
        If the file is something else, or was begun with another ``about``. It is left as it was.
    """

    def __init__(self, path: str, about: Mapping[str, Any]) -> None:
        self._path = Path(path)
        self.records: list[Record] = []
        lines = self._lines()
        if lines:
            self._read(lines, json.loads(json.dumps(about)))
        else:
            self._append(about)

    def add(self, record: Record) -> None:
        """Appends a record."""
        self._append(record.as_dict())
        self.records.append(record)

    def _lines(self) -> list[str]:
        try:
            text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{self._path} can't be read: {error}") from error
        return text.split("\n")[:-1]  # what a killed run left behind the last newline is lost

    def _read(self, lines: list[str], about: dict[str, Any]) -> None:
        try:
            begun = json.loads(lines[0])
            self.records = [Record.from_dict(json.loads(line)) for line in lines[1:]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._path} holds no records of adakv eval") from error
        if begun != about:
            names = [n for n in {**begun, **about} if begun.get(n) != about.get(n)]
            raise ValueError(
                f"{self._path} was begun with "
                + ", ".join(f"{n} {begun.get(n)}, not {about.get(n)}" for n in sorted(names))
            )
        self._path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _append(self, content: Mapping[str, Any]) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(content) + "\n")
        except OSError as error:
            raise ValueError(f"{self._path} can't be written: {error.strerror}") from error


def missing(
    gauges: Mapping[str, Sequence[Item]],
    policies: Collection[str],
    shares: Collection[float],
    done: Collection[Key],
) -> list[Key]:
    """What is still to be measured."""
    finished = set(done)
    keys = (
        Key(gauge, item.name, policy, share)
        for gauge, items in gauges.items()
        for item in items
        for policy in policies
        for share in shares
    )
    return [key for key in keys if key not in finished]


def run(
    model: Any,
    gauges: Mapping[str, Sequence[Item]],
    policies: Mapping[str, Policy],
    shares: Sequence[float],
    *,
    done: Collection[Key] = (),
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[Record]:
    """Measures everything that is not ``done``.

    Parameters
    ----------
    model : PreTrainedModel
        Not attached.
    gauges : items by the name of their gauge
    policies : policies by name
    shares : sequence of float in (0, 1]
        Of each prompt's entries.
    done : collection of :class:`Key`, optional
    on_step : callable, optional
        Called after each record.

    Yields
    ------
    record : :class:`Record`
        One for each of :func:`missing`, prompt by prompt: each is read once.
    """
    wanted = set(missing(gauges, policies, shares, done))
    settings = [(name, share) for name in policies for share in shares]
    with adakv.attach(model):
        for gauge, all_items in gauges.items():
            for prompt, group in groupby(all_items, key=lambda item: item.prompt):
                items = list(group)
                todo = [
                    (item, Key(gauge, item.name, *setting))
                    for item in items
                    for setting in settings
                    if Key(gauge, item.name, *setting) in wanted
                ]
                if not todo:
                    continue
                prefill = Prefill(model, torch.tensor([prompt]))
                for item, pairs in groupby(todo, key=lambda pair: pair[0]):
                    full = answer_logits(model, prefill.full_cache(), item)
                    for _, key in pairs:
                        policy = policies[key.policy]
                        yield _record(model, prefill, item, key, policy, full, items[0].name)
                        on_step()


def _record(
    model: Any,
    prefill: Prefill,
    item: Item,
    key: Key,
    policy: Policy,
    full: torch.Tensor,
    prompt: str,
) -> Record:
    cache = prefill.cache(
        policy, ratio=key.share, max_new_tokens=len(item.query) + len(item.answer)
    )
    stats = cache.stats()
    compressed = answer_logits(model, cache, item)
    quality = compare(full, compressed, torch.tensor(item.answer, device=full.device))
    return Record(
        key, prompt, quality, len(item.prompt), stats["bytes"], stats["full_bytes"], item.depth
    )
