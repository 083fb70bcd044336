"""Budgets that cross tensor-parallel ranks, played in one process; vLLM isn't needed."""

from __future__ import annotations

import random
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import reference
from adakv.policy import Adaptive, LayerInputs, Policy, get
from adakv.vllm.config import Settings
from adakv.vllm.ledger import Ledger, LedgerScheduler, path_of
from adakv.vllm.metadata import batch_of
from adakv.vllm.plan import Order, Scheduler, most_kept_blocks
from adakv.vllm.ranks import Across, AllRanks, OneReader, can_cross, within
from engine_steps import BLOCK, BUDGET, HEADS, LAYERS, NUM_BLOCKS, Steps, run_step
from per_rank import AcrossRanks

WINDOW = 8


def num_pages(entries: int, page_size: int) -> int:
    return -(-entries // page_size)


@pytest.mark.parametrize("seed", range(30))
def test_a_rank_keeps_what_it_has_room_for(device: torch.device, seed: int):
    """All of it if it fits; else rows give up the same share of their pages above the mean budget,
    and every page is used."""
    rng = random.Random(seed)
    size, rows = rng.choice([1, 8, 16, 32]), rng.choice([1, 3, 24])
    budgets = tuple(rng.randint(8, 300) for _ in range(2))
    wanted = [
        [max(1, int(budget * rng.choice([0.5, 1, 1, 2]) * rng.random() * 2)) for _ in range(rows)]
        for budget in budgets
    ]
    counts = torch.tensor(wanted, dtype=torch.int32, device=device)
    found = within(counts, budgets, size)
    assert found.dtype == torch.int32
    for budget, asked, kept in zip(budgets, wanted, found.tolist(), strict=True):
        room = rows * most_kept_blocks(budget=budget, block_size=size, num_kv_heads=None)
        pages = [num_pages(n, size) for n in asked]
        if sum(pages) <= room:
            assert kept == asked
            continue
        even = [num_pages(min(n, budget), size) for n in asked]
        share = (room - sum(even)) / (sum(pages) - sum(even))
        held = [num_pages(n, size) for n in kept]
        assert sum(held) == room
        for n, k, h, p, e in zip(asked, kept, held, pages, even, strict=True):
            assert min(n, budget) <= k <= n
            assert abs(h - e - share * (p - e)) < 1 and k in (n, h * size)


def inputs_of(scores: Tensor, heads: int, layers: int) -> LayerInputs:
    batch, _, length = scores.shape
    entries = torch.zeros(batch, heads, length, 8, device=scores.device)
    return LayerInputs(entries, entries, entries, None, (length,) * batch, 0, layers)


@pytest.mark.parametrize("inner", [Adaptive(), Adaptive(0.0), Adaptive(0.5, "hard_floor")])
@pytest.mark.parametrize(("ranks", "heads"), [(2, 1), (2, 3), (4, 2)])
def test_ranks_together_have_the_budgets_of_one(
    device: torch.device, inner: Adaptive, ranks: int, heads: int
):
    """Those of a layer with all heads, equal scores included; but for what a rank has no room for,
    which is seen where one has the better scores in all layers."""
    torch.manual_seed(0)
    layers, batch, length, budget = 5, 2, 300, 100
    scores = torch.rand(layers, batch, ranks * heads, length, device=device)
    scores = (scores * 20).round()  # equal ones
    for unequal in (False, True):
        if unequal:
            scores[:, :, :heads] += 20
        of_ranks = scores.unflatten(2, (ranks, heads)).permute(2, 1, 0, 3, 4).flatten(2, 3)
        whole = torch.stack(
            [
                reference.allocate(
                    x, budget, window=WINDOW, floor=inner.floor, safeguard=inner.safeguard
                )
                for x in scores.cpu()
            ],
            1,
        ).unflatten(2, (ranks, heads))  # [B, L, ranks, heads]
        for rank, own in enumerate(of_ranks):
            allocator = AllRanks(inner, BLOCK, Across(rank, lambda _, x=of_ranks: x))
            inputs = inputs_of(own, heads, layers)
            found = allocator.allocate(own, inputs, (budget,) * batch, window=WINDOW).cpu()
            asked = whole[:, :, rank].flatten(1)
            pages = (asked + BLOCK - 1) // BLOCK
            room = (
                layers
                * heads
                * most_kept_blocks(budget=budget, block_size=BLOCK, num_kv_heads=None)
            )
            fits = bool((pages.sum(1) <= room).all())
            assert fits == (not unequal or rank > 0)
            assert fits == torch.equal(found, asked)
            total = allocator.total(
                budget, window=WINDOW, prompt_len=length, num_kv_heads=layers * heads
            )
            assert (found <= asked).all() and (found.sum(1) <= total).all()


def test_the_emulation_of_all_ranks_is_what_each_of_them_keeps():
    torch.manual_seed(1)
    ranks, heads, layers, budgets = 2, 2, 3, (40, 40)
    scores = torch.rand(2, layers * ranks * heads, 150)  # layer by layer
    found = AcrossRanks(Adaptive(), ranks, BLOCK).allocate(
        scores, inputs_of(scores, ranks * heads, layers), budgets, window=WINDOW
    )
    of_layers = scores.unflatten(1, (layers, -1)).unbind(1)
    expected = [reference.allocate(x, 40, window=WINDOW) for x in of_layers]
    assert torch.equal(found, torch.cat(expected, 1))


@pytest.mark.parametrize(
    ("name", "can"),
    [
        ("ada_snapkv", True),
        ("critical_ada_snapkv", True),
        ("ada_column_max", True),
        ("defensive", True),
        ("ada_snapkv@kvpress", True),
        ("snapkv", False),
        ("ada_pyramidkv", False),
        ("model_rank_fusion", False),
        ("WindowAttention() * Adaptive(floor=1) * TopScore()", False),
        ("WindowAttention() * Adaptive(budgets_from='critical') * TopScore()", False),
        ("WindowAttention() * Adaptive(weigh_heads=True) * TopScore()", False),
    ],
)
def test_which_budgets_can_cross_ranks(name: str, can: bool):
    assert can_cross(get(name).allocator) == can
    if can:
        assert Settings(name, budgets="all_ranks").crosses(2)
        assert not Settings(name, budgets="all_ranks").crosses(1)
    else:
        with pytest.raises(ValueError, match=r'budgets can be "all_ranks" of policies that share'):
            Settings(name, budgets="all_ranks")


class Played:
    """Two ranks of one engine, the first of which looks first."""

    def __init__(self, policy: Policy, device: torch.device, *, one_reader: bool) -> None:
        name = f"test-{uuid.uuid4()}"
        self.path: Path = path_of(name)
        self.ledger = Ledger(name, NUM_BLOCKS)
        self._told: list[Tensor] = []
        self.ranks = []
        for tell in (self._write, self._read):
            ledger = Ledger(name, NUM_BLOCKS)
            scheduler: Scheduler = LedgerScheduler(ledger, counts=False)
            if one_reader:
                scheduler = OneReader(ledger, reads=tell == self._write, tell=tell)
            torch.manual_seed(0)
            self.ranks.append(Steps(policy, device, torch.float32, scheduler=scheduler))
            self.ranks[-1].add(150)

    def _write(self, rows: Tensor) -> None:
        self._told.append(rows.clone())

    def _read(self, rows: Tensor) -> None:
        rows.copy_(self._told.pop(0))

    def read_prompt(self) -> int:
        """The request's first block."""
        (first_block, other) = (steps.free[-1] for steps in self.ranks)
        assert first_block == other
        self.ledger.begin(first_block)
        for steps in self.ranks:
            run_step(steps, [150])
        self.ledger.give_order(first_block, Order(150, 150, BUDGET))
        return first_block

    def next_one(self, first_block: int) -> None:
        """The request is aborted, and the next one has its first block."""
        self.ledger.free(first_block)
        self.ledger.begin(first_block)


@pytest.mark.parametrize("one_reader", [True, False])
@pytest.mark.parametrize("name", ["ada_snapkv", "model_column_max"])
def test_ranks_compress_the_same_if_a_request_is_aborted_between_their_looks(
    device: torch.device, name: str, one_reader: bool
):
    """Where each looks for itself only the first one compresses it, which would leave it waiting
    for the scores of the second."""
    played = Played(get(name), device, one_reader=one_reader)
    try:
        first_block = played.read_prompt()
        first, second = played.ranks
        run_step(first, [1])  # also checks that it is compressed
        played.next_one(first_block)
        second.cache.begin_step(batch_of(second.describe([1])))
        boundaries = [int(x.cache.boundaries[first_block]) for x in played.ranks]
        assert boundaries == [150, 150 if one_reader else 0]
        lengths = [x.cache.lengths[:, first_block] for x in played.ranks]
        assert torch.equal(*lengths) == one_reader
    finally:
        played.path.unlink()


def test_ranks_forget_the_same_prompts(device: torch.device):
    """Also one that seems to run when the second rank could look."""
    played = Played(get("ada_snapkv"), device, one_reader=True)
    try:
        first_block = played.read_prompt()
        played.ledger.free(first_block)
        for steps in played.ranks:
            steps.cache.begin_step(batch_of(steps.describe([1])))
            assert not steps.cache.prompts and not steps.cache.boundaries.any()
            played.ledger.begin(first_block)
    finally:
        played.path.unlink()


def test_ranks_that_share_kv_heads_are_refused():
    settings = Settings(budgets="all_ranks")
    for ranks, heads in ((1, 1), (2, 2), (4, 8)):
        settings.check_ranks(engine_of(ranks, heads))
    Settings().check_ranks(engine_of(4, 2))
    with pytest.raises(ValueError, match='"all_ranks" with 4 ranks and 2 kv heads'):
        settings.check_ranks(engine_of(4, 2))


def engine_of(ranks: int, heads: int) -> SimpleNamespace:
    """As much of a ``VllmConfig`` as is asked for."""
    return SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: heads),
    )


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("mode", ["fill", "exact"])
def test_engine_cache_attends_to_what_crosses_ranks(device: torch.device, mode: str, kv_dtype: str):
    """Also where the other rank's heads get so little that this one's don't fit."""
    for other in (1.0, 1e-6):
        across = Across(0, lambda scores, x=other: torch.stack([scores, scores.flip(1) * x]))
        policy = Settings(budget=BUDGET, mode=mode).policy_for(BLOCK, across)
        dtype = torch.float32 if kv_dtype == "auto" else torch.float16
        steps = Steps(policy, device, dtype, kv_dtype=kv_dtype)
        for prompt in (150, 90, 40):
            steps.add(prompt)
        for counts in ([100, 90, 40], [50, 1, 1], [1, 1, 1], [1, 1, 1]):
            run_step(steps, counts)
        compressed = steps.requests[:2]
        pages = [sum(num_pages(len(y), BLOCK) for x in r.kept for y in x) for r in compressed]
        most = most_kept_blocks(budget=BUDGET, block_size=BLOCK, num_kv_heads=None)
        room = most * LAYERS * HEADS
        assert all(n == room if other < 1 else n < room for n in pages)
