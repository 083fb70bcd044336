"""Choosing again while texts are written, against lists of entries and float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import reference
from adakv import ops
from adakv.cache import KVCache
from adakv.policy import Adaptive, ModelWide, Policy, TopScore, Uniform, WindowAttention
from adakv.reselection import Reselection, Rule
from adakv.step import Attention, PlannedStep

LAYERS, HEADS, GROUP, DIM, WINDOW, BUDGET, EVERY = 2, 3, 2, 16, 4, 10, 6
ATTENTION = Attention(scale=0.5)


class Lists:
    """What rows hold ``[L][B][Hkv]``, as lists of (position, key, value), and all queries."""

    def __init__(self, lengths: list[int], kept: Tensor, keys: Tensor, values: Tensor) -> None:
        self.prompt_lens = lengths
        self.seen = list(lengths)
        self.rows = [
            [
                [
                    [(t, keys[layer, b, h, t], values[layer, b, h, t]) for t in range(n) if k[t]]
                    for h, k in enumerate(kept[layer, b])
                ]
                for b, n in enumerate(lengths)
            ]
            for layer in range(LAYERS)
        ]
        self.queries: list[list[list[Tensor]]] = [[[] for _ in lengths] for _ in range(LAYERS)]
        self.in_prompt: dict[tuple[int, int], int] = {}  # by layer and sequence

    def append(self, layer: int, b: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        """One token: query ``[Hq, D]``, key and value ``[Hkv, D]``."""
        for h, row in enumerate(self.rows[layer][b]):
            row.append((self.seen[b], key[h], value[h]))
        self.queries[layer][b].append(query)

    def attend(self, layer: int, b: int, query: Tensor) -> Tensor:
        """``[Hq, D]``: over what the rows hold."""
        outs = []
        for q, vector in enumerate(query):
            row = self.rows[layer][b][q // GROUP]
            keys, values = (torch.stack([entry[i] for entry in row]).double() for i in (1, 2))
            outs.append((keys @ vector.double() * 0.5).softmax(0) @ values)
        return torch.stack(outs)

    def scored(
        self, layer: int, b: int, pins_prompt: bool
    ) -> tuple[list[list[tuple[float, int]]], list[set[int]]]:
        """Scores and places of what competes in each head, and what stays; the newest do."""
        queries = torch.stack(self.queries[layer][b][-WINDOW:], 1).double()  # [Hq, W, D]
        scores: list[list[tuple[float, int]]] = []  # of each head, of what competes
        stays = []
        prompt = self.prompt_lens[b] if pins_prompt else 0
        for h, row in enumerate(self.rows[layer][b]):
            keys = torch.stack([key for _, key, _ in row]).double()
            of_row = reference.score(
                queries[None, h * GROUP : (h + 1) * GROUP],
                keys[None, None],
                scale=0.5,
                dtype=torch.float64,
            )[0, 0].tolist()
            places = [i for i in range(len(row) - WINDOW) if row[i][0] >= prompt]
            scores.append([(of_row[i], i) for i in places])
            stays.append({*range(len(row))} - {*places})
        text = self.seen[b] - self.prompt_lens[b]
        held = sum(len(row) for row in self.rows[layer][b])
        self.in_prompt.setdefault((layer, b), held - HEADS * text)
        return scores, stays

    def choose(self, layer: int, b: int, floor: float | None, pins_prompt: bool) -> None:
        """Ada-KV's shares of what competes."""
        scores, stays = self.scored(layer, b, pins_prompt)
        budget = BUDGET - WINDOW
        if not pins_prompt:
            budget += self.in_prompt[layer, b] // HEADS
        shares = [float(budget)] * HEADS
        if floor is not None:
            ranked = sorted((-s, i, h) for h, row in enumerate(scores) for s, i in row)
            best = ranked[: HEADS * budget]
            wins = [sum(h == head for _, _, h in best) for head in range(HEADS)]
            shares = [(1 - floor) * win + floor * budget for win in wins]
        counts = reference.largest_remainder(shares, HEADS * budget)
        for h, (row, count) in enumerate(zip(scores, counts, strict=True)):
            best = {i for _, i in sorted((-s, i) for s, i in row)[:count]}
            self.keep(layer, b, h, stays[h] | best)

    def choose_in_all_layers(self, b: int, pins_prompt: bool) -> None:
        """The best of what competes in all layers."""
        layers = [self.scored(layer, b, pins_prompt) for layer in range(LAYERS)]
        budget = BUDGET - WINDOW
        if not pins_prompt:
            budget += sum(self.in_prompt[layer, b] for layer in range(LAYERS)) // LAYERS // HEADS
        ranked = sorted(
            (-s, i, layer, h)
            for layer, (scores, _) in enumerate(layers)
            for h, row in enumerate(scores)
            for s, i in row
        )
        best = ranked[: LAYERS * HEADS * budget]
        for layer, (_, stays) in enumerate(layers):
            for h in range(HEADS):
                mine = {i for _, i, of_layer, of_head in best if (of_layer, of_head) == (layer, h)}
                self.keep(layer, b, h, stays[h] | mine)

    def keep(self, layer: int, b: int, h: int, places: set[int]) -> None:
        row = self.rows[layer][b][h]
        self.rows[layer][b][h] = [row[i] for i in sorted(places)]


def check(kv: KVCache, lists: Lists) -> None:
    for layer in range(LAYERS):
        for b, rows in enumerate(kv.positions(layer)):
            held = [[position for position, _, _ in row] for row in lists.rows[layer][b]]
            assert [row.tolist() for row in rows] == held, (layer, b)
    assert kv.layer(0).seen.tolist() == lists.seen


def begin(lengths: list[int], kv_dtype: str = "auto") -> tuple[KVCache, Lists]:
    """A cache in whose rows half of each prompt is, and the same in lists."""
    kv = KVCache(
        num_layers=LAYERS,
        num_sequences=len(lengths),
        num_kv_heads=HEADS,
        head_dim=DIM,
        num_pages=200,
        max_row_pages=40,
        page_size=8,
        dtype=torch.float32 if kv_dtype == "auto" else torch.bfloat16,
        kv_dtype=kv_dtype,
    )
    shape = LAYERS, len(lengths), HEADS, max(lengths), DIM
    keys, values = torch.randn(shape).to(kv.dtype), torch.randn(shape).to(kv.dtype)
    kept = torch.rand(shape[:4]) < 0.5
    kept[..., :2] = True
    for layer in range(LAYERS):
        places = [k[:n].nonzero()[:, 0] for b, n in enumerate(lengths) for k in kept[layer, b]]
        indptr = torch.tensor([0, *map(len, places)]).cumsum(0, dtype=torch.int32)
        totals = indptr[HEADS::HEADS].diff(prepend=indptr[:1]).tolist()
        chosen = ops.Kept(torch.cat(places).int(), indptr)
        ops.compact(
            keys[layer],
            values[layer],
            chosen,
            kv.layer(layer),
            *kv.begin(layer, totals, lengths),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
        )
    return kv, Lists(lengths, kept, keys, values)


@pytest.mark.parametrize("pins_prompt", [True, False])
@pytest.mark.parametrize(
    "allocator", [Uniform(), Adaptive(floor=0.2), ModelWide()], ids=lambda x: type(x).__name__
)
@pytest.mark.parametrize("steps", [[1] * 60, [3, 1, 1, 9, 1, 1, 20, 5, *[1] * 20]])
def test_rows_go_back_to_their_budget(
    pins_prompt: bool, allocator: Uniform | Adaptive | ModelWide, steps: list[int]
) -> None:
    torch.manual_seed(3)
    lengths = [23, 14]
    kv, lists = begin(lengths)
    check(kv, lists)
    policy = Policy(WindowAttention(window=WINDOW), allocator, TopScore())
    rule = Rule(policy, BUDGET, every=EVERY, pins_prompt=pins_prompt)
    text = Reselection(rule, lengths, [ATTENTION] * LAYERS)
    written = left = 0
    for number, columns in enumerate(steps):
        num_new = [columns, columns - number % 2 if columns > 1 else 1]
        text.begin_step(num_new, columns)
        step = PlannedStep.grow(kv, num_new, columns, watcher=text.recent)
        for layer in range(LAYERS):
            q = torch.randn(2, HEADS * GROUP, columns, DIM)
            k, v = torch.randn(2, 2, HEADS, columns, DIM)
            out = step.attend(layer, q, k, v, ATTENTION)
            for b, count in enumerate(num_new):
                for s in range(columns - count, columns):
                    lists.append(layer, b, q[b, :, s], k[b, :, s], v[b, :, s])
                    lists.seen[b] += 1
                    expected = lists.attend(layer, b, q[b, :, s])
                    torch.testing.assert_close(out[b, s].double(), expected, atol=2e-5, rtol=0)
                lists.seen[b] -= count
        lists.seen = [n + new for n, new in zip(lists.seen, num_new, strict=True)]
        written, left = written + columns, left + columns
        assert text.is_due == (left >= BUDGET + EVERY)
        if text.is_due:
            text.choose(kv, slice(0, 2))
            left = BUDGET
            for b in range(2):
                if allocator.is_model_wide:
                    lists.choose_in_all_layers(b, pins_prompt)
                    continue
                for layer in range(LAYERS):
                    lists.choose(layer, b, getattr(allocator, "floor", None), pins_prompt)
        check(kv, lists)
    assert written > left
    for sequence in range(2):
        kv.remove(sequence)
    assert kv.pages_used == 0


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_what_stays_in_quantised_pages_is_what_it_was(kv_dtype: str) -> None:
    """Codes and scales of entries that stay differ by no more than rounding them twice does."""
    torch.manual_seed(4)
    kv, _ = begin([40], kv_dtype)
    rule = Rule(Policy(WindowAttention(window=WINDOW), Adaptive(), TopScore()), BUDGET, every=EVERY)
    text = Reselection(rule, [40], [ATTENTION] * LAYERS)
    for _ in range(BUDGET + EVERY):
        text.begin_step([1], 1)
        step = PlannedStep.grow(kv, [1], 1, watcher=text.recent)
        for layer in range(LAYERS):
            q = torch.randn(1, HEADS * GROUP, 1, DIM).to(kv.dtype)
            step.attend(layer, q, *torch.randn(2, 1, HEADS, 1, DIM).to(kv.dtype), ATTENTION)
    held = [entries_by_position(kv, layer) for layer in range(LAYERS)]
    text.choose(kv, slice(0, 1))
    for layer, before in enumerate(held):
        for row, entries in zip(entries_by_position(kv, layer), before, strict=True):
            assert len(row) < len(entries)
            for position, entry in row.items():
                step_size = 2 / 255 if kv_dtype == "int8" else 2**-3
                error = (entry - entries[position]).abs().max()
                assert error <= entries[position].abs().max() * step_size


def entries_by_position(kv: KVCache, layer: int) -> list[dict[int, Tensor]]:
    """Key and value of each row by position."""
    view, rows = kv.layer(layer), []
    for pages, positions in zip(view.block_table[0], kv.positions(layer)[0], strict=True):
        entries = torch.stack(reference.entries_of(view, pages[pages >= 0]), 1)  # [n, 2, D]
        rows.append(dict(zip(positions.tolist(), entries, strict=False)))
    return rows
