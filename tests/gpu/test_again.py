"""Choosing again on a GPU: the verbs in a CUDA graph, and texts that are chosen from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cases
from adakv import ops
from adakv.cache import KVCache
from adakv.ops import Kept
from adakv.policy import get
from adakv.reselection import Reselection, Rule
from adakv.step import Attention, PlannedStep
from cases import int32

pytestmark = pytest.mark.gpu

LAYERS, BATCH, HEADS, GROUP, DIM, HELD, BUDGET, WINDOW = 3, 2, 4, 2, 128, 700, 500, 8


def filled(device: str, kv_dtype: str, keys: Tensor, values: Tensor) -> KVCache:
    """A cache whose rows hold all entries ``[L, B, Hkv, T, D]``."""
    kv = KVCache(
        num_layers=LAYERS,
        num_sequences=BATCH,
        num_kv_heads=HEADS,
        head_dim=DIM,
        num_pages=LAYERS * BATCH * HEADS * 60,
        max_row_pages=60,
        kv_dtype=kv_dtype,
        device=device,
    )
    rows = BATCH * HEADS
    kept = Kept(
        int32(list(range(HELD)) * rows, device), int32([HELD * i for i in range(rows + 1)], device)
    )
    for layer in range(LAYERS):
        pages = kv.begin(layer, [HEADS * HELD] * BATCH, [HELD] * BATCH)
        given = keys[layer].to(device), values[layer].to(device)
        ops.compact(*given, kept, kv.layer(layer), *pages)
    return kv


def choose(kv: KVCache, queries: Tensor, page_ids: Tensor, starts: Tensor) -> list[Kept]:
    every = []
    for layer, view in enumerate(kv.layers):
        scores = ops.score(queries[layer], None, view, HELD)
        budgets = ops.allocate(scores, BUDGET, window=WINDOW)
        kept = ops.select(scores, budgets, window=WINDOW, total=BATCH * HEADS * BUDGET)
        ops.compact(None, None, kept, view, page_ids, starts[layer])
        every.append(kept)
    return every


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8"])
def test_choosing_again_in_a_graph_equals_eager(kv_dtype: str) -> None:
    torch.manual_seed(5)
    keys, values = torch.randn(2, LAYERS, BATCH, HEADS, HELD, DIM).bfloat16()
    queries = torch.randn(LAYERS, BATCH, HEADS * GROUP, WINDOW, DIM).bfloat16().cuda()
    totals = [[HEADS * BUDGET] * BATCH] * LAYERS
    eager, recorded = (filled("cuda", kv_dtype, keys, values) for _ in range(2))
    pages = [kv.begin_again(totals, [HELD] * BATCH) for kv in (eager, recorded)]
    expected = choose(eager, queries, *pages[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = choose(recorded, queries, *pages[1])
    graph.replay()
    for layer in range(LAYERS):
        assert all(torch.equal(a, b) for a, b in zip(kept[layer], expected[layer], strict=True))
        cases.assert_same_layer(recorded.layer(layer), eager.layer(layer))
    # The CPU gives the same from what was kept.
    cpu = filled("cpu", kv_dtype, keys, values)
    page_ids, starts = cpu.begin_again(totals, [HELD] * BATCH)
    for layer in range(LAYERS):
        on_cpu = Kept(*(x.cpu() for x in kept[layer]))
        ops.compact(None, None, on_cpu, cpu.layer(layer), page_ids, starts[layer])
        cases.assert_same_layer(recorded.layer(layer), cpu.layer(layer))


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize(
    "policy", ["snapkv", "ada_snapkv", "tova", "streaming", "random", "r_kv", "h2o", "vase"]
)
def test_texts_are_chosen_from_on_a_gpu(policy: str, kv_dtype: str) -> None:
    """Rows stay at their budget, and everything goes back to the pool."""
    torch.manual_seed(6)
    keys, values = torch.randn(2, LAYERS, BATCH, HEADS, HELD, DIM).bfloat16()
    kv = filled("cuda", kv_dtype, keys, values)
    rule = Rule(get(policy), 64, every=32)
    attention = Attention()
    text = Reselection(rule, [HELD] * BATCH, [attention] * LAYERS)
    for _ in range(200):
        text.begin_step([1] * BATCH, 1)
        step = PlannedStep.grow(kv, [1] * BATCH, 1, watcher=text.recent)
        for layer in range(LAYERS):
            q = torch.randn(BATCH, HEADS * GROUP, 1, DIM, device="cuda").bfloat16()
            k, v = torch.randn(2, BATCH, HEADS, 1, DIM, device="cuda").bfloat16()
            assert step.attend(layer, q, k, v, attention).isfinite().all()
        if text.is_due:
            text.choose(kv, slice(0, BATCH))
    held = kv.all_layers.lengths.sum(2)  # [L, B]
    assert held.min() >= HEADS * (HELD + 64) and held.max() <= HEADS * (HELD + 96)
    for b in range(BATCH):
        kv.remove(b)
    assert kv.pages_used == 0
