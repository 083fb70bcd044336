"""The cache through a thousand random steps: every page has one owner, every row its entries."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import adakv
import cases
from adakv import ops
from adakv.cache import KVCache, sequences

LAYERS, BATCH, HEADS, DIM, PAGE = 2, 3, 2, 8, 8
MAX_ROW_PAGES = 16


class Model:
    """What a cache ought to hold: the positions of each row, in slot order."""

    def __init__(self, device: torch.device, num_pages: int = 160) -> None:
        self.device = device
        self.cache = KVCache(
            num_layers=LAYERS,
            num_sequences=BATCH,
            num_kv_heads=HEADS,
            head_dim=DIM,
            num_pages=num_pages,
            max_row_pages=MAX_ROW_PAGES,
            page_size=PAGE,
            dtype=torch.float32,
            device=device,
        )
        self.cache.all_layers.pages.fill_(float("nan"))
        keys = itertools.product(range(LAYERS), range(BATCH), range(HEADS))
        self.rows: dict[tuple[int, int, int], list[int]] = {key: [] for key in keys}
        self.seen = [0] * BATCH

    def entries(self, layer: int, sequences: range, positions: list[range]) -> Tensor:
        """``[B, Hkv, S, D]`` of numbers that tell where they belong; NaN as left padding."""
        width = max(map(len, positions), default=0)
        x = torch.full((len(sequences), HEADS, width, DIM), float("nan"))
        for i, b in enumerate(sequences):
            for h in range(HEADS):
                count = len(positions[i])
                row = (layer * BATCH + b) * HEADS + h
                x[i, h, width - count :] = self.numbers(row, torch.tensor(positions[i]))
        return x.to(self.device)

    @staticmethod
    def numbers(row: Tensor | int, positions: Tensor) -> Tensor:
        return (positions + 1000.0 * row + 0.5)[:, None]

    def begin(self, b: int, length: int, budget: int) -> None:
        """A prompt of ``length`` tokens, of which each row keeps up to ``budget``."""
        for layer in range(LAYERS):
            rows = []
            for h in range(HEADS):
                count = min(int(torch.randint(budget + 1, ())), length)
                rows.append(torch.randperm(length)[:count].sort().values.tolist())
                self.rows[layer, b, h] = rows[-1]
            ends = torch.tensor([0, *map(len, rows)]).cumsum(0)
            pages = self.cache.begin(layer, [int(ends[-1])], [length], first_sequence=b)
            whole = self.cache.layer(layer)
            part = sequences(whole, slice(b, b + 1))
            keys = self.entries(layer, range(b, b + 1), [range(length)])
            flat = [position for row in rows for position in row]
            kept = ops.Kept(cases.int32(flat, self.device), ends.int().to(self.device))
            ops.compact(keys, -keys, kept, part, *pages)
        self.seen[b] = length

    def append(self, num_new: list[int]) -> None:
        """New tokens for all sequences at once, in as many pieces as the cache wants."""
        columns = max(num_new)
        while columns:
            now = self.cache.grow(num_new, columns)
            assert 1 <= now <= columns
            piece = [max(0, n - (columns - now)) for n in num_new]
            wanted = [range(s, s + n) for s, n in zip(self.seen, piece, strict=True)]
            for layer in range(LAYERS):
                keys = self.entries(layer, range(BATCH), wanted)
                if keys.shape[2] < now:  # all of it is padding on the left
                    hole = torch.full((BATCH, HEADS, now - keys.shape[2], DIM), float("nan"))
                    keys = torch.cat([hole.to(keys), keys], 2)
                count = cases.int32(piece, self.device)
                ops.append(keys, -keys, self.cache.layer(layer), num_new=count)
                for b in range(BATCH):
                    for h in range(HEADS):
                        self.rows[layer, b, h] = [*self.rows[layer, b, h], *wanted[b]]
            self.seen = [s + n for s, n in zip(self.seen, piece, strict=True)]
            num_new = [n - p for n, p in zip(num_new, piece, strict=True)]
            columns -= now

    def remove(self, b: int) -> None:
        self.cache.remove(b)
        self.seen[b] = 0
        self.rows.update({key: [] for key in self.rows if key[1] == b})

    def check(self) -> None:
        assert self.cache.pages_used + self.cache.num_free == self.cache.num_pages
        everything = cases.mapped(self.cache.all_layers, Tensor.cpu)
        assert everything.seen.tolist() == [self.seen] * LAYERS
        lengths = torch.tensor([len(row) for row in self.rows.values()])
        assert torch.equal(everything.lengths.flatten(), lengths.int())

        table = everything.block_table.flatten(0, 2)  # [rows, M]
        is_used = torch.arange(table.shape[1]) < -(-lengths // PAGE)[:, None]
        owned = table[is_used]
        assert (table[~is_used] == -1).all()
        assert ((owned >= 0) & (owned < self.cache.num_pages)).all()
        assert len(owned) == len(owned.unique()) <= self.cache.pages_used

        pages = table.clamp(min=0).long()
        is_held = torch.arange(table.shape[1] * PAGE) < lengths[:, None]  # [rows, slots]
        positions = everything.page_positions[pages].flatten(1)[is_held]
        assert positions.tolist() == [x for row in self.rows.values() for x in row]
        keys, values = (
            everything.pages[pages].transpose(0, 2).transpose(1, 2).flatten(2, 3)[:, is_held]
        )
        row = torch.arange(len(lengths)).repeat_interleave(lengths)
        expected = self.numbers(row, positions).expand(-1, DIM)
        assert torch.equal(keys, expected) and torch.equal(values, -expected)


def test_cache_survives_a_thousand_random_steps(device: torch.device) -> None:
    model, refused = Model(device, num_pages=100), 0
    for _ in range(1000):
        active = [b for b in range(BATCH) if model.seen[b]]
        idle = [b for b in range(BATCH) if not model.seen[b]]
        choice = int(torch.randint(10, ()))
        free = model.cache.num_free
        try:
            if idle and choice < 3:
                length = int(torch.randint(1, 80, ()))
                model.begin(idle[0], length, int(torch.randint(1, length + 1, ())))
            elif active and (choice == 3 or max(model.seen) > PAGE * MAX_ROW_PAGES - 40):
                model.remove(max(active, key=lambda b: model.seen[b]))
            elif active:
                most = 40 if choice == 4 else 2
                new = [int(torch.randint(most + 1, ())) * (b in active) for b in range(BATCH)]
                model.append(new)
        except adakv.Error as error:
            refused += 1
            assert f"{free} free" in str(error) or choice < 3
            if choice < 3:  # a layer of the prompt may have found its pages before
                model.remove(idle[0])
            else:
                assert model.cache.num_free == free
                model.check()
                model.remove(active[0])
        model.check()
    assert refused > 10
    for b in range(BATCH):
        model.remove(b)
    assert model.cache.pages_used == 0
    assert model.cache.num_free == model.cache.num_pages


def test_cache_appends_long_runs_in_whole_pieces(device: torch.device) -> None:
    """Chunks of a prompt: several pages at once where all sequences begin a stretch together."""
    model = Model(device)
    for b in range(BATCH):
        model.begin(b, 10 + b, 10)
    for tokens in (24, 5, 11, 1, 40):
        model.append([tokens] * BATCH)
        model.check()


def test_cache_with_room_for_everything_loses_nothing(device: torch.device) -> None:
    model = Model(device)
    for layer in range(LAYERS):
        for b in range(BATCH):
            full = [list(range(40))] * HEADS
            pages = model.cache.begin(layer, [80], [40], first_sequence=b)
            whole = model.cache.layer(layer)
            part = sequences(whole, slice(b, b + 1))
            keys = model.entries(layer, range(b, b + 1), [range(40)])
            scores = torch.zeros(1, HEADS, 40, device=device)
            budgets = ops.allocate(scores, 64, window=4)
            ops.compact(keys, -keys, ops.select(scores, budgets, window=4), part, *pages)
            model.rows.update({(layer, b, h): full[h] for h in range(HEADS)})
            model.seen[b] = 40
    model.check()


def test_cache_refuses_what_does_not_fit_and_goes_on(device: torch.device) -> None:
    model = Model(device)
    model.begin(0, 60, 60)
    free = model.cache.num_free
    with pytest.raises(adakv.Error, match=f"{free} free"):
        model.cache.begin(0, [8 * 200], [100], first_sequence=1)
    with pytest.raises(ValueError, match="holds entries"):
        model.cache.begin(0, [8], [8], first_sequence=0)
    with pytest.raises(adakv.Error, match="max_row_pages is 16"):
        model.cache.begin(0, [8], [PAGE * MAX_ROW_PAGES + 1], first_sequence=1)
    with pytest.raises(adakv.Error, match="max_row_pages is 16"):
        model.cache.grow([PAGE * MAX_ROW_PAGES, 0, 0], PAGE * MAX_ROW_PAGES)
    assert model.cache.num_free == free
    model.append([9, 0, 0])
    model.check()


def test_reserve_keeps_what_is_held_and_goes_on(device: torch.device) -> None:
    """A cache that is enlarged whenever it is full goes on like one that was made large."""
    model = Model(device, num_pages=70)
    for b in range(BATCH):
        model.begin(b, 30 + b, 20)
    with pytest.raises(adakv.Error, match="max_row_pages is 16"):
        model.cache.grow([200, 200, 200], 200)
    enlarged = 0
    for new in [[1] * BATCH] * 30 + [[40, 3, 0], [200, 200, 200]] + [[1, 0, 2]] * 20:
        cache, stale = model.cache, model.cache.layer(1).pages
        missing = cache.pages_to_grow(new) - cache.num_free
        if missing > 0:
            cache.reserve(num_pages=2 * cache.num_pages + missing)
            enlarged += 1
            assert stale.data_ptr() != cache.layer(1).pages.data_ptr()
        if cache.row_pages_to_grow(new) > cache.max_row_pages:
            cache.reserve(max_row_pages=cache.row_pages_to_grow(new))
            enlarged += 1
            assert (cache.layer(1).block_table == -1).any()
        model.append(new)
        model.check()
    assert enlarged >= 3
    for b in range(BATCH):
        model.cache.remove(b)
    assert model.cache.num_free == model.cache.num_pages > 70


@pytest.mark.parametrize("value_dim", [DIM, 24], ids=lambda dim: f"Dv{dim}")
def test_reserve_decodes_like_a_cache_that_was_made_large(
    value_dim: int, device: torch.device
) -> None:
    outs = []
    for large in (True, False):
        torch.manual_seed(0)
        cache = KVCache(
            num_layers=1,
            num_sequences=1,
            num_kv_heads=HEADS,
            head_dim=DIM,
            value_dim=value_dim,
            num_pages=200 if large else 8,
            max_row_pages=40 if large else 3,
            page_size=PAGE,
            dtype=torch.float32,
            device=device,
        )
        keys, values = (torch.randn(1, HEADS, 12, dim).to(device) for dim in (DIM, value_dim))
        budgets = torch.full((1, HEADS), 9, dtype=torch.int32, device=device)
        kept = ops.select(torch.rand(1, HEADS, 12).to(device), budgets, window=2)
        ops.compact(keys, values, kept, cache.layer(0), *cache.begin(0, [9 * HEADS], [12]))
        for _ in range(40):
            if cache.pages_to_grow([1]) > cache.num_free:
                cache.reserve(num_pages=2 * cache.num_pages)
            cache.reserve(max_row_pages=cache.row_pages_to_grow([1]))
            cache.grow([1], 1)
            schedule = ops.plan(*cache.plan_inputs, page_size=PAGE)
            q, k, v = (torch.randn(1, HEADS, 1, dim).to(device) for dim in (DIM, DIM, value_dim))
            outs.append(ops.attend(q, cache.layer(0), schedule[0], keys=k, values=v)[0])
    assert all(torch.equal(a, b) for a, b in zip(outs[:40], outs[40:], strict=True))


def test_reserve_refuses_and_changes_nothing() -> None:
    cache = KVCache(
        num_layers=1,
        num_sequences=1,
        num_kv_heads=1,
        head_dim=256,
        page_size=256,
        num_pages=4,
        max_row_pages=4,
        dtype=torch.float32,
    )
    pages = cache.layer(0).pages
    with pytest.raises(adakv.Error, match="memory"):
        cache.reserve(num_pages=2**31 - 1, max_row_pages=8)
    with pytest.raises(ValueError, match="max_row_pages must not be negative, got -1"):
        cache.reserve(num_pages=8, max_row_pages=-1)
    cache.reserve(num_pages=2)
    assert (cache.num_pages, cache.max_row_pages, cache.num_free) == (4, 4, 4)
    assert cache.layer(0).pages.data_ptr() == pages.data_ptr()


@pytest.mark.parametrize(
    ("kv_dtype", "factor"),
    [
        ("auto", 1.0),
        ("int8", 16 / 8.5),
        ("fp8", 16 / 8.25),
        ("int4", 2 * 16 / (4.5 + 5)),
        ("int2", 16 / 3),
    ],
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_entries_in_the_bytes_of_one_in_16_bits(kv_dtype: str, factor: float, head_dim: int):
    """As codes and 16-bit scales and zeros of 64 numbers count; keys of int4 and int2, and
    values of int2 have them for 32."""
    sizes = {
        kind: KVCache(
            num_layers=1,
            num_sequences=1,
            num_kv_heads=1,
            head_dim=head_dim,
            num_pages=1,
            max_row_pages=1,
            page_size=32,
            kv_dtype=kind,
        ).page_bytes
        - 32 * 4  # of positions
        for kind in ("auto", kv_dtype)
    }
    assert sizes["auto"] / sizes[kv_dtype] == pytest.approx(factor)


@pytest.mark.parametrize(
    ("kv_dtype", "entry_bytes"),
    [("auto", 2 * (192 + 128)), ("int8", 192 + 128 + 4 * 5), ("fp8", 192 + 128 + 2 * 5)],
)
def test_values_take_the_bytes_of_their_own_width(kv_dtype: str, entry_bytes: int) -> None:
    """Scales and zeros of 3 groups of a key and 2 of a value."""
    sizes: dict[str, Any] = {"num_layers": 1, "num_sequences": 1, "num_kv_heads": 1}
    sizes |= {"num_pages": 3, "max_row_pages": 1, "page_size": 32, "kv_dtype": kv_dtype}
    cache = KVCache(head_dim=192, value_dim=128, **sizes)
    assert cache.page_bytes == 32 * (entry_bytes + 4)
    layer = cache.layer(0)
    assert layer.pages.shape == (3, 1, 32, 192)
    assert layer.values.shape == (3, 32, 128)


def test_int4_holds_values_that_are_as_wide_as_keys() -> None:
    sizes = {"num_layers": 1, "num_sequences": 1, "num_kv_heads": 1, "num_pages": 1}
    with pytest.raises(ValueError, match="int4 take values that are as wide as keys, got 128 and"):
        KVCache(head_dim=192, value_dim=128, max_row_pages=1, kv_dtype="int4", **sizes)
    with pytest.raises(ValueError, match="value_dim"):
        KVCache(head_dim=192, value_dim=0, max_row_pages=1, **sizes)
