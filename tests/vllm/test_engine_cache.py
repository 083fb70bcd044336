"""The worker's half on an engine's pages; vLLM isn't needed."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest
import torch

from adakv.cache import KVCache
from adakv.policy import Policy, get
from adakv.step import Attention
from adakv.vllm.config import Settings
from adakv.vllm.engine_cache import EngineCache
from adakv.vllm.metadata import batch_of
from adakv.vllm.page_memory import Pages, entry_bytes, num_scales
from adakv.vllm.pages import OwnPages
from adakv.vllm.plan import Order
from adakv.vllm.prompt_attention import FlashAttention
from engine_steps import (
    BLOCK,
    BUDGET,
    DIM,
    HEADS,
    LAYERS,
    NUM_BLOCKS,
    SCALE,
    Steps,
    run_step,
    watched,
)
from flash_stand_in import FLASH

FOLDING = [
    "h2o",
    "ada_column_max",
    "ada_expected",
    "PromptAttention(reduce='mean', group_reduce='max', stride=3, distance=2)"
    " * Adaptive() * TopScore()",
]
#: Their layers keep unequally much.
WIDE = [
    "model_column_max",
    "layer_defensive",
    "ada_pyramidkv",
    "critical_ada_pyramidkv",
    "KeyDiff() * ModelWide(floor=0.3, safeguard='hard_floor') * TopScore()",
    "WindowAttention() * ModelWide() * TwoStage()",
]


def policy(mode: str) -> Policy:
    return Settings(budget=BUDGET, mode=mode).policy_for(BLOCK)


def run_random_steps(steps: Steps, number_of_steps: int, *, waits: bool = False) -> None:
    """Chunks, drafts that are taken back, requests that come and go or have to start again, blocks
    that are used again. ``waits``: requests are compressed when they have written something."""
    rng = random.Random(0)
    for number in range(number_of_steps):
        while len(steps.requests) < 4:
            request = steps.add(rng.choice([5, BUDGET, 100, 140, 161, 250]))
            request.wait = rng.choice([0, 1, 3, 6]) if waits else 0
        counts = []
        for request in steps.requests:
            left = request.prompt - request.computed
            counts.append(min(left, rng.randint(1, 90)) if left > 0 else rng.choice([1, 1, 3]))
        run_step(steps, counts)
        for request, count in zip(steps.requests, counts, strict=True):
            if count == 3 and request.order and request.computed - 2 > request.order.at:
                request.computed -= 2
        if number % 7 == 6:
            steps.remove(rng.choice(steps.requests))
        if number % 7 == 3:
            steps.preempt(rng.choice(steps.requests))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["fill", "exact"])
def test_engine_cache_attends_to_what_it_kept(device: torch.device, mode: str, dtype: torch.dtype):
    steps = Steps(policy(mode), device, dtype)
    run_random_steps(steps, 45)
    assert len(steps.told.planned) > 8 and len(steps.told.entries) > 4


@pytest.mark.parametrize("has_places", [False, True])
@pytest.mark.parametrize("mode", ["fill", "exact"])
@pytest.mark.parametrize("name", ["ada_snapkv", "ada_column_max", "model_column_max"])
def test_engine_cache_compresses_requests_that_have_written(
    device: torch.device, name: str, mode: str, has_places: bool
):
    """What they wrote moves behind what is kept, bit for bit."""
    chosen = Settings(name, BUDGET, mode).policy_for(BLOCK)
    steps = Steps(chosen, device, torch.float32, has_places=has_places)
    run_random_steps(steps, 45, waits=True)
    assert len(steps.told.entries) > 2 and steps.told.num_late > 2


@pytest.mark.parametrize("name", ["csp", "ClassAttention(rows='cross') * ModelWide() * TopScore()"])
def test_engine_cache_knows_what_is_of_an_image(device: torch.device, name: str):
    """As the request says; of one that says nothing all is text."""
    chosen = Settings(name, BUDGET, "exact").policy_for(BLOCK)
    kept = []
    for images in ((), ((3, 60), (70, 131))):
        torch.manual_seed(0)
        steps = Steps(chosen, device, torch.float32)
        request = steps.add(150)
        request.images = images
        for count in (90, 60, 1, 1):
            run_step(steps, [count])
        kept.append([row.tolist() for rows in request.kept for row in rows])
    assert kept[0] != kept[1]


@pytest.mark.parametrize(("kv_dtype", "dtype"), [("int8", torch.float16), ("fp8", torch.bfloat16)])
@pytest.mark.parametrize("name", ["ada_snapkv", "critical_ada_snapkv", "h2o", "model_column_max"])
@pytest.mark.parametrize("flash", [None, FLASH])
def test_engine_cache_attends_to_codes(
    device: torch.device,
    name: str,
    kv_dtype: str,
    dtype: torch.dtype,
    flash: FlashAttention | None,
):
    """From the first token on: the text doesn't depend on how a prompt is cut into chunks."""
    chosen = Settings(name, BUDGET, "exact").policy_for(BLOCK)
    steps = Steps(chosen, device, dtype, flash=flash, kv_dtype=kv_dtype)
    run_random_steps(steps, 24)
    assert len(steps.told.planned) > 4 and len(steps.told.entries) > 2


@pytest.mark.parametrize("name", ["ada_snapkv", "model_column_max"])
def test_engine_cache_moves_codes_behind_what_is_kept(device: torch.device, name: str):
    """What requests wrote before they were compressed, bit for bit."""
    chosen = Settings(name, BUDGET).policy_for(BLOCK)
    steps = Steps(chosen, device, torch.float16, kv_dtype="int8")
    run_random_steps(steps, 45, waits=True)
    assert len(steps.told.entries) > 2 and steps.told.num_late > 2


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_pages_of_codes_are_those_of_a_cache(kv_dtype: str, dim: int):
    """In bytes, and where they lie in them; but for positions, which an engine doesn't keep."""
    sizes = {"num_layers": 1, "num_sequences": 1, "num_kv_heads": 1, "max_row_pages": 1}
    cache = KVCache(
        num_pages=5, head_dim=dim, page_size=32, dtype=torch.float16, kv_dtype=kv_dtype, **sizes
    )
    size = entry_bytes(kv_dtype, dim, torch.float16)
    assert cache.page_bytes == 32 * (size + 4)
    memory = torch.zeros(5, 32, size, dtype=torch.uint8)
    pages = Pages.within(memory, kv_dtype, head_dim=dim, dtype=torch.float16)
    (layer,) = cache.layers
    held = layer.pages, layer.key_scales, layer.value_scales
    assert [(x.shape, x.dtype) for x in pages] == [(x.shape, x.dtype) for x in held]
    assert pages.key_scales.shape[2] == num_scales(kv_dtype, dim)
    ends = [x.data_ptr() - memory.data_ptr() for x in pages]
    assert ends == [x.data_ptr() - layer.pages.data_ptr() for x in held]
    assert pages.page_size == 32 and pages.dtype is torch.float16


def test_engine_cache_waits_for_the_step_that_an_order_names(device: torch.device):
    """Where the scheduler is a step ahead: the order is there, and the step is not."""
    steps = Steps(policy("fill"), device, torch.float32)
    request = steps.add(150)
    run_step(steps, [150])
    request.wait = 1
    steps.end_prompts()
    steps.told.orders[request.blocks[0]] = Order(151, 150)
    run_step(steps, [1])
    assert not steps.told.planned and len(steps.cache.prompts) == 1
    run_step(steps, [1])
    assert steps.told.planned == [(request.blocks[0], 150)] and not steps.cache.prompts
    run_step(steps, [1])


@pytest.mark.parametrize(
    "name",
    [
        "ada_snapkv",
        "critical_ada_snapkv",
        "h2o",
        "streaming",
        "layer_defensive",
        "model_column_max",
        "KeyDiff() * ModelWide(floor=0.3, safeguard='hard_floor') * TopScore()",
    ],
)
def test_engine_cache_protects_spans(device: torch.device, name: str):
    """In every head of every layer, within a budget of the request's own."""
    budget, spans = 76, ((3, 20), (60, 75))
    steps = Steps(Settings(name, BUDGET, "exact").policy_for(BLOCK), device, torch.float32)
    for wait in (0, 2):
        request = steps.add(200)
        request.wait, request.budget, request.protected = wait, budget, spans
    steps.add(150).budget = 40
    for counts in ([120, 100, 150], [80, 100, 1], [1] * 3, [1] * 3, [1] * 3, [1] * 3):
        run_step(steps, counts)
    assert steps.told.num_late == 1 and len(steps.told.planned) == 3
    protected = {place for begin, end in spans for place in range(begin, end)}
    for request, entries in zip(steps.requests, (budget, budget, 40), strict=True):
        rows = [row.tolist() for layer in request.kept for row in layer]
        assert sum(map(len, rows)) == LAYERS * HEADS * entries
        assert all(protected <= set(row) for row in rows) == (entries == budget)


@pytest.mark.parametrize(
    ("name", "flash"),
    [("ada_snapkv", None), ("ada_snapkv", FLASH), ("model_column_max", FLASH)],
    ids=["ours", "flash", "wide-flash"],
)
def test_engine_cache_knows_requests_by_their_places(device: torch.device, name: str, flash: Any):
    """As with vLLM's second model runner: the host reads no first block in its own step."""
    chosen = Settings(name, BUDGET).policy_for(BLOCK)
    steps = Steps(chosen, device, torch.float32, flash=flash, has_places=True)
    run_random_steps(steps, 45)
    assert len(steps.told.planned) > 8 and len(steps.told.entries) > 4
    assert len(steps.cache.prompts) <= 4


@pytest.mark.parametrize("has_places", [False, True])
def test_engine_cache_begins_behind_what_is_cached(device: torch.device, has_places: bool):
    """Also in the place of one that was reading its prompt."""
    steps = Steps(policy("exact"), device, torch.float32, has_places=has_places)
    steps.find(steps.add(200), 9 * BLOCK)
    gone = steps.add(150)
    run_step(steps, [20, 100])
    steps.remove(gone)
    again = steps.add(190)
    steps.find(again, 7 * BLOCK)
    again.place = gone.place
    run_step(steps, [36, 40])
    for counts in ([1, 38], [1, 1], [1, 1]):
        run_step(steps, counts)
    assert [boundary for _, boundary in steps.told.planned] == [200, 190]
    assert len(steps.told.entries) == 2 and not steps.cache.prompts


@pytest.mark.parametrize("name", FOLDING)
def test_engine_cache_keeps_what_the_whole_prompt_keeps(device: torch.device, name: str):
    """Policies that look at all queries, which come in chunks."""
    steps = Steps(Settings(name, BUDGET, "exact").policy_for(BLOCK), device, torch.float32)
    run_random_steps(steps, 25)
    assert len(steps.told.entries) > 2
    assert len(steps.cache.prompts) <= 4


@pytest.mark.parametrize(
    ("name", "mode"), [*product(WIDE[:2], ["fill", "exact"]), *product(WIDE[2:], ["fill"])]
)
def test_engine_cache_deals_pages_across_layers(device: torch.device, name: str, mode: str):
    """Layers that keep unequally much; their sum is what blocks were kept for."""
    steps = Steps(Settings(name, BUDGET, mode).policy_for(BLOCK), device, torch.float32)
    run_random_steps(steps, 25)
    assert len(steps.told.entries) > 2
    assert len(steps.cache.prompts) <= 4
    for request in list(steps.requests):
        steps.remove(request)
    assert sorted(steps.free) == list(range(1, NUM_BLOCKS))


@pytest.mark.parametrize("name", WIDE)
def test_engine_cache_holds_what_a_reader_of_the_whole_prompt_keeps(
    device: torch.device, name: str
):
    """Bit for bit, in pages of which none is in two rows."""
    steps = Steps(Settings(name, BUDGET, "exact").policy_for(BLOCK), device, torch.float32)
    for prompt in (200, 150, 170):
        steps.add(prompt)
    run_step(steps, [200, 150, 170])
    steps.end_prompts()
    step = steps.cache.begin_step(batch_of(steps.describe([1, 1, 1])))
    used: list[int] = []
    sums = []
    for layer, (pages, _, table, lengths, *_) in enumerate(step.groups[0].planned._layers):
        for number, request in enumerate(steps.requests):
            for head, positions in enumerate(request.kept[layer]):
                length = int(lengths[number, head])
                row = table[number, head, : -(-length // BLOCK)].long()
                used += row.tolist()
                for i, x in enumerate((request.keys, request.values)):
                    held = pages[row, i].flatten(0, 1)[:length]
                    assert torch.equal(held, x[layer, positions, head])
        sums.append(lengths.sum(1))
    assert len(set(used)) == len(used)
    assert (sum(sums) == LAYERS * HEADS * BUDGET).all()
    assert not torch.equal(sums[0], sums[1])


@pytest.mark.parametrize("mode", ["fill", "exact"])
def test_engine_cache_copies_no_prompts_of_layers_that_wait(device: torch.device, mode: str):
    """Entries of one layer at a time; of the others the scores."""
    held: list[list[int]] = []

    class Watched(Policy):
        def choose_all(self, layers: Any, *args: Any, **options: Any) -> Any:
            held.append([x.keys.numel() + x.values.numel() + x.queries.numel() for x in layers])
            return super().choose_all(layers, *args, **options)

    chosen = Settings("model_column_max", BUDGET, mode).policy_for(BLOCK)
    chosen = Watched(chosen.scorer, chosen.allocator, chosen.selector)
    steps = Steps(chosen, device, torch.float32)
    steps.add(200)
    run_step(steps, [200])
    steps.cache.begin_step(batch_of(steps.describe([1])))
    (sizes,) = held
    assert sizes[:-1] == [0] * (LAYERS - 1)


def test_engine_cache_wants_one_memory_for_layers_that_keep_unequally_much():
    chosen, pages = get("layer_defensive"), torch.zeros(2, 6, 2, BLOCK, DIM)
    shared = {"num_kv_heads": HEADS, "attentions": [Attention(scale=SCALE)] * LAYERS}
    EngineCache(chosen, BUDGET, [Pages(pages[0]), Pages(pages[1])], **shared)
    EngineCache(chosen, BUDGET, [Pages(pages[1]), Pages(pages[0])], **shared)
    for apart in ([pages[0], pages[1].clone()], [pages[0], pages[:, :3].flatten(0, 1)[:, :1]]):
        apart = [Pages(x) for x in apart]
        EngineCache(get("ada_snapkv"), BUDGET, apart, **shared)
        with pytest.raises(ValueError, match="the caches of all layers in one memory"):
            EngineCache(chosen, BUDGET, apart, **shared)


def test_engine_cache_folds_no_queries_of_short_prompts(device: torch.device):
    """Until a prompt is long enough to be compressed its queries are kept, and no longer."""
    chosen, folds = watched(Settings("h2o", BUDGET).policy_for(BLOCK))
    steps = Steps(chosen, device, torch.float32)
    for prompt in (BUDGET + 5, 150):
        steps.add(prompt)
    run_step(steps, [30, 40])
    run_step(steps, [BUDGET - 25, 24])
    assert len(steps.cache.prompts) == 2 and not folds
    run_step(steps, [1, 86])
    assert len(steps.cache.prompts) == 1
    assert [(part.queries.shape[2], part.length) for part in folds] == [(150, 150)] * LAYERS
    run_step(steps, [1, 1])
    assert not steps.cache.prompts and len(folds) == LAYERS
    assert len(steps.told.entries) == 1


def test_engine_cache_forgets_prompts_that_nobody_goes_on_with(device: torch.device):
    steps = Steps(policy("fill"), device, torch.float32)
    for _ in range(3):
        steps.add(150)
    run_step(steps, [100, 100, 150])
    steps.remove(steps.requests[2])  # it wanted one token
    steps.preempt(steps.requests[1])
    run_step(steps, [50, 10])
    assert len(steps.cache.prompts) == 2
    steps.remove(steps.requests[1])
    run_step(steps, [1])
    assert not steps.cache.prompts


def test_engine_cache_keeps_exactly_the_budget(device: torch.device):
    steps = Steps(policy("exact"), device, torch.float32)
    steps.add(200)
    run_step(steps, [200])
    run_step(steps, [1])
    (request,) = steps.requests
    lengths = steps.cache.lengths[:, request.blocks[0]]
    assert (lengths.sum(1) == HEADS * BUDGET).all()
    assert len(set(lengths.flatten().tolist())) > 1
    assert steps.told.planned == [(request.blocks[0], 200)]
    assert steps.told.entries == [(LAYERS * HEADS * 200, LAYERS * HEADS * BUDGET)]


def test_engine_cache_fills_the_pages_that_it_takes_anyway(device: torch.device):
    lengths = {}
    for mode in ("exact", "fill"):
        torch.manual_seed(0)
        steps = Steps(policy(mode), device, torch.float32)
        steps.add(200)
        run_step(steps, [200])
        run_step(steps, [1])
        lengths[mode] = steps.cache.lengths[:, steps.requests[0].blocks[0]]
    assert torch.equal(lengths["fill"], -(-lengths["exact"] // BLOCK) * BLOCK)


def test_engine_cache_gives_a_preempted_request_a_new_start(device: torch.device):
    steps = Steps(policy("fill"), device, torch.float32)
    request = steps.add(150)
    run_step(steps, [150])
    run_step(steps, [1])
    steps.preempt(request)
    run_step(steps, [100])
    run_step(steps, [51])
    run_step(steps, [1])
    assert [boundary for _, boundary in steps.told.planned] == [150, 151]


def test_engine_cache_changes_nothing_when_the_scheduler_planned_otherwise(device: torch.device):
    steps = Steps(policy("fill"), device, torch.float32)
    steps.add(150)
    run_step(steps, [150])
    steps.told.refuses = True
    before = [pages.entries.clone() for pages in steps.cache.pages]
    with pytest.raises(RuntimeError, match="planned otherwise"):
        steps.cache.begin_step(batch_of(steps.describe([1])))
    for pages, was in zip(steps.cache.pages, before, strict=True):
        assert torch.equal(pages.entries.nan_to_num(), was.nan_to_num())


def test_engine_cache_compresses_nothing_that_only_warms_the_engine_up(device: torch.device):
    """Requests of no scheduler, through prompt and decode steps, with drafts, too; then the blocks
    are those of real ones."""
    steps = Steps(policy("fill"), device, torch.float32)
    for prompt in (2, 150, 161):
        steps.add(prompt).is_warm_up = True
    run_step(steps, [2, 150, 100])
    run_step(steps, [1, 3, 61])
    run_step(steps, [1, 1, 1])
    assert not steps.told.planned and not steps.cache.prompts
    for request in list(steps.requests):
        steps.remove(request)
        steps.free = [b for b in steps.free if b not in request.blocks] + request.blocks[::-1]
    run_random_steps(steps, 12)
    assert len(steps.told.planned) > 2


def test_engine_cache_hands_the_output_projection_to_policies_that_read_it(device: torch.device):
    steps = Steps(get("critical_ada_snapkv"), device, torch.float32)
    steps.add(150)
    metadata = steps.describe([150])
    step = steps.cache.begin_step(batch_of(metadata))
    for layer in range(LAYERS):
        q, k, v = steps.inputs(layer, [150])
        steps.cache.attend(layer, step, q, k, v, torch.empty_like(q))
    steps.advance([150])
    steps.cache.begin_step(batch_of(steps.describe([1])))
    assert steps.asked == list(range(LAYERS))


@pytest.mark.parametrize(
    ("length", "layers"),
    [(700, [32]), (8192, [16, 16]), (32768, [4] * 8), (50000, [2] * 16), (200000, [1] * 32)],
)
def test_layers_are_chosen_from_at_once_as_far_as_copies_of_them_are_small(
    length: int, layers: list[int]
):
    """An 8B model's layers, one by one, would take the host longer than a step hides."""
    memory = torch.zeros(32, 16, 2, 16, 128, dtype=torch.bfloat16)
    pages = OwnPages([Pages(of_layer) for of_layer in memory], num_kv_heads=8)
    assert [len(of_batch) for of_batch in pages.together(length)] == layers
