"""The scheduler's half alone: vLLM's own manager of blocks, driven for thousands of steps."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("vllm.v1", reason="vllm isn't installed; make test-vllm runs these tests")

from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request

import adakv
from adakv.vllm.ledger import Ledger, path_of
from adakv.vllm.plan import Plan, end_of_text, plan
from vllm_blocks import BLOCK, BUDGET, HEADS, block_manager

NUM_BLOCKS, DECODE_BUDGET = 120, 40


@pytest.fixture
def ledger(request: pytest.FixtureRequest) -> Any:
    name = f"test-{request.node.name}".replace("/", "-")
    yield Ledger.open(name, NUM_BLOCKS)
    path_of(name).unlink(missing_ok=True)


@dataclass
class Sequence:
    """A request, and what its worker knows of it."""

    request: Request
    wanted: int  # tokens to write
    prefill_end: int  # tokens that its worker reads as a prompt
    turn: int = 0  # how often it started again
    boundary: int | None = None  # as its worker found it
    cut_at: int | None = None  # tokens before the step that compressed it
    due: int = 0  # tokens from which on its text is chosen from
    last: int = 0  # tokens before the step that did so last
    unread: list[tuple[int, range]] = field(default_factory=list)  # since when; blocks given back


@dataclass
class Item:
    """What a step does for one request."""

    sequence: Sequence
    turn: int
    computed: int
    count: int
    most_written: int  # tokens: 0, if it reads text without its end
    blocks: list[int]  # of its worker's block table


@dataclass
class Simulation:
    """Requests come, are read in chunks, write with drafts, are preempted, aborted or finished,
    while up to ``depth`` steps are in flight."""

    ledger: Ledger
    manager: KVCacheManager
    depth: int
    num_drafts: int
    reads_outputs_again: bool
    rng: random.Random
    chunk: int = 100
    running: list[Sequence] = field(default_factory=list)
    waiting: list[Sequence] = field(default_factory=list)
    in_flight: list[list[Item]] = field(default_factory=list)
    num_requests: int = 0
    num_preempted: int = 0
    num_chosen: int = 0
    every: int = 0
    most_wanted: int = 200
    most_running: int = 0

    @property
    def blocks_of(self) -> dict[str, list[Any]]:
        return self.manager.coordinator.single_type_managers[0].req_to_blocks

    def step(self) -> None:
        if len(self.in_flight) == self.depth:
            self.process(self.in_flight.pop(0))
        self.manager.new_step_starts()
        if self.running and self.rng.random() < 0.01:
            self.remove(self.rng.choice(self.running))  # aborted by its client
        if self.running and self.rng.random() < 0.01:
            self.preempt(self.rng.choice(self.running))
        self.admit_some()
        items: list[Item] = []
        left = 300
        for sequence in list(self.running):
            if sequence in self.running and left > 0:
                left -= self.schedule(sequence, items, left)
        alive = [item for item in items if self.is_alive(item)]
        self.in_flight.append(alive)
        self.check_nothing_was_freed_early()

    def admit_some(self) -> None:
        if not self.waiting and self.rng.random() < 0.3:
            self.num_requests += 1
            length = self.rng.randint(1, 600)
            request = Request(
                request_id=str(self.num_requests),
                prompt_token_ids=[0] * length,
                sampling_params=SamplingParams(max_tokens=500),
                pooling_params=None,
            )
            wanted = self.rng.randint(1, self.most_wanted)
            self.waiting.append(Sequence(request, wanted, length))
        if self.waiting and len(self.running) < 12:
            sequence = self.waiting[0]
            count = min(self.chunk, sequence.request.num_tokens)
            if self.manager.allocate_slots(sequence.request, count, full_sequence_must_fit=True):
                self.running.append(self.waiting.pop(0))
                self.most_running = max(self.most_running, len(self.running))

    def schedule(self, sequence: Sequence, items: list[Item], left: int) -> int:
        request = sequence.request
        computed = request.num_computed_tokens
        if computed < request.num_tokens - 1 or computed < request.num_prompt_tokens:
            count = min(self.chunk, left, request.num_tokens - computed)
            most_written = int(computed + count == request.num_tokens)
        else:
            count = most_written = 1 + self.num_drafts
        while self.manager.allocate_slots(request, count) is None:
            last = self.running[-1]
            self.preempt(last)
            if last is sequence:
                return 0
        blocks = [block.block_id for block in self.blocks_of[request.request_id]]
        assert self.ledger.is_running(blocks[0])
        items.append(Item(sequence, sequence.turn, computed, count, most_written, blocks))
        request.num_computed_tokens += count
        request.num_in_flight_tokens += count
        return count

    def process(self, items: list[Item]) -> None:
        """The oldest step has run: first what its worker did, then what the scheduler learns."""
        for item in items:
            sequence, request = item.sequence, item.sequence.request
            if not self.is_alive(item):
                continue
            if item.computed >= sequence.prefill_end:
                if sequence.due:
                    self.choose(sequence, item.computed)
                else:
                    self.obey(sequence, item.computed)
            request.num_in_flight_tokens -= item.count
            if not item.most_written:
                continue
            accepted = self.rng.randint(1, item.most_written)
            request.num_computed_tokens -= item.most_written - accepted  # drafts
            request.append_output_token_ids([0] * accepted)
            if request.num_output_tokens >= sequence.wanted:
                self.remove(sequence)

    def obey(self, sequence: Sequence, computed: int) -> None:
        """What its worker does with a request behind its prompt."""
        if sequence.boundary is None:
            sequence.boundary = computed
        first_block = self.blocks_of[sequence.request.request_id][0].block_id
        order = self.ledger.order(first_block, sequence.boundary, computed)
        planned = kept(sequence.boundary)
        assert (order is None) == (planned is None and not self.every)
        if order is None or order.at != computed or not (order.budget or order.due):
            return
        if order.budget:
            assert sequence.cut_at is None and order.budget == BUDGET and planned is not None
            sequence.cut_at = computed
            sequence.unread.append((computed, range(*planned)))
        self.ledger.done(first_block, sequence.boundary)
        sequence.due, sequence.last = order.due, sequence.boundary

    def choose(self, sequence: Sequence, computed: int) -> None:
        """What its worker does with a request whose text is chosen from."""
        first_block = self.blocks_of[sequence.request.request_id][0].block_id
        if computed < sequence.due:
            return
        order = self.ledger.order(first_block, sequence.last, computed)
        if order is None or order.at != computed:
            return
        assert sequence.boundary is not None and order.budget == DECODE_BUDGET
        sizes = {"decode_budget": DECODE_BUDGET, "block_size": BLOCK, "num_kv_heads": HEADS}
        end = end_of_text(sequence.boundary, kept(sequence.boundary), **sizes)
        assert end <= computed // BLOCK and order.due == computed + self.every
        sequence.unread.append((computed, range(end, computed // BLOCK)))
        self.ledger.done(first_block, computed)
        sequence.due, sequence.last = order.due, computed
        self.num_chosen += 1

    def is_alive(self, item: Item) -> bool:
        return item.sequence in self.running and item.sequence.turn == item.turn

    def remove(self, sequence: Sequence) -> None:
        self.manager.free(sequence.request)
        self.running.remove(sequence)

    def preempt(self, sequence: Sequence) -> None:
        self.num_preempted += 1
        self.remove(sequence)
        request = sequence.request
        request.num_computed_tokens = request.num_in_flight_tokens = 0
        sequence.turn, sequence.boundary, sequence.cut_at = sequence.turn + 1, None, None
        sequence.due, sequence.unread = 0, []
        if self.reads_outputs_again:
            sequence.prefill_end = request.num_tokens
        self.waiting.insert(0, sequence)

    def check_nothing_was_freed_early(self) -> None:
        """What steps in flight read and write still belongs to their requests.

        That are all of a request's blocks up to the step that compresses it, and then the first
        ones and those behind the prompt.
        """
        for items in self.in_flight:
            for item in filter(self.is_alive, items):
                sequence = item.sequence
                blocks = self.blocks_of[sequence.request.request_id]
                unread = [blocks for at, blocks in sequence.unread if item.computed > at]
                for index, block in enumerate(item.blocks):
                    is_unread = any(index in some for some in unread)
                    assert is_unread or blocks[index].block_id == block


def kept(boundary: int) -> Plan | None:
    return plan(boundary, budget=BUDGET, block_size=BLOCK, num_kv_heads=HEADS)


@pytest.mark.parametrize("reads_outputs_again", [False, True], ids=["first", "second"])
@pytest.mark.parametrize(
    ("num_drafts", "under_pressure"),
    [(0, False), (3, False), (0, True)],
    ids=["always", "drafts", "pressure"],
)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_scheduler_frees_only_what_no_step_in_flight_reads(
    ledger: Ledger,
    request: pytest.FixtureRequest,
    depth: int,
    num_drafts: int,
    under_pressure: bool,
    reads_outputs_again: bool,
):
    """10,000 steps at each depth; with both definitions of a prompt after a preemption."""
    name = f"test-{request.node.name}".replace("/", "-")
    manager = block_manager(
        name,
        NUM_BLOCKS,
        reads_outputs_again=reads_outputs_again,
        under_pressure=under_pressure,
    )
    sim = Simulation(ledger, manager, depth, num_drafts, reads_outputs_again, random.Random(depth))
    for _ in range(2_500):
        sim.step()
    assert ledger.counts.requests_compressed > 20 and sim.num_preempted > 0
    assert ledger.counts.compressed_under_pressure == under_pressure * (
        ledger.counts.requests_compressed
    )
    for sequence in list(sim.running):
        sim.remove(sequence)
    assert manager.block_pool.get_num_free_blocks() == NUM_BLOCKS - 1
    assert not any(map(ledger.is_running, range(NUM_BLOCKS)))


@pytest.mark.parametrize("reads_outputs_again", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("under_pressure", [False, True], ids=["always", "pressure"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_scheduler_chooses_from_texts_and_frees_only_what_no_step_in_flight_reads(
    ledger: Ledger,
    request: pytest.FixtureRequest,
    depth: int,
    under_pressure: bool,
    reads_outputs_again: bool,
):
    """10,000 steps at each depth; texts of up to 480 tokens, which hold up to 72 of them."""
    name = f"test-{request.node.name}".replace("/", "-")
    numbers = {"reads_outputs_again": reads_outputs_again, "under_pressure": under_pressure}
    numbers |= {"decode_budget": DECODE_BUDGET, "every": 32, "decode_window": 8}
    manager = block_manager(name, NUM_BLOCKS, **numbers)
    sim = Simulation(ledger, manager, depth, 0, reads_outputs_again, random.Random(depth))
    sim.every, sim.most_wanted = 32, 480
    for _ in range(2_500):
        sim.step()
    assert sim.num_chosen > 100 and sim.num_preempted > 0
    assert 0 <= sim.num_chosen - ledger.counts.texts_compressed < 100
    for sequence in list(sim.running):
        sim.remove(sequence)
    assert manager.block_pool.get_num_free_blocks() == NUM_BLOCKS - 1
    assert not any(map(ledger.is_running, range(NUM_BLOCKS))) and not ledger.has_orders


def test_scheduler_that_hears_of_another_boundary_frees_nothing(ledger: Ledger, request):
    name = f"test-{request.node.name}"
    sim = Simulation(
        ledger,
        block_manager(name, NUM_BLOCKS, reads_outputs_again=False),
        1,
        0,
        False,
        random.Random(0),
    )
    long = Request(
        request_id="long",
        prompt_token_ids=[0] * 400,
        sampling_params=SamplingParams(max_tokens=9),
        pooling_params=None,
    )
    sim.manager.allocate_slots(long, 400, full_sequence_must_fit=True)
    long.num_computed_tokens = 400
    long.append_output_token_ids([0])
    sim.manager.allocate_slots(long, 1)
    first_block = sim.blocks_of["long"][0].block_id
    with pytest.raises(adakv.Error, match=r"about to compress 399 tokens .* planned 400"):
        ledger.order(first_block, 399, 400)
    ledger.done(first_block, 399)
    long.num_computed_tokens = 401
    long.append_output_token_ids([0])
    before = sim.manager.block_pool.get_num_free_blocks()
    with pytest.raises(adakv.Error, match="compressed at 400 tokens, but a worker did so at 399"):
        sim.manager.allocate_slots(long, 1)
    assert sim.manager.block_pool.get_num_free_blocks() == before


def new_request(name: str, length: int, **wishes: Any) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=[0] * length,
        sampling_params=SamplingParams(max_tokens=100, extra_args={"adakv": wishes}),
        pooling_params=None,
    )


def run_step(sim: Simulation, requests: list[Request]) -> list[str]:
    """All of these read their prompts or write a token; which of them workers compressed."""
    sim.manager.new_step_starts()
    counts = [max(1, r.num_tokens - r.num_computed_tokens) for r in requests]
    for request, count in zip(requests, counts, strict=True):
        assert sim.manager.allocate_slots(request, count, full_sequence_must_fit=count > 1)
    compressed = []
    for request, count in zip(requests, counts, strict=True):
        first_block = sim.blocks_of[request.request_id][0].block_id
        boundary, computed = request.num_prompt_tokens, request.num_computed_tokens
        order = sim.ledger.order(first_block, boundary, computed)
        if order is not None and order.budget and order.at == computed:
            sim.ledger.done(first_block, boundary)
            compressed.append(request.request_id)
        request.num_computed_tokens += count
        request.append_output_token_ids([0])
    return compressed


def simulation(ledger: Ledger, name: str, **numbers: Any) -> Simulation:
    manager = block_manager(f"test-{name}", NUM_BLOCKS, reads_outputs_again=True, **numbers)
    return Simulation(ledger, manager, 1, 0, True, random.Random(0))


def test_scheduler_has_the_longest_compressed_when_a_request_waits(ledger: Ledger, request):
    sim = simulation(ledger, request.node.name, under_pressure=True)
    requests = [new_request(f"{n}", n) for n in (400, 600, 300)]
    assert run_step(sim, requests) == run_step(sim, requests) == []
    late = new_request("late", 560)
    assert sim.manager.allocate_slots(late, 560, full_sequence_must_fit=True) is None
    assert run_step(sim, requests) == ["600"]
    assert sim.manager.allocate_slots(late, 560, full_sequence_must_fit=True) is None
    assert run_step(sim, requests) == []
    free = sim.manager.block_pool.get_num_free_blocks()
    assert run_step(sim, [*requests, late]) == []
    assert sim.manager.block_pool.get_num_free_blocks() == free - 35
    assert ledger.counts.compressed_under_pressure == 1
    assert ledger.counts.preemptions_avoided == 0


def test_scheduler_has_requests_compressed_before_running_ones_are_short(ledger: Ledger, request):
    sim = simulation(ledger, request.node.name, under_pressure=True)
    requests = [new_request("off", 640, policy="off"), new_request("on", 600, budget=32)]
    requests.append(new_request("wrong", 500, budget=BUDGET + 1))
    while not ledger.counts.compressed_under_pressure:
        run_step(sim, requests)
    assert sim.manager.block_pool.get_num_free_blocks() > 1
    assert ledger.counts.preemptions_avoided == 1
    given_back = plan(600, budget=32, block_size=BLOCK, num_kv_heads=HEADS)
    assert ledger.counts.blocks_given_back == given_back.tail - given_back.kept_blocks


@pytest.mark.parametrize("under_pressure", [False, True])
def test_request_comes_in_only_beside_what_running_ones_still_read(
    ledger: Ledger, request: pytest.FixtureRequest, under_pressure: bool
):
    name = request.node.name.replace("/", "-")
    sim = simulation(ledger, name, under_pressure=under_pressure)
    first, second = new_request("first", 1600), new_request("second", 320)
    assert sim.manager.allocate_slots(first, 100, full_sequence_must_fit=True)
    first.num_computed_tokens = 100
    assert sim.manager.allocate_slots(second, 100, full_sequence_must_fit=True) is None
    short = new_request("short", 200)
    assert sim.manager.allocate_slots(short, 100, full_sequence_must_fit=True)
