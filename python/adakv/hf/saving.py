"""Caches in files: one safetensors file each (docs/memory.md, Files).

What rows hold is written entry by entry, so that it can be read into pages of another size and onto
another device. Whatever a file says is checked against the model and against its own lengths before
memory is taken, and its bytes against their checksums.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from adakv.cache import KVCache, sequences
from adakv.errors import Error
from adakv.formats import SCALE_GROUP
from adakv.hf.layers import FullAttentionLayer
from adakv.hf.pool_size import pages_of
from adakv.kept_scores import fitting
from adakv.moving import begin_rows, bytes_of
from adakv.ops import Layer
from adakv.policy import Budget, ByteBudget
from adakv.shape import Shape

KIND, VERSION = "adakv cache", "1"
_MOST_SEQUENCES, _MOST_TOKENS = 1 << 16, 2**31 - 1
_CRC = "crc32"

#: dtypes as safetensors names them.
_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint8: "U8",
}
_INT4_PAGE = 32
_FIRST_SCORES = "layers.0.scores"


class Rows(NamedTuple):
    """Where the entries of some rows lie, one after the other."""

    page: Tensor  # [E] int64
    slot: Tensor  # [E] int64

    @classmethod
    def of(cls, lengths: Tensor, table: Tensor, page_size: int) -> Rows:
        """Those of rows of ``lengths`` ``[R]`` with a ``table`` ``[R, M]``, both on the CPU."""
        lengths = lengths.long()
        rows = torch.arange(len(lengths)).repeat_interleave(lengths)
        place = torch.arange(len(rows)) - (lengths.cumsum(0) - lengths)[rows]
        return cls(table.long()[rows, place // page_size], place % page_size)


def save(cache: Any, path: str | os.PathLike[str], notes: dict[str, str]) -> None:
    """:meth:`adakv.Cache.save`."""
    kv: KVCache = cache._kv
    tensors: dict[str, Tensor] = {}
    lengths = kv.all_layers.lengths.cpu()
    tensors["lengths"] = lengths
    for index in range(kv.num_layers):
        for name, x in _entries(kv, kv.layer(index), lengths[index]):
            tensors[f"layers.{index}.{name}"] = x
        if cache.kept_scores is not None:
            positions = tensors[f"layers.{index}.positions"]
            scores = cache.kept_scores[index].cpu()
            tensors[f"layers.{index}.scores"] = _scores_of_entries(
                scores, lengths[index], positions, cache.prompt_lens
            )
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, FullAttentionLayer):
            tensors[f"windows.{index}.keys"] = layer.keys.cpu()
            tensors[f"windows.{index}.values"] = layer.values.cpu()
    if cache.padding.shown is not None:
        tensors["shown"] = cache.padding.shown.cpu().to(torch.uint8)
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    about = {
        "kind": KIND,
        "version": VERSION,
        "model": fingerprint(cache.model),
        "policy": policy_text(cache.budget),
        "budget": json.dumps(_amount(cache.budget, lengths, cache.seen)),
        "kv_dtype": kv.kv_dtype,
        "dtype": str(kv.dtype).removeprefix("torch."),
        "shape": json.dumps([kv.num_layers, len(cache.seen), kv.num_kv_heads, kv.head_dim]),
        "seen": json.dumps(cache.seen),
        "prompt_lens": json.dumps(list(cache.prompt_lens)),
        "columns": json.dumps(cache._full[0].num_seen),
        "notes": json.dumps(notes),
        "checksums": json.dumps({name: _crc(x) for name, x in tensors.items()}, sort_keys=True),
    }
    about[_CRC] = str(_crc_of_text(about))
    part = f"{os.fspath(path)}.part"
    try:
        save_file(tensors, part, about)
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def load(
    kind: Any, model: Any, path: str | os.PathLike[str], policy: Any, settings: dict[str, Any]
) -> Any:
    """:meth:`adakv.Cache.load`."""
    name = os.fspath(path)
    try:
        with safe_open(name, framework="pt") as file:
            return _loaded(kind, model, _File(name, file), policy, settings)
    except (SafetensorError, UnicodeDecodeError) as error:
        raise Error(f"{name} is not a cache, or only a part of one: {error}") from error


def notes_of(path: str | os.PathLike[str]) -> dict[str, str]:
    """What :meth:`adakv.Cache.save` was given beside the cache. Raises as ``load`` does."""
    name = os.fspath(path)
    try:
        with safe_open(name, framework="pt") as opened:
            file = _File(name, opened)
            notes = file.json("notes")
    except (SafetensorError, UnicodeDecodeError) as error:
        raise Error(f"{name} is not a cache, or only a part of one: {error}") from error
    is_right = isinstance(notes, dict) and all(isinstance(x, str) for x in notes.values())
    file.check(is_right, "its notes make no sense")
    return notes


class _File:
    """A file that was opened; nothing that it says is believed before it was checked."""

    def __init__(self, name: str, file: Any) -> None:
        self.name, self._file = name, file
        about: dict[str, str] = file.metadata() or {}
        self.check(about.get("kind") == KIND, f"it is not of the kind {KIND!r}")
        version = about.get("version")
        self.check(version == VERSION, f"its version is {version!r}, and {VERSION} is known here")
        crc = about.pop(_CRC, "")
        self.check(crc == str(_crc_of_text(about)), "its description was altered")
        self.about = about
        self._checksums: Any = self.json("checksums")
        self.check(isinstance(self._checksums, dict), "it has no checksums")

    def check(self, condition: bool, reason: str) -> None:
        """Raises ``adakv.Error`` with the reason unless the condition holds."""
        if not condition:
            raise Error(f"{self.name} can't be read: {reason}")

    def text(self, key: str) -> str:
        self.check(key in self.about, f"it doesn't say its {key}")
        return self.about[key]

    def json(self, key: str) -> Any:
        try:
            return json.loads(self.text(key))
        except (ValueError, RecursionError):
            raise Error(f"{self.name} can't be read: its {key} makes no sense") from None

    def ints(self, key: str, count: int | None, low: int, high: int) -> list[int]:
        """A list of whole numbers."""
        given = self.json(key)
        is_list = isinstance(given, list) and count in (None, len(given))
        is_right = is_list and all(type(x) is int and low <= x <= high for x in given)
        self.check(is_right, f"its {key} must be {count or 'some'} numbers in {low} .. {high}")
        return [int(x) for x in given]

    def check_tensors(self, expected: dict[str, tuple[str, list[int]]]) -> None:
        """Raises ``adakv.Error`` unless it has exactly these tensors."""
        names = set(self._file.keys())
        self.check(names == set(expected), f"its tensors are not those of {len(expected)} names")
        for name, (dtype, shape) in expected.items():
            self.check_tensor(name, dtype, shape)

    def check_tensor(self, name: str, dtype: str, shape: list[int]) -> None:
        self.check(name in self._file.keys(), f"it has no {name}")  # noqa: SIM118
        part = self._file.get_slice(name)
        got = part.get_dtype(), list(part.get_shape())
        self.check(got == (dtype, shape), f"{name} must be {dtype} {shape}, got {got[0]} {got[1]}")

    def shape(self, name: str) -> list[int]:
        self.check(name in self._file.keys(), f"it has no {name}")  # noqa: SIM118
        return list(self._file.get_slice(name).get_shape())

    def has(self, name: str) -> bool:
        return name in self._file.keys()  # noqa: SIM118

    def tensor(self, name: str) -> Tensor:
        """One that was checked, on the CPU."""
        x: Tensor = self._file.get_tensor(name)
        self.check(self._checksums.get(name) == _crc(x), f"{name} was altered")
        return x


def _loaded(kind: Any, model: Any, file: _File, policy: Any, settings: dict[str, Any]) -> Any:
    amount = file.json("budget")
    is_amount = isinstance(amount, dict) and set(amount) in ({"budget"}, {"ratio"})
    file.check(is_amount, "its budget makes no sense")
    kv_dtype = file.text("kv_dtype")
    file.check(kv_dtype in ("auto", "int8", "fp8", "int4"), f"its kv_dtype is {kv_dtype!r}")
    chosen = file.text("policy") if policy is None else policy
    cache = kind(model, chosen, **amount, kv_dtype=kv_dtype, **settings)
    if fingerprint(cache.model) != file.text("model"):
        raise ValueError(f"model: {file.name} was made for another model, or for other weights")
    layers, batch, heads, dim = file.ints("shape", 4, 1, _MOST_TOKENS)
    file.check(layers == len(cache._full), f"it has {layers} layers, the model {len(cache._full)}")
    file.check(batch <= _MOST_SEQUENCES, f"it has {batch} sequences")
    dtype: Any = getattr(torch, file.text("dtype"), None)
    file.check(dtype in _NAMES and dtype.is_floating_point, "its dtype makes no sense")
    device = next(cache.model.parameters()).device
    shape = Shape(layers, heads, dim, dtype, device, kv_dtype)
    seen = file.ints("seen", batch, 1, _MOST_TOKENS)
    prompts = file.ints("prompt_lens", batch, 0, _MOST_TOKENS)
    columns = file.json("columns")
    is_count = type(columns) is int and max(seen) <= columns <= _MOST_TOKENS
    file.check(is_count, "its columns make no sense")
    lengths = _lengths(file, (layers, batch, heads), seen)
    expected = _expected(file, cache, shape, lengths, columns)
    file.check_tensors(expected)
    kv = _filled(file, cache, shape, lengths, seen)
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, FullAttentionLayer):
            both = (file.tensor(f"windows.{index}.{x}").to(device) for x in ("keys", "values"))
            layer.update(*both, index)
            layer.cumulative_length = columns
    cache.go_on_from(kv, seen, prompts, columns)
    if file.has(_FIRST_SCORES):
        cache.kept_scores = [
            _scores_of_rows(file, file.tensor(f"layers.{index}.scores"), of_layer).to(device)
            for index, of_layer in enumerate(lengths)
        ]
    if file.has("shown"):
        cache.padding.shown = file.tensor("shown").bool().to(device)
    return cache


def _lengths(file: _File, shape: tuple[int, int, int], seen: list[int]) -> Tensor:
    """Entries ``[L, B, Hkv]`` of the rows."""
    file.check_tensor("lengths", "I32", list(shape))
    lengths = file.tensor("lengths")
    most = torch.tensor(seen)[:, None]
    file.check(bool(((lengths >= 0) & (lengths <= most)).all()), "its lengths make no sense")
    return lengths


def _expected(
    file: _File, cache: Any, shape: Shape, lengths: Tensor, columns: int
) -> dict[str, tuple[str, list[int]]]:
    """What a file of such lengths consists of."""
    batch = lengths.shape[1]
    expected: dict[str, tuple[str, list[int]]] = {"lengths": ("I32", list(lengths.shape))}
    for index in range(len(lengths)):
        for name, dtype, size in _parts(shape, lengths[index]):
            expected[f"layers.{index}.{name}"] = dtype, size
        if file.has(_FIRST_SCORES):
            expected[f"layers.{index}.scores"] = "F32", [int(lengths[index].sum())]
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, FullAttentionLayer):
            continue
        check_window(layer)
        for half in ("keys", "values"):
            name = f"windows.{index}.{half}"
            got = file.shape(name)
            length = min(columns, layer.sliding_window - 1)
            is_right = len(got) == 4 and got[0] == batch and got[2] == length and got[3] <= 1024
            file.check(is_right, f"{name} makes no sense: {got}")
            expected[name] = _NAMES[shape.dtype], got
    if file.has("shown"):
        got = file.shape("shown")
        file.check(len(got) == 2 and got[0] == batch and got[1] <= columns, "shown makes no sense")
        expected["shown"] = "U8", got
    return expected


def _parts(shape: Shape, lengths: Tensor) -> Iterator[tuple[str, str, list[int]]]:
    """Name, dtype and shape of each tensor of a layer whose rows hold ``lengths``."""
    dim, groups = shape.head_dim, math.ceil(shape.head_dim / SCALE_GROUP)
    entries, dtype = int(lengths.sum()), _NAMES[shape.dtype]
    yield "positions", "I32", [entries]
    if shape.kv_dtype == "int4":
        full = int((lengths // _INT4_PAGE).sum())
        tail = entries - full * _INT4_PAGE
        yield "pages", "U8", [full, 2, _INT4_PAGE, dim // 2]
        yield "key_scales", dtype, [full, 2, dim]
        yield "value_scales", dtype, [full, _INT4_PAGE, 2 * groups]
        yield "tails", dtype, [2, tail, dim]
        return
    codes = dtype if shape.kv_dtype == "auto" else "U8"
    yield "keys", codes, [entries, dim]
    yield "values", codes, [entries, dim]
    if shape.kv_dtype != "auto":
        width = groups * (2 if shape.kv_dtype == "int8" else 1)
        yield "key_scales", dtype, [entries, width]
        yield "value_scales", dtype, [entries, width]


def _entries(kv: KVCache, view: Layer, lengths: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a layer, on the CPU."""
    flat = lengths.flatten()
    rows = Rows.of(flat, view.block_table.cpu().flatten(0, 1), kv.page_size)
    page, slot = (x.to(kv.device) for x in rows)
    yield "positions", view.page_positions[page, slot].cpu()
    if kv.kv_dtype == "int4":
        full, in_tail, row = _int4_places(flat, rows)
        whole = page[full.to(kv.device)]
        assert view.tails is not None and view.key_scales is not None
        assert view.value_scales is not None
        yield "pages", view.pages[whole].cpu()
        yield "key_scales", view.key_scales[whole].cpu()
        yield "value_scales", view.value_scales[whole].cpu()
        tails = view.tails.flatten(0, 1).unflatten(1, (2, _INT4_PAGE))  # [R, 2, P, D]
        at = row[in_tail].to(kv.device), slot[in_tail.to(kv.device)]
        yield "tails", torch.stack([tails[at[0], half, at[1]] for half in (0, 1)]).cpu()
        return
    pages = view.pages.view(torch.uint8) if kv.kv_dtype == "fp8" else view.pages
    yield "keys", pages[page, 0, slot].cpu()
    yield "values", pages[page, 1, slot].cpu()
    if view.key_scales is not None and view.value_scales is not None:
        yield "key_scales", view.key_scales[page, slot].cpu()
        yield "value_scales", view.value_scales[page, slot].cpu()


def _scores_of_entries(
    scores: Tensor, lengths: Tensor, positions: Tensor, prompt_lens: Sequence[int]
) -> Tensor:
    """``[E]`` of ``[B, Hkv, M]``: ``+inf`` behind the prompts, too."""
    is_held = _slots_of(lengths)
    of_entries = fitting(scores, max(is_held.shape[2], scores.shape[2]))[..., : is_held.shape[2]]
    counts = lengths.sum(1)
    ends = torch.tensor(prompt_lens).repeat_interleave(counts)
    return of_entries[is_held].masked_fill(positions >= ends, torch.inf)


def _scores_of_rows(file: _File, scores: Tensor, lengths: Tensor) -> Tensor:
    """``[B, Hkv, M]`` of ``[E]``."""
    file.check(not bool(scores.isnan().any()), "its scores make no sense")
    is_held = _slots_of(lengths)
    return torch.full(is_held.shape, -torch.inf).masked_scatter(is_held, scores)


def _slots_of(lengths: Tensor) -> Tensor:
    """``[B, Hkv, M]`` bool: which slots of rows of ``lengths`` ``[B, Hkv]`` hold something."""
    return torch.arange(int(lengths.max())) < lengths[..., None]


def _int4_places(lengths: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """The entries that begin a full page; which are in a tail, ``[E]``; and their rows."""
    row = torch.arange(len(lengths)).repeat_interleave(lengths.long())
    place = torch.arange(len(row)) - (lengths.cumsum(0) - lengths)[row]
    in_tail = place >= (lengths // _INT4_PAGE * _INT4_PAGE)[row]
    return (~in_tail & (rows.slot == 0)).nonzero().flatten(), in_tail, row


def _filled(file: _File, cache: Any, shape: Shape, lengths: Tensor, seen: list[int]) -> KVCache:
    """Pages with what a file holds."""
    page_size = cache._allocation.pages(cache.budget, shape)[1]
    longest = [int(n) for n in lengths.amax((0, 2)).tolist()]
    kv = pages_of(shape, page_size, lengths, cache._allocation.max_new_tokens)
    for index, layer in enumerate(kv.layers):
        table = begin_rows(kv, index, lengths[index], longest, torch.tensor(seen))
        parts = {
            name: file.tensor(f"layers.{index}.{name}")
            for name, _, _ in _parts(shape, lengths[index])
        }
        _check_positions(file, parts["positions"], lengths[index], seen)
        _fill(kv, sequences(layer, slice(None)), lengths[index], table, parts)
    return kv


def _check_positions(file: _File, positions: Tensor, lengths: Tensor, seen: list[int]) -> None:
    """Raises ``adakv.Error`` unless they ascend in every row and lie before what was seen."""
    counts = lengths.flatten().long()
    most = torch.tensor(seen).repeat_interleave(lengths.shape[1]).repeat_interleave(counts)
    ends = counts.cumsum(0)
    is_first = torch.zeros(len(positions) + 1, dtype=torch.bool)
    is_first[ends - counts] = True
    ascends = (positions.diff() > 0) | is_first[1:-1] if len(positions) else is_first[:0]
    is_right = bool(ascends.all()) and bool(((positions >= 0) & (positions < most)).all())
    file.check(is_right, "its positions make no sense")


def _fill(
    kv: KVCache, view: Layer, lengths: Tensor, table: Tensor, parts: dict[str, Tensor]
) -> None:
    """Puts the tensors of a layer where its rows have them."""
    flat = lengths.flatten()
    rows = Rows.of(flat, table.flatten(0, 1), kv.page_size)
    page, slot = (x.to(kv.device) for x in rows)
    parts = {name: x.to(kv.device) for name, x in parts.items()}
    view.page_positions[page, slot] = parts["positions"]
    if kv.kv_dtype == "int4":
        full, in_tail, row = _int4_places(flat, rows)
        whole = page[full.to(kv.device)]
        for name in ("pages", "key_scales", "value_scales"):
            getattr(view, name)[whole] = parts[name]
        assert view.tails is not None
        tails = view.tails.unflatten(2, (2, _INT4_PAGE))  # [B, Hkv, 2, P, D]
        row, at = row[in_tail].to(kv.device), slot[in_tail.to(kv.device)]
        for half in (0, 1):
            tails[row // lengths.shape[1], row % lengths.shape[1], half, at] = parts["tails"][half]
        return
    pages = bytes_of(view.pages)
    pages[page, 0, slot], pages[page, 1, slot] = parts["keys"], parts["values"]
    if view.key_scales is not None and view.value_scales is not None:
        view.key_scales[page, slot] = parts["key_scales"]
        view.value_scales[page, slot] = parts["value_scales"]


def check_window(layer: Any) -> None:
    """Raises ``ValueError`` unless a layer of transformers' own is one with a sliding window."""
    if not hasattr(layer, "sliding_window") or hasattr(layer, "number_of_states"):
        raise ValueError(f"model: a {type(layer).__name__} has states, which files don't hold")


def fingerprint(model: nn.Module) -> str:
    """What tells a model with its weights from others: names, shapes and some numbers of all its
    parameters and buffers."""
    known = hashlib.sha256(type(model).__name__.encode())
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        known.update(f"{name} {list(x.shape)}".encode())
        if x.device.type != "meta" and x.numel() > 0:
            places = torch.linspace(0, x.numel() - 1, min(x.numel(), 16), dtype=torch.float64)
            some = x.detach().flatten()[places.long().to(x.device)].float().cpu()
            known.update(some.numpy().tobytes())
    return known.hexdigest()


def policy_text(budget: Budget) -> str:
    """The policy, written down."""
    policy = budget.policy
    parts = [policy.scorer, policy.allocator, policy.selector, policy.when]
    return " * ".join(repr(part) for part in parts if part is not None)


def _amount(budget: Budget, lengths: Tensor, seen: list[int]) -> dict[str, Any]:
    """How much is kept; of bytes, the share that they came to."""
    if isinstance(budget, ByteBudget):
        share = float(lengths.sum()) / (lengths[:, 0].numel() * max(sum(seen), 1))
        return {"ratio": min(max(share, 1e-6), 1.0)}
    return {"ratio": budget.ratio} if budget.entries is None else {"budget": budget.entries}


def _crc(x: Tensor) -> int:
    """The checksum of a tensor's bytes."""
    data: Any = x.contiguous().flatten().view(torch.uint8).numpy() if x.numel() else b""
    return zlib.crc32(data)


def _crc_of_text(about: dict[str, str]) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())
