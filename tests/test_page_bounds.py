"""Sparse reads over real pages: what a step lists and gives is what the definition says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from adakv import ops
from adakv.cache import KVCache
from adakv.formats import has_tails
from adakv.page_bounds import PageBounds
from adakv.policy import Quest
from adakv.step import Attention, PlannedStep
from listed_pages import listed_pages
from tolerance import assert_close

LAYERS, SEQUENCES, KV_HEADS, GROUP, DIM = 2, 2, 2, 3, 64
FORMATS = [
    (torch.float32, "auto"),
    (torch.bfloat16, "auto"),
    (torch.bfloat16, "int8"),
    (torch.float16, "fp8"),
    (torch.bfloat16, "int4"),
    (torch.bfloat16, "int2"),
]


class Text:
    """Two sequences whose rows hold unequally much of their prompts."""

    def __init__(self, device: torch.device, dtype: torch.dtype, kv_dtype: str, quest: Quest):
        if has_tails(kv_dtype) and device.type == "cuda":
            pytest.skip("pages with tails are for the CPU")
        self.kv = KVCache(
            num_layers=LAYERS, num_sequences=SEQUENCES, num_kv_heads=KV_HEADS, head_dim=DIM,
            num_pages=400, max_row_pages=40, dtype=dtype, kv_dtype=kv_dtype, device=device,
        )  # fmt: skip
        self.seen, self.quest, self.bounds = [400, 300], quest, PageBounds(quest)
        self.attention = Attention(scale=0.3)
        for layer in range(LAYERS):
            self.compact(layer)

    def compact(self, layer: int) -> None:
        """Rows keep the last 400, 70, 9 and 250 of their entries."""
        counts = [400, 70, 9, 250]
        longest = max(self.seen)
        keys, values = (self.random(SEQUENCES, KV_HEADS, longest, DIM) for _ in range(2))
        starts = [longest - n for n in counts]
        rows = [torch.arange(start, longest, dtype=torch.int32) for start in starts]
        indptr = torch.tensor([0, *counts]).cumsum(0, dtype=torch.int32)
        kept = ops.Kept(*(x.to(self.kv.device) for x in (torch.cat(rows), indptr)))
        ids = self.kv.begin(layer, [470, 259], [400, 250])
        ops.compact(keys, values, kept, self.kv.layer(layer), *ids)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float32).to(self.kv.device, self.kv.dtype)

    def step(self, num_new: list[int], columns: int) -> list[tuple[Tensor, Tensor]]:
        """Queries and results ``[B, Hq, S, D]`` of each layer."""
        self.bounds.begin_step(self.kv, self.seen, num_new, columns)
        step = PlannedStep.grow(self.kv, num_new, columns, reader=self.bounds)
        self.seen = [n + new for n, new in zip(self.seen, num_new, strict=True)]
        found = []
        for layer in range(LAYERS):
            queries = self.random(SEQUENCES, KV_HEADS * GROUP, columns, DIM)
            new = (self.random(SEQUENCES, KV_HEADS, columns, DIM) for _ in range(2))
            out = step.attend(layer, queries, *new, self.attention)
            found.append((queries, out.transpose(1, 2)))
        return found

    def expected(
        self, layer: int, queries: Tensor, num_new: list[int], dtype: torch.dtype
    ) -> tuple[Tensor, int]:
        """Attention over the listed pages of each row, and how many pages these are."""
        view = self.kv.layer(layer)
        columns, page_size = queries.shape[2], self.kv.page_size
        out, count = torch.zeros(queries.shape, dtype=dtype), 0
        # A step over all entries reads a page with a tail before its one token fills it.
        just_filled = columns == 1 and layer < self.quest.full_layers
        for b, new in enumerate(num_new):
            for h in range(KV_HEADS if new else 0):
                keys, values = reference.row_of(view, b, h, dtype, just_filled=just_filled)
                asked = queries[b, GROUP * h : GROUP * (h + 1)].cpu()
                padded = asked[:, columns - new :]
                padded = torch.cat([padded[:, :1]] * (columns - new) + [padded], 1)
                pages = range(-(-len(keys) // page_size))
                if layer >= self.quest.full_layers:
                    pages = listed_pages(  # type: ignore[assignment]
                        padded, self.rounded(keys), page_size=page_size,
                        share=self.quest.share, mass=self.quest.mass, least=self.quest.least,
                        newest=self.quest.newest, scale=self.attention.scale,
                    )  # fmt: skip
                count += len(pages)
                slots = torch.tensor(
                    [s for p in pages for s in range(p * page_size, (p + 1) * page_size)]
                )
                slots = slots[slots < len(keys)]
                for s in range(columns - new, columns):
                    visible = slots[slots < len(keys) - columns + s + 1]
                    z = asked[:, s].to(dtype) @ keys[visible].mT * self.attention.scale
                    out[b, GROUP * h : GROUP * (h + 1), s] = z.softmax(-1) @ values[visible]
        return out, count

    def rounded(self, keys: Tensor) -> Tensor:
        """As bounds hold them."""
        return keys.to(self.kv.dtype).double()

    def check(self, num_new: list[int], columns: int) -> int:
        """Pages that were read."""
        count = 0
        for layer, (queries, out) in enumerate(self.step(num_new, columns)):
            expected, read = self.expected(layer, queries, num_new, torch.float64)
            baseline, _ = self.expected(layer, queries, num_new, self.kv.dtype)
            assert_close(out, expected, baseline, f"layer {layer}")
            count += read
        return count


@pytest.mark.parametrize(("dtype", "kv_dtype"), FORMATS, ids=str)
@pytest.mark.parametrize(
    "quest",
    [Quest(share=0.25, least=2, full_layers=1), Quest(share=0.5, mass=0.7, full_layers=0)],
    ids=str,
)
def test_steps_read_what_the_definition_lists(
    device: torch.device, dtype: torch.dtype, kv_dtype: str, quest: Quest
) -> None:
    """One token a step until every row has begun pages, then several; one sequence may rest."""
    text = Text(device, dtype, kv_dtype, quest)
    for _ in range(40):
        text.step([1, 1], 1)
    text.check([1, 1], 1)
    text.check([5, 2], 5)
    text.check([1, 0], 1)
    read = text.check([1, 1], 1)
    assert read < int((-(-text.kv.all_layers.lengths // text.kv.page_size)).sum())


@pytest.mark.parametrize(("dtype", "kv_dtype"), FORMATS, ids=str)
def test_all_pages_listed_is_full_attention(
    device: torch.device, dtype: torch.dtype, kv_dtype: str
) -> None:
    texts = []
    for quest in (Quest(share=1.0, full_layers=0), Quest(share=0.1, full_layers=LAYERS)):
        torch.manual_seed(0)
        text = Text(device, dtype, kv_dtype, quest)
        texts.append([text.step([1, 1], 1) for _ in range(3)] + [text.step([4, 3], 4)])
    for listed, full in zip(*texts, strict=True):
        for (_, a), (_, b) in zip(listed, full, strict=True):
            torch.testing.assert_close(a, b)


def test_a_wide_step_reads_everything_and_what_follows_knows_of_it(device: torch.device) -> None:
    text = Text(device, torch.float32, "auto", Quest(share=0.2, least=0, full_layers=0))
    text.step([1, 1], 1)
    text.step([40, 33], 40)
    text.check([1, 1], 1)


def test_bounds_are_found_again_where_rows_have_changed(device: torch.device) -> None:
    """A larger pool, other rows of the same length, and pages that are overwritten."""
    text = Text(device, torch.float32, "auto", Quest(share=0.2, least=0, full_layers=0))
    text.step([1, 1], 1)
    text.kv.reserve(num_pages=800, max_row_pages=60)
    text.check([1, 1], 1)
    text.kv.all_layers.pages.mul_(-1)
    text.bounds.forget()
    text.check([1, 1], 1)
    text.kv = text.kv.fork([1, 0])
    text.seen = text.seen[::-1]
    text.check([1, 1], 1)


def test_only_what_is_listed_is_read(device: torch.device) -> None:
    """Values that were not listed may be anything."""
    text = Text(device, torch.float32, "auto", Quest(share=0.2, least=0, full_layers=0))
    text.step([1, 1], 1)
    text.bounds.begin_step(text.kv, text.seen, [1, 1], 1)
    step = PlannedStep.grow(text.kv, [1, 1], 1, reader=text.bounds)
    listed: list[Any] = []

    class Watched(PageBounds):
        def listed(self, *given: Any) -> ops.Layer:
            view = text.bounds.listed(*given)
            listed.append(view)
            spoilt = torch.ones(len(view.pages), dtype=torch.bool, device=device)
            spoilt[view.block_table[view.block_table >= 0].long()] = False
            view.pages[spoilt] = torch.nan
            return view

        def reads_some(self, layer: int) -> bool:
            return True

    step = PlannedStep(text.kv.layers, step.schedules, reader=Watched(text.quest))
    queries = text.random(SEQUENCES, KV_HEADS * GROUP, 1, DIM)
    new = (text.random(SEQUENCES, KV_HEADS, 1, DIM) for _ in range(2))
    assert step.attend(0, queries, *new, text.attention).isfinite().all()
    assert int(listed[0].lengths.sum()) < int(text.kv.layer(0).lengths.sum()) / 2


def test_a_step_is_planned_and_attends_in_a_compiled_graph(device: torch.device) -> None:
    quest = Quest(share=0.25, least=2, full_layers=1)
    text = Text(device, torch.bfloat16, "auto", quest)
    text.bounds.begin_step(text.kv, text.seen, [1, 1], 1)
    text.kv.grow([1, 1], 1)
    new = [text.random(SEQUENCES, heads, 1, DIM) for heads in (KV_HEADS * GROUP, *[KV_HEADS] * 2)]

    def step(*new: Tensor) -> list[Tensor]:
        planned = PlannedStep.plan(text.kv.layers, text.kv.plan_inputs, reader=text.bounds)
        return [planned.attend(layer, *new, text.attention) for layer in range(LAYERS)]

    before = text.kv.all_layers.lengths.clone()
    expected = step(*new)
    text.kv.all_layers.lengths.copy_(before)
    found = torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager")(*new)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
