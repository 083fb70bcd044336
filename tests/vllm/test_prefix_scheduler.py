"""Prefix caching in the scheduler's half alone: what blocks hold, step by step, in no engine."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("vllm.v1", reason="vllm isn't installed; make test-vllm runs these tests")

from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from adakv.vllm.ledger import Ledger, path_of
from adakv.vllm.plan import plan
from vllm_blocks import BLOCK, BUDGET, HEADS, block_manager

WINDOW = 32
KEPT = 5  # blocks of a compressed request


@pytest.fixture
def ledger(request: pytest.FixtureRequest) -> Iterator[str]:
    name = f"test-{request.node.name}".replace("/", "-")
    yield name
    path_of(name).unlink(missing_ok=True)


def caching_manager(ledger: str, num_blocks: int, **numbers: Any) -> KVCacheManager:
    init_none_hash(str_hash)
    usual = {"reads_outputs_again": True, "window": WINDOW}
    return block_manager(ledger, num_blocks, enable_caching=True, **usual | numbers)


def str_hash(value: Any) -> bytes:
    return str(hash(str(value))).encode()


@dataclass
class Worker:
    """The memory of a worker: of each place of a block the text up to its token, or None where
    something compressed, or nothing, is."""

    ledger: Ledger
    places: dict[int, list[int | None]] = field(
        default_factory=lambda: defaultdict(lambda: [None] * BLOCK)
    )
    num_copies: int = 0

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """All at once: nothing may be read that is written."""
        sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
        assert not set(sources) & set(targets) and len(set(targets)) == len(targets)
        read = [list(self.places[source]) for source in sources]
        self.places.update(zip(targets, read, strict=True))
        self.num_copies += len(pairs)

    def holds(self, blocks: list[int], values: list[int]) -> bool:
        used = blocks[: -(-len(values) // BLOCK)]
        held = [place for block in used for place in self.places[block]]
        return held[: len(values)] == values


def extended(values: list[int], tokens: list[int]) -> list[int]:
    """Values of a text, each of a token with all before it, up to the last of its tokens."""
    values = list(values)
    for token in tokens[len(values) :]:
        values.append(hash((values[-1] if values else 0, token)))
    return values


@dataclass
class Row:
    """A request in its worker's batch, from its first step on."""

    request: Request
    first: int  # tokens of the prefix that was cached
    prefill_end: int
    computed: int = 0
    boundary: int | None = None
    is_cut: bool = False
    values: list[int] = field(default_factory=list)  # of its text so far


@dataclass
class Item:
    """What a step does for one request."""

    row: Row
    computed: int
    count: int
    blocks: list[int]
    is_chunk: bool  # of known tokens


@dataclass
class Step:
    """A step on its way to the worker."""

    copies: list[tuple[int, int]]
    items: list[Item]


class Simulation:
    """Requests come, some with a beginning that others had, are read in chunks, write, are aborted,
    preempted or finished, while up to ``depth`` steps are in flight."""

    def __init__(
        self,
        ledger: str,
        *,
        num_blocks: int = 120,
        depth: int = 1,
        num_drafts: int = 0,
        reads_outputs_again: bool = True,
        chunk: int = 100,
        seed: int = 0,
        under_pressure: bool = False,
    ) -> None:
        self.manager = caching_manager(
            ledger,
            num_blocks,
            reads_outputs_again=reads_outputs_again,
            under_pressure=under_pressure,
        )
        self.pool = self.manager.block_pool
        (self.groups,) = self.manager.coordinator.single_type_managers
        self.worker = Worker(Ledger.open(ledger, num_blocks))
        self.depth, self.num_drafts, self.chunk = depth, num_drafts, chunk
        self.reads_outputs_again = reads_outputs_again
        self.rng = random.Random(seed)
        self.waiting: list[Request] = []
        self.running: list[Row] = []
        self.in_flight: list[Step] = []
        self.wanted: dict[str, int] = {}
        self.num_requests = self.num_preempted = self.num_read = self.num_hit = 0

    def add(self, prompt: list[int], wanted: int) -> Request:
        self.num_requests += 1
        request = Request(
            request_id=str(self.num_requests),
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(max_tokens=1000),
            pooling_params=None,
            block_hasher=get_request_block_hasher(BLOCK, str_hash),
        )
        self.wanted[request.request_id] = wanted
        self.waiting.append(request)
        return request

    def run(self) -> None:
        """Until all have finished."""
        for _ in range(10_000):
            if not self.waiting and not self.running:
                while self.in_flight:
                    self.execute(self.in_flight.pop(0))
                return
            self.step()
        raise AssertionError("it goes on for ever")

    def step(self) -> None:
        if len(self.in_flight) == self.depth:
            self.execute(self.in_flight.pop(0))
        self.manager.new_step_starts()
        items: list[Item] = []
        preempted = self.num_preempted
        for row in list(self.running):
            if row in self.running:
                self.schedule(row, items)
        while self.waiting and len(self.running) < 12 and preempted == self.num_preempted:
            if not self.admit(items):
                break
        copies, retained = self.manager.take_kv_cache_block_copies()
        self.pool.free_blocks(retained)
        self.in_flight.append(Step([tuple(pair) for pair in copies], items))

    def admit(self, items: list[Item]) -> bool:
        request = self.waiting[0]
        hit, num_hit, _ = self.manager.get_computed_blocks(request)
        count = min(self.chunk, request.num_tokens - num_hit)
        is_alone = not items and not self.running
        slots = self.manager.allocate_slots(
            request,
            count,
            num_new_computed_tokens=num_hit,
            new_computed_blocks=hit,
            full_sequence_must_fit=True,
        )
        if slots is None:
            assert not is_alone, "nothing runs, and still it does not fit"
            return False
        self.num_hit += num_hit
        end = request.num_tokens if self.reads_outputs_again else request.num_prompt_tokens
        row = Row(self.waiting.pop(0), num_hit, end, computed=num_hit)
        self.running.append(row)
        self.plan(row, num_hit, count, items, is_chunk=True)
        return True

    def schedule(self, row: Row, items: list[Item]) -> None:
        request = row.request
        computed = request.num_computed_tokens
        is_chunk = computed < max(request.num_tokens - 1, request.num_prompt_tokens)
        count = min(self.chunk, request.num_tokens - computed) if is_chunk else 1 + self.num_drafts
        while self.manager.allocate_slots(request, count) is None:
            last = self.running[-1]
            self.preempt(last, items)
            if last is row:
                return
        self.plan(row, computed, count, items, is_chunk=is_chunk)

    def plan(
        self, row: Row, computed: int, count: int, items: list[Item], *, is_chunk: bool
    ) -> None:
        request = row.request
        blocks = [block.block_id for block in self.groups.req_to_blocks[request.request_id]]
        items.append(Item(row, computed, count, blocks, is_chunk))
        request.num_computed_tokens = computed + count
        request.num_in_flight_tokens += count

    def execute(self, step: Step) -> None:
        """What a worker does, in order; then what the scheduler learns."""
        self.worker.copy(step.copies)
        for item in step.items:
            self.compress(item)
        for item in step.items:
            accepted = self.write(item)
            row, request = item.row, item.row.request
            if row not in self.running:
                continue
            request.num_in_flight_tokens -= item.count
            if not accepted:
                continue
            if not item.is_chunk:
                request.num_computed_tokens -= item.count - len(accepted)
            request.append_output_token_ids(accepted)
            if request.num_output_tokens >= self.wanted[request.request_id]:
                self.remove(row)

    def compress(self, item: Item) -> None:
        row, request = item.row, item.row.request
        if row.computed < row.prefill_end:
            return
        if row.boundary is None:
            row.boundary = row.computed
            assert row.boundary - row.first >= min(WINDOW, row.boundary)
            row.values = extended(row.values, request.all_token_ids)
            assert self.worker.holds(item.blocks, row.values[: row.boundary])
        if row not in self.running:
            return
        order = self.worker.ledger.order(item.blocks[0], row.boundary, row.computed)
        assert (order is None) == (kept(row.boundary) is None)
        if order is None or not order.budget or order.at != row.computed:
            return
        assert not row.is_cut
        row.is_cut = True
        self.worker.ledger.done(item.blocks[0], row.boundary)
        for block in [*item.blocks[:KEPT], *item.blocks[row.boundary // BLOCK :]]:
            self.worker.places[block] = [None] * BLOCK

    def write(self, item: Item) -> list[int]:
        """Reads and writes entries; the tokens that come of it."""
        row, worker = item.row, self.worker
        known, begin, end = list(row.request.all_token_ids), row.computed, row.computed + item.count
        row.values = extended(row.values, known)
        if not row.is_cut and row in self.running:
            assert worker.holds(item.blocks, row.values[:begin])
        self.num_read += item.count if item.is_chunk else 0
        drafts = random_text(self.rng, item.count)
        values = extended(row.values, known + drafts)
        for place in range(begin, end):
            # A row that is gone may be ahead of what anybody heard of it.
            value = None if row.is_cut or place >= len(values) else values[place]
            worker.places[item.blocks[place // BLOCK]][place % BLOCK] = value
        if row.is_cut:
            assert all(worker.places[block] == [None] * BLOCK for block in item.blocks[:KEPT])
        if item.is_chunk:
            row.computed = end
            return drafts[:1] if end >= len(known) else []
        accepted = self.rng.randint(1, item.count)
        row.computed += accepted
        return drafts[:accepted]

    def preempt(self, row: Row, items: list[Item]) -> None:
        self.num_preempted += 1
        self.remove(row)
        request = row.request
        request.num_computed_tokens = request.num_in_flight_tokens = 0
        items[:] = [item for item in items if item.row is not row]
        self.waiting.insert(0, request)

    def remove(self, row: Row) -> None:
        self.manager.free(row.request)
        self.running.remove(row)

    def check_all_is_free(self) -> None:
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1
        assert not any(map(self.worker.ledger.is_running, range(self.pool.num_gpu_blocks)))


def kept(boundary: int) -> Any:
    return plan(boundary, budget=BUDGET, block_size=BLOCK, num_kv_heads=HEADS)


def random_text(rng: random.Random, length: int) -> list[int]:
    return rng.choices(range(100), k=length)


@pytest.mark.parametrize("reads_outputs_again", [False, True], ids=["first", "second"])
@pytest.mark.parametrize(
    ("num_drafts", "under_pressure"),
    [(0, False), (3, False), (0, True)],
    ids=["always", "drafts", "pressure"],
)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_blocks_hold_what_their_requests_read(
    ledger: str, depth: int, num_drafts: int, under_pressure: bool, reads_outputs_again: bool
):
    """Thousands of steps of requests with common beginnings: each finds its own text in its blocks
    in every step, and compressed blocks are nobody else's."""
    sim = Simulation(
        ledger,
        depth=depth,
        num_drafts=num_drafts,
        reads_outputs_again=reads_outputs_again,
        seed=depth,
        under_pressure=under_pressure,
    )
    rng = sim.rng
    begins = [random_text(rng, n) for n in (50, 200, 350)]
    said: list[list[int]] = []
    for _ in range(600):
        if len(sim.waiting) < 3 and rng.random() < 0.3:
            begin = rng.choice(begins + said[-5:])
            begin = begin[: rng.randint(1, len(begin))] if rng.random() < 0.3 else begin
            prompt = (begin + random_text(rng, rng.choice([0, 0, 1, 20, 200])))[:600]
            said.append(prompt)
            sim.add(prompt, rng.choice([1, 5, 200]))
        if sim.running and rng.random() < 0.02:
            row = rng.choice(sim.running)
            said.append(list(row.request.all_token_ids))
            sim.remove(row)  # aborted by its client
        if sim.running and rng.random() < 0.02:
            sim.preempt(rng.choice(sim.running), [])
        sim.step()
    assert sim.num_preempted > 0 and sim.worker.num_copies > 100
    assert sim.num_hit > sim.num_read / 4
    for row in list(sim.running):
        sim.remove(row)
    sim.check_all_is_free()


def blocks_of(sim: Simulation, request: Request) -> list[int]:
    return [block.block_id for block in sim.groups.req_to_blocks[request.request_id]]


def test_second_turn_reads_what_the_first_one_wrote_and_the_window(ledger: str):
    """The first prompt, compressed by then, is found but for a part of a block."""
    sim = Simulation(ledger)
    prompt = random_text(sim.rng, 300)
    first = sim.add(prompt, 40)
    sim.run()
    assert (sim.num_read, sim.num_hit, sim.worker.num_copies) == (300, 0, KEPT)
    sim.add([*first.all_token_ids, *random_text(sim.rng, 30)], 3)
    sim.run()
    assert sim.num_hit == 300 // BLOCK * BLOCK
    # Nobody else used its blocks: they were taken over, and then the cache got copies again.
    assert sim.worker.num_copies == 2 * KEPT
    again = sim.num_hit
    sim.add(prompt, 3)
    sim.run()
    assert sim.num_hit - again == (300 - WINDOW) // BLOCK * BLOCK
    sim.check_all_is_free()


def test_whole_request_offers_what_it_wrote(ledger: str):
    """As in vLLM: nothing is lost of a text that is never compressed."""
    sim = Simulation(ledger)
    first = sim.add(random_text(sim.rng, 40), 61)
    sim.run()
    sim.add([*first.all_token_ids, *random_text(sim.rng, 30)], 3)
    sim.run()
    assert sim.num_hit == (40 + 60) // BLOCK * BLOCK


def test_prompts_that_run_at_once_share_all_but_their_first_blocks(ledger: str):
    """Two requests with a beginning that a third one has read, which is still running."""
    sim = Simulation(ledger, chunk=400)
    begin = random_text(sim.rng, 320)
    sim.add(begin, 50)
    sim.step()
    requests = [sim.add(begin + random_text(sim.rng, 40), 50) for _ in range(2)]
    sim.step()
    first, second = (blocks_of(sim, request) for request in requests)
    assert not set(first[:KEPT]) & set(second[:KEPT])
    assert first[KEPT:20] == second[KEPT:20]
    sim.run()
    assert sim.num_hit == 2 * 320 and sim.num_read == 320 + 2 * 40
    sim.check_all_is_free()


def test_prompt_waits_for_the_step_that_reads_its_beginning(ledger: str):
    """One step, instead of reading it too: what a step writes can't be copied before it."""
    sim = Simulation(ledger, chunk=400)
    begin = random_text(sim.rng, 320)
    for _ in range(3):
        sim.add(begin + random_text(sim.rng, 40), 5)
    other = sim.add(random_text(sim.rng, 50), 5)
    sim.step()
    assert len(sim.running) == 1
    sim.step()
    assert len(sim.running) == 4 and sim.num_hit == 2 * 320
    sim.run()
    assert sim.num_read == 360 + 2 * 40 + other.num_prompt_tokens
    sim.check_all_is_free()


@pytest.mark.parametrize("wanted", [1, 30])
def test_prompt_of_the_whole_pool_comes_again(ledger: str, wanted: int):
    """Its cached blocks are the only ones: it takes them over, and has no room for copies."""
    sim = Simulation(ledger, num_blocks=21, chunk=64)
    prompt = random_text(sim.rng, 20 * BLOCK - 29)
    for _ in range(3):
        sim.add(prompt, wanted)
        sim.run()
    assert sim.num_hit >= (2 if wanted == 1 else 0) * 240
    sim.check_all_is_free()


def test_cache_loses_its_copies_before_a_request_loses_its_blocks(ledger: str):
    """Two prompts take all of the pool when the first of them ends: nothing can be copied, nobody
    is preempted, and the first blocks are read again later."""
    sim = Simulation(ledger, num_blocks=41, chunk=64)
    prompts = [random_text(sim.rng, n) for n in (300, 330)]
    for prompt in prompts:
        sim.add(prompt, 10)
    while not sim.groups.boundary("1"):
        sim.step()
    assert sim.worker.num_copies < KEPT
    sim.run()
    assert sim.num_preempted == 0
    sim.add(prompts[0], 3)
    sim.run()
    assert sim.num_hit < 300 - WINDOW - BLOCK
    sim.check_all_is_free()


def test_hit_on_a_copy_of_the_same_step_reads_its_source(ledger: str):
    """A prompt ends, so that the cache gets copies, and a request comes that begins as it does."""
    sim = Simulation(ledger, chunk=400)
    prompt = random_text(sim.rng, 320)
    first = sim.add(prompt, 50)
    sim.step()
    second = sim.add(prompt + random_text(sim.rng, 40), 50)
    own = blocks_of(sim, first)[:KEPT]
    sim.step()
    copies = sim.in_flight[-1].copies
    assert [source for source, _ in copies] == own + own
    assert [target for _, target in copies][KEPT:] == blocks_of(sim, second)[:KEPT]
    sim.run()
    sim.check_all_is_free()


@pytest.mark.parametrize("reads_outputs_again", [False, True], ids=["first", "second"])
def test_preempted_request_finds_what_it_has_read(ledger: str, reads_outputs_again: bool):
    """Not with the first model runner, for which its own words are no prompt."""
    sim = Simulation(ledger, reads_outputs_again=reads_outputs_again)
    sim.add(random_text(sim.rng, 300), 100)
    while not sim.running or sim.running[0].request.num_output_tokens < 20:
        sim.step()
    sim.execute(sim.in_flight.pop())
    sim.preempt(sim.running[0], [])
    sim.run()
    assert sim.num_hit == (288 if reads_outputs_again else 0)
    sim.check_all_is_free()


def test_policy_that_hears_all_queries_finds_nothing(ledger: str):
    sim = Simulation(ledger, num_blocks=50)
    sim.manager = caching_manager(ledger, 50, window=None)
    sim.pool = sim.manager.block_pool
    (sim.groups,) = sim.manager.coordinator.single_type_managers
    prompt = random_text(sim.rng, 300)
    for _ in range(2):
        sim.add(prompt, 5)
        sim.run()
    assert (sim.num_hit, sim.num_read, sim.worker.num_copies) == (0, 600, 0)
    assert len(sim.pool.cached_block_hash_to_block) == 0
    sim.check_all_is_free()
