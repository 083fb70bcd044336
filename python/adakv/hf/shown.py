"""A cache in a line, in a notebook and as a picture."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from adakv import shown
from adakv.devices import AnyCache
from adakv.errors import integer
from adakv.hf import families
from adakv.hf.layers import FullAttentionLayer, contents
from adakv.hf.stored import StoredCache
from adakv.policy import Budget, presets
from adakv.reading import Reader


class ShownCache(StoredCache):
    """A cache that says what it holds."""

    budget: Budget
    reading: Reader | None
    layers: list[Any]
    model_config: Any
    _heads: tuple[int, int, int] | None
    _kv: AnyCache | None

    @property
    @abstractmethod
    def seen(self) -> list[int]:
        """Tokens of each sequence, without padding."""

    @property
    @abstractmethod
    def _slots(self) -> slice: ...

    def stats(self) -> dict[str, Any]:
        """What the cache holds.

        Returns
        -------
        stats : dict
            ``lengths`` ``[L, B, Hkv]`` int32 on the CPU, entries per layer, sequence and kv head (a
            sliding layer: what its window holds; a layer without keys: 0); ``seen``, tokens per
            sequence; and of the full-attention layers ``bytes`` in use, ``pages_used``, their
            ``kv_dtype`` (None before there are any) and ``full_bytes``, what a full cache would
            hold.
        """
        return contents(self.layers, self._kv, self._slots, self.seen, self._num_kv_heads)

    def kept(self, layer: int) -> list[list[Tensor]]:
        """Positions that a full-attention layer holds: per sequence and kv head int32, ascending.

        Positions count a sequence's own tokens from 0, padding left out.
        """
        ours = self.layers[layer]
        if not isinstance(ours, FullAttentionLayer):
            raise ValueError(f"layer {layer} has no full attention and is not compressed")
        return [] if self._kv is None else self._kv.positions(ours.index, self._slots)

    @property
    def _num_kv_heads(self) -> int:
        """As its keys have them; before the first ones come, as the model's config says."""
        return self._heads[0] if self._heads else families.num_kv_heads(self.model_config)

    def __repr__(self) -> str:
        made, held = self._described()
        return f"Cache({', '.join(made)}: {', '.join(held.values())})"

    def _repr_html_(self) -> str:
        made, held = self._described()
        told = shown.table([("policy", made[0]), ("budget", made[1]), *held.items()])
        lengths = self.stats()["lengths"].float()
        if lengths.numel() == 0 or not lengths.any():
            return told
        label = "entries in each layer (down) and kv head (across)"
        if lengths.shape[1] > 1:
            label += f", mean of {lengths.shape[1]} sequences"
        values = lengths.mean(1).tolist()
        label += f", {min(map(min, values)):g} to {max(map(max, values)):g}"
        return told + shown.heat_map(values, label=label, rows="layer", columns="kv head")

    def plot(self, sequence: int = 0) -> Any:
        """A matplotlib figure: the entries in each layer and kv head of a sequence.

        Raises
        ------
        ValueError
            If there is no such sequence.
        adakv.Error
            If matplotlib is missing.
        """
        stats = self.stats()
        number, num_sequences = integer("sequence", sequence, 0), len(stats["seen"])
        if number >= num_sequences:
            raise ValueError(
                f"sequence must be below the number of sequences, {num_sequences}, got {sequence}"
            )
        made, _ = self._described()
        title = f"{made[0]}: entries of {stats['seen'][number]} tokens"
        return shown.kept_maps({title: stats["lengths"][:, number].tolist()})

    def _described(self) -> tuple[list[str], dict[str, str]]:
        """Policy and budget; what it holds, by names."""
        stats = self.stats()
        made = [presets.name_of(self.budget.policy), self.budget.brief]
        seen, full = stats["seen"], stats["full_bytes"]
        if not sum(seen):
            return made, {"tokens": "empty"}
        tokens = f"{sum(seen)} tokens"
        if len(seen) > 1:
            tokens += f" in {len(seen)} sequences"
        if self.reading is not None:
            return made, {"tokens": f"{tokens}, being read"}
        held = {"tokens": tokens, "memory": shown.mebibytes(stats["bytes"])}
        if full:
            share = stats["bytes"] / full
            held["memory"] += f" instead of {shown.mebibytes(full)} ({share:.1%})"
        if stats["kv_dtype"] not in (None, "auto"):
            held["pages"] = str(stats["kv_dtype"])
        return made, held
