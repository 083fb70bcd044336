"""Reads by what steps looked at: over real pages, step by step, against lists and float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import foreseen
import listed_pages
import reference
from adakv import ops
from adakv.cache import KVCache
from adakv.page_history import PageHistory
from adakv.policy import AttentionPredictor
from adakv.step import Attention, PlannedStep
from predictor_file import predictor_file

LAYERS, HEADS, GROUP, DIM, PAGE = 2, 2, 2, 16, 16
ATTENTION = Attention(scale=0.5)
COUNTS = [200, 90, 9, 250]  # entries of the rows of two sequences


class Text:
    """Two sequences whose rows hold unequally much, and the history of each as lists."""

    def __init__(self, device: torch.device, kv_dtype: str, predictor: AttentionPredictor) -> None:
        dtype = torch.float32 if kv_dtype == "auto" else torch.bfloat16
        size = None if kv_dtype == "int4" else PAGE
        self.kv = KVCache(
            num_layers=LAYERS, num_sequences=2, num_kv_heads=HEADS, head_dim=DIM, num_pages=400,
            max_row_pages=40, page_size=size, dtype=dtype, kv_dtype=kv_dtype, device=device,
        )  # fmt: skip
        self.predictor, self.history = predictor, PageHistory(predictor)
        self.seen = [250, 250]
        self.looked: dict[tuple[int, int], list[list[Tensor]]] = {}  # of layer and row, by step
        for layer in range(LAYERS):
            keys, values = (self.random(2, HEADS, 250, DIM) for _ in range(2))
            rows = [torch.arange(250 - n, 250, dtype=torch.int32) for n in COUNTS]
            indptr = torch.tensor([0, *COUNTS]).cumsum(0, dtype=torch.int32)
            kept = ops.Kept(*(x.to(device) for x in (torch.cat(rows), indptr)))
            ids = self.kv.begin(layer, [290, 259], [200, 250])
            ops.compact(keys, values, kept, self.kv.layer(layer), *ids)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape).to(self.kv.device, self.kv.dtype)

    def step(self) -> list[tuple[Tensor, Tensor]]:
        """Queries ``[B, Hq, 1, D]`` and results of each layer."""
        self.history.begin_step(self.kv, self.seen, [1, 1], 1)
        step = PlannedStep.grow(self.kv, [1, 1], 1, reader=self.history)
        self.seen = [n + 1 for n in self.seen]
        found = []
        for layer in range(LAYERS):
            queries = self.random(2, HEADS * GROUP, 1, DIM)
            new = (self.random(2, HEADS, 1, DIM) for _ in range(2))
            out = step.attend(layer, queries, *new, ATTENTION)
            found.append((queries.double().cpu(), out.transpose(1, 2).double().cpu()))
        return found

    def check(self, number: int, weights: dict[str, Tensor], tolerance: float) -> int:
        """The step of that number, from 0 on: how many pages it left out."""
        left_out = 0
        for layer, (queries, out) in enumerate(self.step()):
            for row in range(4 if layer >= self.predictor.full_layers else 0):
                b, h = divmod(row, HEADS)
                keys, values = reference.row_of(self.kv.layer(layer), b, h)
                asked = queries[b, GROUP * h : GROUP * (h + 1), 0]
                looked = self.looked.setdefault((layer, row), [[] for _ in range(GROUP)])
                pages = self.expected(number, looked, len(keys), weights)
                slots = [s for p in pages for s in range(p * PAGE, (p + 1) * PAGE) if s < len(keys)]
                left_out += -(-len(keys) // PAGE) - len(pages)
                for g, query in enumerate(asked):
                    p = foreseen.attention(query[None], keys[slots], scale=0.5)[0]
                    result = out[b, GROUP * h + g, 0]
                    torch.testing.assert_close(result, p @ values[slots], atol=tolerance, rtol=0)
                    most = torch.zeros(40, dtype=torch.float64)
                    rounded = keys[slots].to(self.kv.dtype)  # as codes are read out
                    p = foreseen.attention(query[None], rounded, scale=0.5)[0]
                    for slot, weight in zip(slots, p, strict=True):
                        most[slot // PAGE] = most[slot // PAGE].maximum(weight)
                    looked[g].append(most)
        return left_out

    def expected(
        self, number: int, looked: list[list[Tensor]], length: int, weights: dict[str, Tensor]
    ) -> list[int]:
        """The pages of a row that the step of that number reads."""
        of = self.predictor
        behind = number - of.history
        if behind < 0 or (behind + 1) % of.every == 0:
            return [*range(-(-length // PAGE))]
        history = torch.stack([torch.stack(steps[-of.history :]) for steps in looked])
        how = {name: getattr(of, name) for name in ("share", "least", "first", "newest")}
        return listed_pages.foretold_pages(history, length, weights, page_size=PAGE, **how)


@pytest.mark.parametrize(("kv_dtype", "tolerance"), [("auto", 1e-5), ("int8", 2e-2)])
def test_steps_read_what_the_definition_lists(
    tmp_path: Path, device: torch.device, kv_dtype: str, tolerance: float
) -> None:
    """Whole for the first 6 steps, then foretold, and every third step whole."""
    path, weights = predictor_file(tmp_path)
    predictor = AttentionPredictor(
        file=path, share=0.4, first=1, newest=2, least=3, history=6, every=3, full_layers=1
    )
    text = Text(device, kv_dtype, predictor)
    left_out = [text.check(number, weights, tolerance) for number in range(24)]
    assert left_out[:6] == [0] * 6
    assert all((n == 0) == (i % 3 == 2) for i, n in enumerate(left_out[6:]))


@pytest.mark.parametrize("kv_dtype", ["auto", "int4"])
def test_all_pages_listed_is_full_attention(
    tmp_path: Path, device: torch.device, kv_dtype: str
) -> None:
    if kv_dtype == "int4" and device.type == "cuda":
        pytest.skip("int4 is for the CPU")
    path, _ = predictor_file(tmp_path)
    found = []
    for full_layers in (0, LAYERS):
        torch.manual_seed(0)
        how = {"share": 1.0, "history": 2, "full_layers": full_layers}
        text = Text(device, kv_dtype, AttentionPredictor(file=path, **how))  # type: ignore[arg-type]
        found.append([text.step() for _ in range(5)])  # in which no page of int4 is filled
    for listed, full in zip(*found, strict=True):
        for (_, a), (_, b) in zip(listed, full, strict=True):
            torch.testing.assert_close(a, b)


def test_a_history_begins_anew_where_rows_have_changed(
    tmp_path: Path, device: torch.device
) -> None:
    path, _ = predictor_file(tmp_path)
    text = Text(device, "auto", AttentionPredictor(file=path, history=2, full_layers=0))
    for _ in range(3):
        text.step()
    assert text.history._steps == 3
    text.seen[0] -= 1  # one was taken back
    text.step()
    assert text.history._steps == 1
    text.history.begin_step(text.kv, text.seen, [2, 2], 2)  # a step of several tokens
    assert not text.history.reads_some(0)
    text.history.begin_step(text.kv, text.seen, [1, 0], 1)  # one of the sequences rests
    assert not text.history.reads_some(0)
    text.step()
    assert text.history._steps == 1
