"""A thousand short requests through one engine, and what is left of them."""

from __future__ import annotations

import gc
import random
from typing import NamedTuple

import psutil
import torch

from adakv.vllm.config import Settings
from adakv.vllm.ledger import Counts
from vllm_engine import Engine, engine, is_on_cuda, random_text

ROUNDS, REQUESTS = 10, 100

#: Whoever calls a kernel of oneDNN with a new number of tokens has it prepared, which is kept: for
#: a thousand numbers unless these say otherwise.
ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "LRU_CACHE_CAPACITY": "0"}


class Result(NamedTuple):
    """What came of all rounds."""

    counts: Counts
    num_preemptions: int  # at least
    cached: int  # tokens of prompts
    resident: list[int]  # bytes, after each round
    on_device: list[int]  # bytes that torch has given out on the GPU, if there is one, likewise


def run(model: str) -> Result:
    """Small budgets, a pool in which requests are compressed, some of them preempted, a prefix
    cache; checks after each round that no request holds anything."""
    rng, process = random.Random(0), psutil.Process()
    settings = Settings(budget=40, when="pressure")
    options = {"max_model_len": 256, "num_gpu_blocks_override": 24, "enable_prefix_caching": True}
    cached, num_preemptions = 0, 0
    resident: list[int] = []
    on_device: list[int] = []
    with engine(model, settings, runs_ahead=True, **options) as it:
        for _ in range(ROUNDS):
            found, most_preempted = _run_some(it, rng)
            cached, num_preemptions = cached + found, num_preemptions + most_preempted
            assert it.num_free == it.manager.block_pool.num_gpu_blocks - 1
            assert not it.manager._ledger.has_orders
            assert not it.manager._notes and not it.manager._requests and not it.manager._begun
            assert len(it.cache.prompts) <= 16  # those of its last steps
            gc.collect()
            resident.append(process.memory_info().rss)
            on_device.append(torch.cuda.memory_allocated() if is_on_cuda() else 0)
        return Result(it.manager._ledger.counts, num_preemptions, cached, resident, on_device)


def _run_some(it: Engine, rng: random.Random) -> tuple[int, int]:
    """Requests of which many begin as others do, and some are aborted; the prompts' tokens that
    were cached, and how often one was preempted at most."""
    begins = [random_text(rng, n) for n in (40, 64, 96)]
    prompts = [
        rng.choice(begins)[: rng.randint(1, 96)] + random_text(rng, rng.randint(1, 120))
        for _ in range(REQUESTS)
    ]
    counts = [rng.randint(1, 24) for _ in prompts]
    come = sorted(rng.randrange(120) for _ in prompts)
    leave = {number: come[number] + rng.randint(1, 8) for number in rng.sample(range(REQUESTS), 5)}
    run = it.run(prompts, counts, come=come, leave=leave)
    for number, (tokens, count) in enumerate(zip(run.tokens, counts, strict=True)):
        assert len(tokens) == count or (number in leave and not tokens), number
    return sum(run.cached), run.preemptions
