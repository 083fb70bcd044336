"""The worker's half on pages of int4; vLLM isn't needed."""

from __future__ import annotations

import random

import pytest
import torch

from adakv.cache import KVCache
from adakv.errors import Error
from adakv.vllm.config import Settings
from adakv.vllm.metadata import batch_of
from adakv.vllm.page_memory import Pages, entry_bytes
from adakv.vllm.prompt_attention import FlashAttention
from adakv.vllm.tails import Tails
from engine_steps import BUDGET, LAYERS, NUM_BLOCKS, run_step
from flash_stand_in import FLASH
from int4_steps import PAGE, Int4Steps


def int4_steps(
    name: str,
    device: torch.device,
    dtype: torch.dtype = torch.float16,
    mode: str = "exact",
    **options: object,
) -> Int4Steps:
    return Int4Steps(Settings(name, BUDGET, mode).policy_for(PAGE), device, dtype, **options)


def run_random_steps(
    steps: Int4Steps, number_of_steps: int, *, waits: bool = False, chunks: int = 90
) -> None:
    """Chunks, requests that come and go, change places or have to start again, and steps without
    some of them. ``waits``: requests are compressed when they have written something."""
    rng = random.Random(0)
    for number in range(number_of_steps):
        while len(steps.requests) < 5:
            request = steps.add(rng.choice([5, BUDGET, 100, 140, 161, 250]))
            request.wait = rng.choice([0, 1, 3, 40]) if waits else 0
        if number % 5 == 4:
            rng.shuffle(steps.requests)
        counts = []
        for request in steps.requests:
            left = request.prompt - request.computed
            counts.append(min(left, rng.randint(1, chunks)) if left > 0 else 1)
        for place, request in enumerate(steps.requests):
            may_wait = request.order or request.computed < request.prompt
            if may_wait and number % 4 == 2 and place % 3 == number % 3:
                counts[place] = 0
        run_step(steps, counts)
        if number % 11 == 10:
            steps.remove(rng.choice(steps.requests))
        if number % 17 == 3:
            steps.preempt(rng.choice(steps.requests))
    for request in list(steps.requests):
        steps.remove(request)
    assert sorted(steps.free) == list(range(1, NUM_BLOCKS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("flash", [None, FLASH])
@pytest.mark.parametrize("name", ["ada_snapkv", "critical_ada_snapkv", "layer_defensive"])
def test_engine_cache_attends_to_pages_of_int4(
    device: torch.device, name: str, flash: FlashAttention | None, dtype: torch.dtype
):
    """And to the newest entries of rows in 16 bits, whoever is beside a request in a step."""
    steps = int4_steps(name, device, dtype, flash=flash)
    run_random_steps(steps, 40)
    assert len(steps.told.planned) > 4 and len(steps.told.entries) > 2


@pytest.mark.parametrize("name", ["ada_snapkv", "layer_defensive"])
@pytest.mark.parametrize("mode", ["fill", "exact"])
@pytest.mark.parametrize("has_places", [False, True])
def test_engine_cache_quantises_anew_what_requests_have_written(
    device: torch.device, name: str, mode: str, has_places: bool
):
    """Behind what is kept of their prompts."""
    steps = int4_steps(name, device, mode=mode, has_places=has_places)
    run_random_steps(steps, 60, waits=True)
    assert len(steps.told.entries) > 2 and steps.told.num_late > 2


@pytest.mark.parametrize("name", ["h2o", "ada_column_max", "model_column_max"])
@pytest.mark.parametrize("flash", [None, FLASH])
def test_engine_cache_folds_queries_over_int4(
    device: torch.device, name: str, flash: FlashAttention | None
):
    steps = int4_steps(name, device, flash=flash)
    run_random_steps(steps, 20, chunks=500)
    assert len(steps.told.entries) > 2


def test_engine_cache_begins_behind_cached_pages_of_int4(device: torch.device):
    steps = int4_steps("ada_snapkv", device)
    steps.find(steps.add(200), 4 * PAGE)
    steps.add(150)
    run_step(steps, [72, 100])
    for counts in ([1, 50], [1, 1], [1, 1]):
        run_step(steps, counts)
    assert [boundary for _, boundary in steps.told.planned] == [200, 150]


@pytest.mark.parametrize("has_places", [False, True])
def test_engine_cache_leaves_tails_alone_in_steps_of_nobody(device: torch.device, has_places: bool):
    """Which vLLM runs beside other engines, and to warm up: they have the places of requests."""
    steps = int4_steps("ada_snapkv", device, has_places=has_places)
    for prompt in (70, 100):
        steps.add(prompt)
    run_step(steps, [70, 100])
    requests, steps.requests = steps.requests, []
    nobody = steps.add(0)
    nobody.blocks, nobody.place, nobody.is_warm_up = [0], 0, True
    step = steps.cache.begin_step(batch_of(steps.describe([1])))
    for layer in range(LAYERS):
        queries, keys, values = steps.inputs(layer, [1])
        steps.cache.attend(layer, step, queries, keys, values, torch.empty_like(queries))
    steps.requests = requests
    run_step(steps, [1, 1])


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_pages_of_int4_are_those_of_a_cache(dim: int):
    """In bytes, and where they lie in them; but for positions, which an engine doesn't keep."""
    sizes = {"num_layers": 1, "num_sequences": 1, "num_kv_heads": 1, "max_row_pages": 1}
    cache = KVCache(num_pages=5, head_dim=dim, dtype=torch.bfloat16, kv_dtype="int4", **sizes)
    size = entry_bytes("int4", dim, torch.bfloat16)
    assert cache.page_bytes == PAGE * (size + 4)
    memory = torch.zeros(5, PAGE, size, dtype=torch.uint8)
    pages = Pages.within(memory, "int4", head_dim=dim, dtype=torch.bfloat16)
    (layer,) = cache.layers
    held = layer.pages, layer.key_scales, layer.value_scales
    assert [(x.shape, x.dtype) for x in pages] == [(x.shape, x.dtype) for x in held]
    ends = [x.data_ptr() - memory.data_ptr() for x in pages]
    assert ends == [x.data_ptr() - layer.pages.data_ptr() for x in held]
    assert pages.is_int4 and pages.head_dim == dim and pages.page_size == PAGE
    assert cache.tail_bytes == 2 * tails_of(pages, 1).layers(slice(0, 1))[0].numel()


def tails_of(pages: Pages, num_places: int) -> Tails:
    return Tails(num_places, [pages], num_kv_heads=1)


def test_tails_follow_their_requests():
    """Those of requests that a step leaves out stay, those of gone ones give room."""
    memory = torch.zeros(5, PAGE, entry_bytes("int4", 64, torch.float16), dtype=torch.uint8)
    tails = tails_of(Pages.within(memory, "int4", head_dim=64, dtype=torch.float16), 4)

    def arranged(requests: list[int], gone: tuple[int, ...] = ()) -> list[float]:
        tails.arrange(requests, lambda request: request in gone)
        return tails.layers(slice(None))[0][:, 0, 0, 0].tolist()

    arranged([7, 8, 9])
    for request in (7, 8, 9):
        tails.layers(tails.place(request))[0][:] = request
    assert arranged([9, 7])[:3] == [9, 7, 8]
    assert arranged([8, 9, 7])[:3] == [8, 9, 7]
    assert arranged([5])[1:] == [9, 7, 8]
    with pytest.raises(Error, match="the engine runs more than 4 requests at once"):
        arranged([1, 2, 5])
    assert arranged([1, 2, 5], gone=(8, 9)).count(7) == 1
    assert tails.layers(tails.place(7))[0].unique().tolist() == [7]
    with pytest.raises(Error, match="more than 4 requests at once, got 5"):
        arranged([1, 2, 5, 7, 3])
