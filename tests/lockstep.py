"""A cache on the CPU and one on the GPU that go through the same steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adakv import ops
from adakv.cache import KVCache

LAYERS, SEQUENCES, KV_HEADS, GROUP, HEAD_DIM = 2, 3, 2, 4, 64


def rows_of(layer: ops.Layer, sequence: int) -> ops.Layer:
    """The part of a layer that belongs to one sequence."""
    part = slice(sequence, sequence + 1)
    return layer._replace(
        block_table=layer.block_table[part],
        lengths=layer.lengths[part],
        seen=layer.seen[part],
        fresh_pages=layer.fresh_pages[part],
    )


class Lockstep:
    """Every call does the same on both devices; entries are bfloat16, unused slots hold NaN."""

    def __init__(self, num_pages: int = 300, max_row_pages: int = 40) -> None:
        self.caches = []
        for device in ("cpu", "cuda"):
            cache = KVCache(
                num_layers=LAYERS,
                num_sequences=SEQUENCES,
                num_kv_heads=KV_HEADS,
                head_dim=HEAD_DIM,
                num_pages=num_pages,
                max_row_pages=max_row_pages,
                device=device,
            )
            cache.all_layers.pages.fill_(float("nan"))
            cache.all_layers.page_positions.fill_(0)
            self.caches.append(cache)

    @property
    def cuda(self) -> KVCache:
        return self.caches[1]

    def prefill(self, sequence: int, length: int, most: int) -> None:
        """Compacts random kept entries of a prompt, in all layers."""
        for layer in range(LAYERS):
            keys, values = entries(1, length), entries(1, length)
            counts = torch.randint(min(most, length) + 1, (KV_HEADS,)).tolist()
            rows = [torch.randperm(length)[:n].sort().values for n in counts]
            indptr = torch.tensor([0, *counts]).cumsum(0).int()
            positions = torch.cat(rows).int()

            totals = [sum(counts)], [max(counts)]
            for cache in self.caches:
                ids = cache.begin(layer, *totals, first_sequence=sequence)
                given = (x.to(cache.device) for x in (keys, values, positions, indptr))
                keys_there, values_there, *kept = given
                part = rows_of(cache.layer(layer), sequence)
                ops.compact(keys_there, values_there, ops.Kept(*kept), part, *ids)

    def each(self, run: Callable[..., Any], layer: int, *given: Tensor) -> list[Any]:
        """Runs something on both caches, with tensors moved to their devices."""
        return [run(c, layer, *(x.to(c.device) for x in given)) for c in self.caches]

    def grow(self, num_new: list[int], columns: int) -> int:
        """How many columns may be appended now."""
        first, second = (cache.grow(num_new, columns) for cache in self.caches)
        assert first == second
        return first

    def remove(self, sequence: int) -> None:
        for cache in self.caches:
            cache.remove(sequence)

    def check(self) -> None:
        """Same integers, same bits of every entry that is held."""
        cpu, cuda = (cache.all_layers for cache in self.caches)
        for name in ("block_table", "lengths", "seen", "fresh_pages"):
            assert torch.equal(getattr(cpu, name), getattr(cuda, name).cpu()), name
        cuda_positions = cuda.page_positions.cpu()
        cuda_pages = cuda.pages.cpu()
        for page, count in held_pages(cpu):
            same = torch.equal(cpu.page_positions[page, :count], cuda_positions[page, :count])
            assert same, "page_positions"
            assert torch.equal(cpu.pages[page, :, :count], cuda_pages[page, :, :count]), "pages"


def held_pages(layers: ops.Layer) -> list[tuple[int, int]]:
    """Pages in use and how many of their slots are."""
    page_size = layers.pages.shape[2]
    held = []
    for table, length in zip(
        layers.block_table.flatten(0, 2).tolist(), layers.lengths.flatten().tolist(), strict=True
    ):
        for slot in range(0, length, page_size):
            held.append((table[slot // page_size], min(page_size, length - slot)))
    return held


def entries(batch: int, tokens: int, heads: int = KV_HEADS) -> Tensor:
    return torch.randn(batch, heads, tokens, HEAD_DIM).bfloat16()
