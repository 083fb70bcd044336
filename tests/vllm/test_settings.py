"""Settings, refusals, the plan and the ledger; vLLM isn't needed."""

from __future__ import annotations

import multiprocessing
import random
import time
import uuid
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import adakv
from adakv.policy import LayerInputs, get
from adakv.step import Attention
from adakv.vllm.config import Settings, check_engine, check_version, why_not
from adakv.vllm.ledger import (
    Counts,
    Ledger,
    path_of,
    read_counts,
    remove_at_exit,
    remove_unused,
)
from adakv.vllm.pages import spans_layers
from adakv.vllm.plan import Order, end_of_text, plan
from adakv.vllm.requests import MAX_SPANS, Wishes
from policy.helpers import rotate

RUN = [name for name in adakv.policies() if why_not(get(name)) is None]


def engine(**changes: Any) -> SimpleNamespace:
    """A ``VllmConfig`` without anything unusual, but for some ``group__name=value``."""
    config = SimpleNamespace(
        kv_transfer_config=None,
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            pipeline_parallel_size=1,
            use_ubatching=False,
            nnodes_within_dp=1,
            use_ray=False,
            data_parallel_backend="mp",
            enable_elastic_ep=False,
        ),
        speculative_config=None,
        cache_config=SimpleNamespace(block_size=16, cache_dtype="auto", sliding_window=None),
        model_config=SimpleNamespace(use_mla=False),
        scheduler_config=SimpleNamespace(scheduler_reserve_full_isl=True),
    )
    for name, value in changes.items():
        holder, _, attribute = name.rpartition("__")
        setattr(getattr(config, holder) if holder else config, attribute, value)
    return config


def test_settings_are_none_without_an_entry():
    assert Settings.of({}) is None and Settings.of({"other": 1}) is None
    assert Settings.of({"adakv": {"budget": 64}}) == Settings(budget=64)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ada_snapkv", "must be a dict of policy, budget, mode, when, kv_dtype, .* got 'ada_snap"),
        ({"ratio": 0.1}, "must be a dict of policy, budget, mode"),
        ({"policy": "greedy"}, "policy must be one of"),
        ({"budget": 31}, r"budget must be at least 32 .*window 32.* got 31"),
        ({"budget": 64.5}, "budget must be an integer, got 64.5"),
        ({"mode": "loose"}, r"mode must be one of \('fill', 'exact'\), got 'loose'"),
        ({"when": "never"}, r"when must be one of \('always', 'pressure'\), got 'never'"),
        ({"policy": "pyramidkv@ffy0"}, "layers keep more than the budget in sum"),
        ({"policy": "kvzip"}, "reads the prompt twice"),
        ({"policy": "aircache"}, "evicts of images alone"),
        ({"policy": "hae"}, "evicts of images alone"),
        ({"decode_budget": 64, "policy": "csp"}, "decode_budget: ClassAttention needs classes"),
        ({"policy": "ada_snapkv@ffy0"}, "rounding drifts"),
        ({"policy": "corm"}, "its budget is the most that stays"),
        ({"policy": "full"}, "keeps everything"),
        ({"decode_budget": 31}, "adakv: decode_budget must be .* 32, got 31"),
        ({"decode_policy": "r_kv"}, "adakv: decode_budget must be given if a text is to be chosen"),
        ({"every": 64}, "adakv: decode_budget must be given if a text is to be chosen"),
        ({"kv_dtype": "mixed3"}, r"kv_dtype must be one of .*'int4'\), got 'mixed3'"),
        ({"kv_dtype": "int2"}, r"kv_dtype must be one of .*'int4'\), got 'int2'"),
        ({"decode_budget": 64, "kv_dtype": "int4"}, "decode_budget must not be given with blocks"),
        ({"decode_budget": 64, "policy": "ada_column_max"}, "decode_budget: ColumnMax needs"),
        ({"decode_budget": 64, "decode_policy": "h2o"}, "'h2o' can't run .* sums over all queries"),
        ({"decode_budget": 64, "decode_policy": "layer_defensive"}, "layers keep unequally much"),
    ],
)
def test_settings_say_what_is_wrong(given: Any, message: str):
    with pytest.raises(ValueError, match=message):
        Settings.of({"adakv": given})


def test_a_gate_is_refused(tmp_path: Path):
    path = tmp_path / "gate.safetensors"
    save_file({"layers.0.weight": torch.ones(1, 2), "layers.0.bias": torch.ones(1)}, path)
    policy = f"Gate(file={str(path)!r}) * Adaptive() * TopScore()"
    with pytest.raises(ValueError, match="it needs hidden states, which an engine's attention"):
        Settings.of({"adakv": {"policy": policy}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_transfer_config": object()}, "KV connectors"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode_context_parallel_size"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "prefill_context_parallel_size"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"parallel_config__use_ubatching": True}, "ubatches"),
        ({"parallel_config__nnodes_within_dp": 2}, "nnodes must be 1"),
        ({"parallel_config__use_ray": True}, "Ray"),
        ({"parallel_config__data_parallel_backend": "ray"}, "Ray"),
        ({"parallel_config__enable_elastic_ep": True}, "enable_elastic_ep must be off"),
        ({"speculative_config": SimpleNamespace(method="eagle")}, "drafts must come from n-grams"),
        ({"model_config__use_mla": True}, "MLA"),
        ({"cache_config__sliding_window": 4096}, "all layers of the model have sliding windows"),
        ({"cache_config__cache_dtype": "fp8"}, "kv_cache_dtype must be that of the model, got fp8"),
        ({"cache_config__block_size": 48}, "power of two from 8 to 256, got 48"),
        ({"scheduler_config__scheduler_reserve_full_isl": False}, "scheduler_reserve_full_isl"),
    ],
)
def test_engines_that_cannot_be_compressed_are_refused(changes: dict[str, Any], message: str):
    check_engine(engine(speculative_config=SimpleNamespace(method="ngram")))
    with pytest.raises(ValueError, match=message):
        check_engine(engine(**changes))


def test_versions_of_vllm_that_are_not_known_are_refused():
    for version in ("0.32.0", "0.33.1", "0.33.0rc1"):
        check_version(version)
    for version in ("0.31.9", "0.34.0", "1.0.0"):
        with pytest.raises(ImportError, match=f"at least 0.32 and below 0.34, got {version}"):
            check_version(version)


@pytest.mark.parametrize("mode", ["fill", "exact"])
@pytest.mark.parametrize("name", RUN)
def test_plan_has_room_for_what_policies_keep(name: str, mode: str):
    """Pages of all rows, at the start and while they grow, never outrun the request's blocks."""
    rng, block, heads = random.Random(0), 16, 3
    for budget, length in ((66, 200), (64, 129), (100, 301)):
        settings = Settings(policy=name, budget=budget, mode=mode)
        wide = spans_layers(settings.preset)
        layers = 3 if wide else 1
        planned = plan(
            length, budget=budget, block_size=block, num_kv_heads=None if wide else heads
        )
        everything = "all_queries" in settings.preset.needs
        queries = length if everything else settings.preset.window
        inputs = [
            LayerInputs(
                queries=torch.randn(1, 2 * heads, queries, 16),
                keys=torch.randn(1, heads, length, 16) * torch.tensor([0.1, 1, 4])[:, None, None],
                values=torch.randn(1, heads, length, 16),
                w_o=torch.randn(8, 2 * heads * 16),
                prompt_lens=(length,),
                layer=layer,
                num_layers=layers,
                attention=Attention(rotate=rotate),
                classes=torch.randint(2, (1, length), dtype=torch.uint8),
            )
            for layer in range(layers)
        ]
        chosen = settings.policy_for(block).choose_all(inputs, budget)
        kept = torch.cat([x.indptr.diff() for x in chosen])
        if mode == "exact":
            assert int(kept.sum()) == layers * heads * budget
        pages = -(-kept // block)
        assert int(pages.sum()) <= layers * heads * planned.kept_blocks
        for new in [*range(1, 40), rng.randint(40, 500)]:
            behind = -(-(length + new) // block) - planned.tail  # blocks for new tokens
            assert int((-(-(kept + new) // block) - pages).max()) <= behind


def test_plan_knows_no_number_of_layers():
    """Where pages are dealt across layers, the plan has room for any number of rows."""
    for budget, rows in product(range(32, 100), (2, 3, 8, 64, 1000)):
        numbers = {"budget": budget, "block_size": 16}
        some = plan(400, num_kv_heads=rows, **numbers)
        most = plan(400, num_kv_heads=None, **numbers)
        assert some.kept_blocks <= most.kept_blocks <= some.kept_blocks + 1


def test_plan_gives_back_nothing_that_is_not_worth_it():
    for boundary in range(1, 400):
        planned = plan(boundary, budget=64, block_size=16, num_kv_heads=2)
        if boundary <= 64:
            assert planned is None
        elif planned is not None:
            assert 1 <= planned.kept_blocks < planned.tail <= boundary / 16
    assert plan(65, budget=64, block_size=16, num_kv_heads=2) is None
    assert plan(400, budget=64, block_size=16, num_kv_heads=2) == (5, 25)


def random_sum(rng: random.Random, total: int, count: int) -> list[int]:
    """So many numbers of that sum."""
    cuts = sorted(rng.randint(0, total) for _ in range(count - 1))
    return [b - a for a, b in pairwise([0, *cuts, total])]


@pytest.mark.parametrize("block", [8, 16, 32])
def test_plan_has_room_for_what_stays_of_a_text(block: int):
    """However it is spread over the heads; and its blocks have been filled by the first choice."""
    rng = random.Random(0)
    for _ in range(3000):
        heads, budget, text = rng.randint(1, 8), rng.randint(8, 90), rng.randint(8, 90)
        boundary = rng.randint(1, 300)
        sizes = {"block_size": block, "num_kv_heads": heads}
        planned = plan(boundary, budget=budget, **sizes)
        of_prompt = [boundary] * heads
        if planned is not None:
            shares = random_sum(rng, heads * budget, heads)
            of_prompt = [min(boundary, -(-share // block) * block) for share in shares]
        of_text = random_sum(rng, heads * text, heads)
        pages = sum(-(-(p + s) // block) for p, s in zip(of_prompt, of_text, strict=True))
        end = end_of_text(boundary, planned, decode_budget=text, **sizes)
        there = end if planned is None else planned.kept_blocks + end - planned.tail
        filled = (boundary + text + 2 * block) // block
        assert pages <= there * heads and end <= filled
        wide = sizes | {"num_kv_heads": None}
        assert end <= end_of_text(boundary, planned, decode_budget=text, **wide) <= filled


def test_requests_say_what_they_wish():
    assert Wishes.of(None) == Wishes.of({"other": 1}) == Wishes()
    wishes = Wishes.of({"adakv": {"budget": 512, "protect": [[7, 90], [80, 100]]}})
    assert wishes.budget == 512 and wishes.spans == ((7, 100),)
    sent = '{"protect_prefix": 20, "protect": [[50, 60], [20, 30]]}'
    assert Wishes.of({"adakv": sent}).spans == ((0, 30), (50, 60))
    assert Wishes.of({"adakv": {"policy": "off"}}).policy == "off"
    sent = '{"classes": {"image": [[50, 60], [3, 30]], "instruction": [[30, 40]]}}'
    assert Wishes.of({"adakv": sent}).class_spans == ((3, 30, 1), (30, 40, 3), (50, 60, 1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "must be a dict of budget, .* protect_prefix, classes, or one in JSON, got 5"),
        ("{", r"or one in JSON, got '\{'"),
        ({"ratio": 0.1}, "must be a dict of budget"),
        ({"budget": "64"}, "budget must be an integer, got '64'"),
        ({"policy": "h2o"}, "policy must be \"off\", got 'h2o'"),
        ({"protect_prefix": -1}, "protect_prefix must be a number of tokens, got -1"),
        ({"protect": [[5, 5]]}, r"protect must be a list of up to 16 pairs .* got \[\[5, 5\]\]"),
        ({"protect": 7}, "protect must be a list .* got 7"),
        ({"protect": [[2 * i, 2 * i + 1] for i in range(17)]}, "protect must be a list of up to"),
        ({"classes": [[3, 9]]}, r"classes must be a dict of spans by class \(image, audio, instr"),
        ({"classes": {"picture": [[3, 9]]}}, "classes must be a dict of spans .* got"),
        ({"classes": {"image": [[3, 9], [8, 10]]}}, "classes must be .* that don't overlap"),
        ({"classes": {"image": [[3, 9]]}}, "classes must be empty: the engine's policy doesn't"),
        ({"budget": 129}, "budget must be at most the engine's 128, got 129"),
        ({"budget": 31}, "budget must be at least 32 entries, for the policy's window, got 31"),
        ({"budget": 64, "protect_prefix": 33}, "at least 65 entries, .* and the 33 protected"),
        ({"protect": [[0, 97]]}, "at least 129 entries, .* and the 97 protected tokens, got 128"),
    ],
)
def test_requests_say_what_is_wrong(given: Any, message: str):
    with pytest.raises(ValueError, match=message):
        Wishes.of({"adakv": given}).check(Settings(budget=128).limits)


def test_requests_have_images():
    given = {"budget": 64, "classes": {"image": [[3, 90]]}, "protect_prefix": 3}
    Wishes.of({"adakv": given}).check(Settings("csp", 128).limits)


def test_requests_protect_nothing_in_layers_of_unequal_budgets():
    limits = Settings("ada_pyramidkv", 128).limits
    Wishes.of({"adakv": {"budget": 64}}).check(limits)
    with pytest.raises(ValueError, match="protect must be empty: layers"):
        Wishes.of({"adakv": {"protect_prefix": 5}}).check(limits)
    Wishes.of({"adakv": {"protect_prefix": 5}}).check(Settings("model_column_max", 128).limits)


@pytest.fixture
def ledger() -> Any:
    name = f"test-{uuid.uuid4().hex}"
    yield name, Ledger(name, 10)
    path_of(name).unlink(missing_ok=True)


def test_ledger_compares_both_halves(ledger: tuple[str, Ledger]):
    name, scheduler = ledger
    worker = Ledger(name, 10)
    spans = ((0, 5), (90, 120))
    classes = tuple((10 * i, 10 * i + 5, 1 + i % 3) for i in range(MAX_SPANS))
    for given in (Order(407, 400, 64, spans), Order(407, 400, 64, spans, 9, classes)):
        scheduler.give_order(3, given)
        assert worker.order(3, 400, 405) == given
    assert worker.order(2, 400, 405) is None and worker.has_orders
    with pytest.raises(adakv.Error, match=r"compress 399 tokens .* block 3, .* planned 400"):
        worker.order(3, 399, 407)
    with pytest.raises(adakv.Error, match=r"free blocks .* block 3, .* at 400 .* at -1"):
        scheduler.check_done(3, 400)
    worker.done(3, 400)
    scheduler.check_done(3, 400)
    assert not worker.has_orders
    scheduler.begin(3)
    assert worker.order(3, 400, 405) is None


def test_ledger_knows_which_requests_a_scheduler_began(ledger: tuple[str, Ledger]):
    name, scheduler = ledger
    worker = Ledger(name, 10)
    scheduler.begin(3)
    assert [worker.is_running(block) for block in (2, 3)] == [False, True]
    scheduler.free(3)
    assert not worker.is_running(3)
    scheduler.begin(3)
    assert worker.is_running(3)


def test_ledger_is_as_large_as_the_pool_that_it_is_opened_for_last(ledger: tuple[str, Ledger]):
    """Engines that measure what CUDA graphs take have a small pool before they have theirs."""
    name, scheduler = ledger
    scheduler.give_order(9, Order(400, 400, 64))
    assert Ledger.open(name, 4).num_blocks == 4
    worker = Ledger.open(name, 10)
    assert worker is Ledger.open(name, 10)
    assert worker.order(9, 400, 400) == Order(400, 400, 64)
    assert path_of(name).stat().st_size == 8 * (9 + (11 + 5 * MAX_SPANS) * 10)


def test_ledger_is_gone_with_the_process_that_removes_it(ledger: tuple[str, Ledger]):
    name, _ = ledger
    process = multiprocessing.get_context("spawn").Process(target=remove_at_exit, args=(name,))
    process.start()
    process.join()
    assert process.exitcode == 0 and not path_of(name).exists()


def open_and_die(name: str, is_open: Any) -> None:
    """In a process of its own, which no finalizer outlives."""
    ledger = Ledger(name, 10)
    is_open.set()
    time.sleep(60)
    ledger.free(0)


def test_ledger_of_a_killed_process_is_removed_and_those_in_use_are_not(
    ledger: tuple[str, Ledger],
):
    context = multiprocessing.get_context("spawn")
    name, is_open = f"test-{uuid.uuid4().hex}", context.Event()
    process = context.Process(target=open_and_die, args=(name, is_open))
    process.start()
    assert is_open.wait(timeout=60)
    remove_unused()
    assert path_of(name).exists() and path_of(ledger[0]).exists()
    process.kill()
    process.join()
    assert path_of(name).exists()
    remove_unused()
    assert not path_of(name).exists() and path_of(ledger[0]).exists()


def test_ledger_counts_for_everybody(ledger: tuple[str, Ledger]):
    name, scheduler = ledger
    assert read_counts("nobody") == Counts()
    Ledger(name, 10).add(entries_read=5, entries_kept=2)
    scheduler.add(requests_compressed=1, blocks_given_back=7)
    assert read_counts(name) == scheduler.counts == Counts(1, 7, 5, 2, 0, 0, 0)
