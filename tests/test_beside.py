"""Reads by a small model over real pages, step by step, against the definitions in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import beside
import foreseen
import reference
from adakv import ops
from adakv.beside import DraftPages, Look, SmallEntries
from adakv.cache import KVCache
from adakv.policy import SmallKV, SpecAttn
from adakv.step import Attention, PageReader, PlannedStep

LAYERS, HEADS, GROUP, DIM, PAGE = 3, 2, 2, 16, 16
SMALL_LAYERS, SMALL_HEADS = 2, 3
ATTENTION = Attention(scale=0.5)


class Looking:
    """A small model of random looks, which has seen what it is told."""

    def __init__(self) -> None:
        self.seen, self.columns = 0, 0
        self.sums = torch.zeros(SMALL_LAYERS, SMALL_HEADS, 0)
        self.weights = torch.empty(0)

    def step(self, columns: int) -> None:
        self.seen, self.columns = self.seen + columns, columns
        size = SMALL_LAYERS, SMALL_HEADS, columns, self.seen
        self.weights = (3 * torch.randn(size)).softmax(-1)
        old = torch.nn.functional.pad(self.sums, (0, columns))
        self.sums = old + self.weights.sum(2)

    def looks(self, seen: int) -> Sequence[Look] | None:
        if seen != self.seen:
            return None
        return [Look(w, s) for w, s in zip(self.weights, self.sums, strict=True)]

    def head_map(self, num_layers: int) -> Sequence[Tensor]:
        count = HEADS * GROUP
        every = torch.arange(num_layers * count) * 5 % (SMALL_LAYERS * SMALL_HEADS)
        return list(every.view(num_layers, count))


class Text:
    """One sequence; without ``whole`` its rows hold unequally much of it."""

    def __init__(
        self,
        device: torch.device,
        length: int,
        *,
        whole: bool,
        of_model: torch.device | None = None,
    ) -> None:
        self.of_model = of_model or device
        self.kv = KVCache(
            num_layers=LAYERS, num_sequences=1, num_kv_heads=HEADS, head_dim=DIM, num_pages=400,
            max_row_pages=60, page_size=PAGE, dtype=torch.float32, device=device,
        )  # fmt: skip
        self.seen, self.looking = length, Looking()
        self.looking.step(length)
        counts = [length, length if whole else length // 2]
        for layer in range(LAYERS):
            keys, values = (self.random(1, HEADS, length, DIM) for _ in range(2))
            rows = [torch.randperm(length)[:n].sort().values.int() for n in counts]
            indptr = torch.tensor([0, *counts]).cumsum(0, dtype=torch.int32)
            kept = ops.Kept(*(x.to(device) for x in (torch.cat(rows), indptr)))
            ids = self.kv.begin(layer, [sum(counts)], [length])
            ops.compact(keys, values, kept, self.kv.layer(layer), *ids)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape).to(self.kv.device, self.kv.dtype)

    def step(self, reader: PageReader, columns: int) -> list[tuple[Tensor, Tensor]]:
        """Queries and results ``[Hq, S, D]`` of each layer."""
        self.looking.step(columns)
        reader.begin_step(self.kv, [self.seen], [columns], columns)
        step = PlannedStep.grow(self.kv, [columns], columns, reader=reader)
        self.seen += columns
        found = []
        for layer in range(LAYERS):
            queries = self.random(1, HEADS * GROUP, columns, DIM).to(self.of_model)
            new = (self.random(1, HEADS, columns, DIM).to(self.of_model) for _ in range(2))
            out = step.attend(layer, queries, *new, ATTENTION)
            found.append((queries[0].double().cpu(), out[0].transpose(0, 1).double().cpu()))
        return found


@pytest.mark.parametrize("columns", [1, 4])
def test_steps_read_the_pages_that_the_draft_looks_at(device: torch.device, columns: int) -> None:
    torch.manual_seed(0)
    read = SpecAttn(small="draft", mass=0.6, layers=(0, 0, 1), least=0, full_layers=1)
    text, left_out = Text(device, 400, whole=False), 0
    reader = DraftPages(read, text.looking)
    for _ in range(6):
        for layer, (queries, out) in enumerate(text.step(reader, columns)):
            weights = text.looking.weights[read.layers[layer]].mean(0).double()
            for h in range(HEADS):
                view = text.kv.layer(layer)
                keys, values = reference.row_of(view, 0, h)
                where = view.page_positions[view.block_table[0, h].clamp(min=0).long()]
                positions = where.flatten()[: len(keys)].tolist()
                pages = beside.draft_pages(weights, positions, page_size=PAGE, mass=0.6)
                if layer < 1:
                    pages = [*range(-(-len(keys) // PAGE))]
                left_out += -(-len(keys) // PAGE) - len(pages)
                slots = [s for p in pages for s in range(p * PAGE, (p + 1) * PAGE)]
                slots = [s for s in slots if s < len(keys)]
                for g in range(GROUP):
                    for s in range(columns):
                        seen = slots[: len(slots) - (columns - 1 - s)]
                        query = queries[GROUP * h + g, s]
                        p = foreseen.attention(query[None], keys[seen], scale=0.5)[0]
                        result = out[GROUP * h + g, s]
                        torch.testing.assert_close(result, p @ values[seen], atol=1e-5, rtol=0)
    assert left_out > 50


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("share", [0.2, 0.7])
@pytest.mark.parametrize("reserve", ["device", "cpu"])
def test_steps_attend_to_some_entries_and_values(
    device: torch.device, reserve: str, share: float, renormalise: bool
) -> None:
    """Also where the cache's pages lie on the CPU, and the model doesn't."""
    torch.manual_seed(0)
    read = SmallKV(small="small", share=share, renormalise=renormalise)
    place = torch.device("cpu") if reserve == "cpu" else device
    text = Text(place, 90, whole=True, of_model=device)
    reader, heads = SmallEntries(read, text.looking), text.looking.head_map(LAYERS)
    came_back, before = 0, {}
    for _ in range(40):
        for layer, (queries, out) in enumerate(text.step(reader, 1)):
            small = (
                x.flatten(0, 1)[heads[layer]] for x in (text.looking.sums, text.looking.weights)
            )
            sums, weights = (x.view(HEADS, GROUP, -1) for x in small)
            for h in range(HEADS):
                keys, values = reference.row_of(text.kv.layer(layer), 0, h)
                expected = beside.small_kv(
                    queries[GROUP * h : GROUP * (h + 1), 0], keys, values, sums[h], weights[h],
                    read.counts(len(keys)), scale=0.5, renormalise=renormalise,
                )  # fmt: skip
                result = out[GROUP * h : GROUP * (h + 1), 0]
                torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
                now = set(reader.attended(layer)[h].tolist())
                ever, last = before.get((layer, h), (set(), set()))
                came_back += len(now & ever - last)
                before[layer, h] = ever | now, now
    assert came_back > 0


@pytest.mark.parametrize("kind", ["pages", "entries"])
def test_everything_is_read_unless_the_small_model_has_seen_it(
    device: torch.device, kind: str
) -> None:
    text = Text(device, 90, whole=True)
    reader: PageReader = SmallEntries(SmallKV(small="x"), text.looking)
    if kind == "pages":
        reader = DraftPages(SpecAttn(small="x", layers=(0, 1, 1)), text.looking)
    reader.begin_step(text.kv, [90], [1], 1)
    assert not reader.reads_some(2)
    text.looking.step(1)
    reader.begin_step(text.kv, [90], [1], 1)
    assert reader.reads_some(2)
    text.looking.step(PAGE + 1)
    reader.begin_step(text.kv, [91], [PAGE + 1], PAGE + 1)
    assert not reader.reads_some(2)
