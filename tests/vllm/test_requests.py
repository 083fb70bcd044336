"""What single requests ask for, in whole engines on the CPU."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("vllm.v1", reason="vllm isn't installed; make test-vllm runs these tests")

from adakv.vllm.config import Settings
from vllm_engine import engine, save_llama
from vllm_reference import Reference

SPANS = ((0, 30), (100, 110))
#: What each of some requests asks for, and what it comes to: budget and protected spans.
WISHES: list[tuple[Any, int, tuple[tuple[int, int], ...]]] = [
    (None, 128, ()),
    ({"budget": 64}, 64, ()),
    ({"policy": "off"}, 1024, ()),
    ({"budget": 96, "protect": [[100, 110]], "protect_prefix": 30}, 96, SPANS),
    ('{"protect_prefix": 30, "protect": [[100, 110]]}', 128, SPANS),
]


#: Spans of images of some requests with a policy that reads them.
IMAGES: list[tuple[tuple[int, int], ...]] = [(), ((3, 90),), ((20, 60), (100, 230))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    ("policy", "when", "pool"),
    [
        ("ada_snapkv", "always", 200),
        ("model_column_max", "always", 200),
        ("ada_snapkv", "pressure", 40),
    ],
)
def test_requests_get_what_they_ask_for(model: str, policy: str, when: Any, pool: int):
    rng = random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(250, 400))] for _ in WISHES]
    wishes = {number: wish for number, (wish, _, _) in enumerate(WISHES) if wish is not None}
    settings = Settings(policy, 128, "exact", when)
    options = {"num_gpu_blocks_override": pool, "max_model_len": 512, "runs_ahead": True}
    with engine(model, settings, **options) as it:
        run = it.run(prompts, 40, wishes=wishes)
        assert it.num_free == pool - 1
    num_cut = 0
    for number, (_, budget, spans) in enumerate(WISHES):
        own = replace(settings, budget=budget)
        (compression,) = run.compressions[number]
        assert when == "pressure" or bool(compression.lengths.any()) == (budget < 1024)
        num_cut += bool(compression.lengths.any())
        tokens, reference = run.tokens[number], Reference(model, own, protect=spans)
        assert reference.choices(prompts[number], tokens, [compression]) == tokens, number
    assert num_cut >= 2


@pytest.mark.parametrize("when", ["always", "pressure"])
def test_requests_say_what_is_of_an_image(model: str, when: Any):
    rng = random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(250, 400))] for _ in IMAGES]
    wishes = {i: {"classes": {"image": spans}} for i, spans in enumerate(IMAGES) if spans}
    settings = Settings("csp", 64, "exact", when)
    pool = {"always": 200, "pressure": 30}[when]
    options = {"num_gpu_blocks_override": pool, "max_model_len": 512, "runs_ahead": True}
    with engine(model, settings, **options) as it:
        run = it.run(prompts, 40, wishes=wishes)
    num_cut = 0
    for number, spans in enumerate(IMAGES):
        tokens, compressions = run.tokens[number], run.compressions[number]
        num_cut += bool(compressions[-1].lengths.any())
        reference = Reference(model, settings, images=spans)
        assert reference.choices(prompts[number], tokens, compressions) == tokens, number
    assert num_cut >= 2


def test_engine_refuses_a_request_and_lives(model: str):
    rng = random.Random(1)
    prompts = [[rng.randrange(256) for _ in range(300)]]
    with engine(model, Settings(budget=64)) as it:
        expected = it.run(prompts, 10)
        for wish, message in (
            ({"budget": 65}, "budget must be at most the engine's 64, got 65"),
            ({"protect_prefix": 40}, "at least 72 entries, for the policy's window and the 40"),
            ({"protected": [[0, 4]]}, "must be a dict of budget, policy, protect"),
        ):
            with pytest.raises(Exception, match=message):
                it.run(prompts, 10, wishes={0: wish})
        run = it.run(prompts, 10)
        assert it.num_free == it.manager.block_pool.num_gpu_blocks - 1
    assert run.tokens == expected.tokens
