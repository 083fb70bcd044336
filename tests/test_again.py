"""Random histories of appending and choosing again in place, against lists of entries."""

from __future__ import annotations

import random

import pytest
import torch

import reference
from adakv import Error, ops
from adakv.cache import KVCache
from adakv.ops import Kept
from cases import int32

LAYERS, SEQUENCES, HEADS, DIM, PAGE = 2, 3, 3, 8, 8
MOST = 90  # entries of a row

Row = list[int]  # positions


class History:
    """A cache, and what its rows ``[L][B][Hkv]`` hold.

    An entry is known by layer, row and position: its key and value are made of these.
    """

    def __init__(
        self, rng: random.Random, device: torch.device, kv_dtype: str, value_dim: int
    ) -> None:
        self.rng, self.device = rng, device
        self.dtype = torch.float32 if kv_dtype == "auto" else torch.bfloat16
        self.kv = KVCache(
            num_layers=LAYERS,
            num_sequences=SEQUENCES,
            num_kv_heads=HEADS,
            head_dim=DIM,
            value_dim=value_dim,
            num_pages=LAYERS * SEQUENCES * HEADS * (MOST // PAGE + 4),
            max_row_pages=MOST // PAGE + 4,
            page_size=PAGE,
            dtype=self.dtype,
            kv_dtype=kv_dtype,
            device=device,
        )
        self.seen = [0] * SEQUENCES
        self.rows: list[list[list[Row]]] = [
            [[[] for _ in range(HEADS)] for _ in range(SEQUENCES)] for _ in range(LAYERS)
        ]
        widest = max(DIM, value_dim)
        self.table = torch.randn(LAYERS, SEQUENCES, HEADS, 2000, 2, widest).to(self.dtype)

    def entries(self, layer: int, b: int, begin: int, count: int) -> tuple[torch.Tensor, ...]:
        """Keys ``[1, Hkv, count, D]`` and values ``[1, Hkv, count, Dv]``."""
        both = self.table[layer, b, :, begin : begin + count].to(self.device)
        return both[None, :, :, 0, : self.kv.head_dim], both[None, :, :, 1, : self.kv.value_dim]

    def prompt(self, b: int, length: int) -> None:
        """A prompt of which all heads keep what they like."""
        self.kv.remove(b)
        self.seen[b] = length
        for layer in range(LAYERS):
            rows = [sorted(self.rng.sample(range(length), self.rng.randint(0, length)))
                    for _ in range(HEADS)]  # fmt: skip
            total = sum(map(len, rows)) + self.rng.randint(0, 5)
            pages = self.kv.begin(layer, [total], [length], first_sequence=b)
            view = self.view(layer, b)
            lens = int32([length], self.device)
            keys, values = self.entries(layer, b, 0, length)
            ops.compact(keys, values, self.kept(rows), view, *pages, seq_lens=lens)
            self.rows[layer][b] = rows

    def view(self, layer: int, b: int, count: int = 1) -> ops.Layer:
        whole = self.kv.layer(layer)
        own = {
            name: getattr(whole, name)[b : b + count]
            for name in ("block_table", "lengths", "seen", "fresh_pages")
        }
        return whole._replace(**own)

    def kept(self, rows: list[Row]) -> Kept:
        ends = [0]
        for row in rows:
            ends.append(ends[-1] + len(row))
        return Kept(int32([x for row in rows for x in row] or [-1], self.device),
                    int32(ends, self.device))  # fmt: skip

    def append(self, b: int, count: int) -> None:
        num_new = [count if i == b else 0 for i in range(SEQUENCES)]
        while count:
            piece = self.kv.grow(num_new, count)
            for layer in range(LAYERS):
                keys, values = self.entries(layer, b, self.seen[b], piece)
                ops.append(keys, values, self.view(layer, b))
                for row in self.rows[layer][b]:
                    row += range(self.seen[b], self.seen[b] + piece)
            self.seen[b] += piece
            count -= piece
            num_new[b] = count

    def choose(self, first: int, count: int) -> None:
        """Some sequences keep what they like of what they hold."""
        share = self.rng.choice((0.0, 0.3, 0.8, 0.95, 1.0))
        slots = [
            [
                [[i for i in range(len(row)) if self.rng.random() <= share] for row in rows]
                for rows in self.rows[layer][first : first + count]
            ]
            for layer in range(LAYERS)
        ]
        totals = [
            [sum(map(len, rows)) + self.rng.randint(0, 3) for rows in of_layer]
            for of_layer in slots
        ]
        longest = [max(len(row) for of_layer in slots for row in of_layer[i]) for i in range(count)]
        try:
            ids, starts = self.kv.begin_again(totals, longest, first_sequence=first)
        except Error:
            assert share > 0.9  # nothing leaves, and there are no pages for the next tokens
            return
        for layer, of_layer in enumerate(slots):
            rows = [row for of_sequence in of_layer for row in of_sequence]
            view = self.view(layer, first, count)
            ops.compact(None, None, self.kept(rows), view, ids, starts[layer])
            for b, of_sequence in enumerate(of_layer, first):
                self.rows[layer][b] = [
                    [row[i] for i in kept]
                    for row, kept in zip(self.rows[layer][b], of_sequence, strict=True)
                ]

    def check(self) -> None:
        """Entries, positions, and every page has one owner."""
        owned: list[int] = []
        for layer in range(LAYERS):
            view = self.kv.layer(layer)
            assert view.seen.tolist() == self.seen
            for b, rows in enumerate(self.kv.positions(layer)):
                for h, row in enumerate(rows):
                    expected = self.rows[layer][b][h]
                    assert row.tolist() == expected, (layer, b, h)
                    table = self.table[layer, b, h, expected].double()  # [n, 2, D or Dv]
                    atol = 0 if self.dtype == torch.float32 else 0.2
                    for held, wanted in zip(
                        reference.row_of(view, b, h), table.unbind(1), strict=True
                    ):
                        wanted = wanted[:, : held.shape[1]]
                        torch.testing.assert_close(held, wanted, atol=atol, rtol=0)
                    used = -(-len(expected) // PAGE)
                    pages = view.block_table[b, h].tolist()
                    assert all(page == -1 for page in pages[used:])
                    owned += pages[:used]
        assert len(owned) == len(set(owned))
        assert len(owned) <= self.kv.pages_used


def run(seed: int, device: torch.device, kv_dtype: str, value_dim: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    history = History(rng, device, kv_dtype, value_dim)
    for b in range(SEQUENCES):
        history.prompt(b, rng.randint(1, 30))
    history.check()
    for _ in range(rng.randint(2, 12)):
        b = rng.randrange(SEQUENCES)
        longest = max(len(row) for rows in history.rows for row in rows[b])
        action = rng.random()
        if action < 0.5 and longest < MOST:
            history.append(b, rng.choice((1, 1, 3, PAGE, MOST - longest)))
        elif action < 0.95:
            first = rng.randrange(SEQUENCES)
            history.choose(first, rng.randint(1, SEQUENCES - first))
        else:
            history.prompt(b, rng.randint(1, 30))
        history.check()
    for b in range(SEQUENCES):
        history.kv.remove(b)
    assert history.kv.pages_used == 0


@pytest.mark.parametrize(
    ("kv_dtype", "value_dim"),
    [("auto", DIM), ("int8", DIM), ("fp8", DIM), ("auto", 24), ("int8", 72)],
)
def test_random_histories(kv_dtype: str, value_dim: int, device: torch.device) -> None:
    for seed in range(12):
        run(seed, device, kv_dtype, value_dim)
