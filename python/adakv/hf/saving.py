"""Caches in files: one safetensors file each (docs/memory.md, Files).

What rows hold is written and read by C++ (:class:`adakv.cache_file.CacheFile`); here is what a
model adds to that. Whatever a file says is checked against the model before memory is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from adakv.cache import KVCache
from adakv.cache_file import CacheFile, save_cache
from adakv.errors import Error
from adakv.hf.layers import FullAttentionLayer
from adakv.kept_scores import fitting
from adakv.policy import Budget, ByteBudget
from adakv.shape import Shape

if TYPE_CHECKING:
    from adakv.hf.cache import Cache

    Kind = TypeVar("Kind", bound=Cache)

_MOST_TOKENS = 2**31 - 1


def save(cache: Cache, kv: KVCache, path: str | os.PathLike[str], notes: dict[str, str]) -> None:
    """:meth:`adakv.Cache.save` of a cache with these pages."""
    lengths = kv.lengths()
    texts = {
        "model": fingerprint(cache.model),
        "policy": policy_text(cache.budget),
        "budget": json.dumps(_amount(cache.budget, lengths, cache.seen)),
        "prompt_lens": json.dumps(list(cache.prompt_lens)),
        "columns": json.dumps(cache.columns),
        "notes": json.dumps(notes),
    }
    save_cache(path, kv, texts, dict(_others(cache, kv, lengths)))


def _others(cache: Cache, kv: KVCache, lengths: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What a cache has beside its pages, by name."""
    for index, scores in enumerate(cache.kept_scores or ()):
        positions = kv.positions(index)
        yield (
            f"scores.{index}",
            _scores_of_entries(scores.cpu(), lengths[index], positions, cache.prompt_lens),
        )
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, FullAttentionLayer):
            yield f"windows.{index}.keys", layer.keys
            yield f"windows.{index}.values", layer.values
    if cache.padding.shown is not None:
        yield "shown", cache.padding.shown.to(torch.uint8)


def load(
    kind: type[Kind],
    model: Any,
    path: str | os.PathLike[str],
    policy: Any,
    settings: dict[str, Any],
) -> Kind:
    """:meth:`adakv.Cache.load`."""
    file = _File(path)
    amount = file.json("budget")
    is_amount = isinstance(amount, dict) and set(amount) in ({"budget"}, {"ratio"})
    file.check(is_amount, "its budget makes no sense")
    chosen, kv_dtype = file.text("policy") if policy is None else policy, file.text("kv_dtype")
    cache = kind(model, chosen, **amount, kv_dtype=kv_dtype, **settings)
    if fingerprint(cache.model) != file.text("model"):
        raise ValueError(f"model: {file.name} was made for another model, or for other weights")
    lengths, seen = file.lengths, file.seen
    layers, batch, heads = lengths.shape
    count = sum(isinstance(layer, FullAttentionLayer) for layer in cache.layers)
    file.check(layers == count, f"it has {layers} layers, the model {count}")
    dims, dtype = file.json("shape")[3:], getattr(torch, file.text("dtype"))
    device = next(cache.model.parameters()).device
    more: dict[str, Any] = {"has_biases": file.has_biases, "value_dim": dims[-1]}
    shape = Shape(layers, heads, dims[0], dtype, device, kv_dtype, **more)
    prompts = file.ints("prompt_lens", batch, 0, _MOST_TOKENS)
    columns = file.json("columns")
    is_count = type(columns) is int and max(seen) <= columns <= _MOST_TOKENS
    file.check(is_count, "its columns make no sense")
    others = _checked_others(file, cache, shape, columns)
    kv = cache.pages_for_rows(shape, lengths)
    file.load(kv)
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, FullAttentionLayer):
            both = (others[f"windows.{index}.{x}"].to(device) for x in ("keys", "values"))
            layer.update(*both, index)
            layer.cumulative_length = columns
    cache.go_on_from(kv, seen, prompts, columns)
    if "scores.0" in others:
        scores = (others[f"scores.{index}"] for index in range(layers))
        pairs = zip(scores, lengths, strict=True)
        cache.kept_scores = [_scores_of_rows(file, *pair).to(device) for pair in pairs]
    if "shown" in others:
        cache.padding.shown = others["shown"].bool().to(device)
    return cache


def notes_of(path: str | os.PathLike[str]) -> dict[str, str]:
    """What :meth:`adakv.Cache.save` was given beside the cache. Raises as ``load`` does."""
    file = _File(path)
    notes = file.json("notes")
    is_right = isinstance(notes, dict) and all(isinstance(x, str) for x in notes.values())
    file.check(is_right, "its notes make no sense")
    return notes


class _File(CacheFile):
    """A file that was opened, whose pages were checked; nothing else that it says is believed."""

    def check(self, condition: bool, reason: str) -> None:
        """Raises ``adakv.Error`` with the reason unless the condition holds."""
        if not condition:
            raise Error(f"{self.name} can't be read: {reason}")

    def text(self, key: str) -> str:
        self.check(key in self.texts, f"it doesn't say its {key}")
        return self.texts[key]

    def json(self, key: str) -> Any:
        try:
            return json.loads(self.text(key))
        except (ValueError, RecursionError):
            raise Error(f"{self.name} can't be read: its {key} makes no sense") from None

    def ints(self, key: str, count: int, low: int, high: int) -> list[int]:
        """A list of whole numbers."""
        given = self.json(key)
        is_list = isinstance(given, list) and count == len(given)
        is_right = is_list and all(type(x) is int and low <= x <= high for x in given)
        self.check(is_right, f"its {key} must be {count} numbers in {low} .. {high}")
        return [int(x) for x in given]


def _checked_others(file: _File, cache: Cache, shape: Shape, columns: int) -> dict[str, Tensor]:
    """What a file has beside its pages: exactly what the model asks for."""
    others, batch = file.others(), len(file.seen)
    expected: dict[str, tuple[torch.dtype, list[int | None]]] = {}  # None: any size
    if "scores.0" in others:
        counts = file.lengths.sum((1, 2)).tolist()
        expected.update({f"scores.{i}": (torch.float32, [n]) for i, n in enumerate(counts)})
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, FullAttentionLayer):
            check_window(layer)
            size = [batch, None, min(columns, layer.sliding_window - 1), None]
            expected.update(
                {f"windows.{index}.{x}": (shape.dtype, size) for x in ("keys", "values")}
            )
    if "shown" in others:
        expected["shown"] = torch.uint8, [batch, None]
        file.check(others["shown"].shape[-1] <= columns, "shown makes no sense")
    file.check(
        set(others) == set(expected), f"its tensors {sorted(set(others) ^ set(expected))} are wrong"
    )
    for name, (dtype, sizes) in expected.items():
        got = others[name]
        is_right = got.dtype is dtype and got.dim() == len(sizes)
        is_right = is_right and all(b in (a, None) for a, b in zip(got.shape, sizes, strict=True))
        file.check(is_right, f"{name} makes no sense: {got.dtype} {list(got.shape)}")
    return others


def _scores_of_entries(
    scores: Tensor,
    lengths: Tensor,
    positions: Sequence[Sequence[Tensor]],
    prompt_lens: Sequence[int],
) -> Tensor:
    """``[E]`` of ``[B, Hkv, M]``: ``+inf`` behind the prompts, too."""
    is_held = _slots_of(lengths)
    of_entries = fitting(scores, max(is_held.shape[2], scores.shape[2]))[..., : is_held.shape[2]]
    ends = torch.tensor(prompt_lens).repeat_interleave(lengths.sum(1))
    stood = torch.cat([row for of_sequence in positions for row in of_sequence])
    return of_entries[is_held].masked_fill(stood >= ends, torch.inf)


def _scores_of_rows(file: _File, scores: Tensor, lengths: Tensor) -> Tensor:
    """``[B, Hkv, M]`` of ``[E]``."""
    file.check(not bool(scores.isnan().any()), "its scores make no sense")
    is_held = _slots_of(lengths)
    return torch.full(is_held.shape, -torch.inf).masked_scatter(is_held, scores)


def _slots_of(lengths: Tensor) -> Tensor:
    """``[B, Hkv, M]`` bool: which slots of rows of ``lengths`` ``[B, Hkv]`` hold something."""
    return torch.arange(int(lengths.max())) < lengths[..., None]


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
    parts = [policy.scorer, policy.allocator, policy.selector, policy.fold, policy.when]
    return " * ".join(repr(part) for part in parts if part is not None)


def _amount(budget: Budget, lengths: Tensor, seen: list[int]) -> dict[str, Any]:
    """How much is kept; of bytes, the share that they came to."""
    if isinstance(budget, ByteBudget):
        share = float(lengths.sum()) / (lengths[:, 0].numel() * max(sum(seen), 1))
        return {"ratio": min(max(share, 1e-6), 1.0)}
    return {"ratio": budget.ratio} if budget.entries is None else {"budget": budget.entries}
