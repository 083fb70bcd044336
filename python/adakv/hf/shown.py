"""A cache in a line, in a notebook and as a picture."""

from __future__ import annotations

from typing import Any

from adakv import shown
from adakv.errors import integer
from adakv.hf.branches import BranchingCache
from adakv.policy import Budget, presets
from adakv.reading import Reader


class ShownCache(BranchingCache):
    """A cache that says what it holds."""

    budget: Budget
    reading: Reader | None

    def stats(self) -> dict[str, Any]:
        """See :meth:`adakv.Cache.stats`."""
        raise NotImplementedError

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
