"""The worker's half where texts are chosen from, against lists of places and float64; vLLM isn't
needed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import reference
from adakv.policy import Adaptive, Policy, TopScore, WindowAttention, get
from adakv.reselection import Rule
from adakv.vllm.config import Settings
from adakv.vllm.later import Later
from adakv.vllm.metadata import batch_of
from adakv.vllm.plan import Order, end_of_text
from adakv.vllm.texts import MOST_ROWS, Counts, Due, Text, together
from engine_steps import (
    BLOCK,
    BUDGET,
    GROUP,
    HEADS,
    LAYERS,
    NUM_BLOCKS,
    SCALE,
    Request,
    Steps,
    run_step,
)

WINDOW, FLOOR = 4, 0.2
RULE = Rule(
    Policy(WindowAttention(window=WINDOW), Adaptive(floor=FLOOR), TopScore()), 24, every=2 * BLOCK
)


class TextSteps(Steps):
    """Also orders choices, makes them by the definition, and uses the blocks that come back."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, rule=RULE, **more)
        self.chosen: list[list[Request]] = []  # in each step, if there were any
        self._ends: dict[Request, int] = {}  # of their prompts
        self._due: list[Request] = []

    def end_prompts(self) -> None:
        super().end_prompts()
        self._due = []
        self._ends = {x: end for x, end in self._ends.items() if x in self.requests}
        for request in self.requests:
            order = request.order
            if order is None:
                self._ends.pop(request, None)
                continue
            if not order.due:
                self._ends[request] = request.boundary
                due = max(request.boundary + RULE.most, request.computed + WINDOW)
                request.order = order._replace(due=due)
            elif request.computed >= order.due:
                due = request.computed + RULE.every
                request.order = Order(request.computed, request.boundary, RULE.budget, (), due)
                self._due.append(request)
                self._choose(request)
                request.boundary = request.computed
            self.told.orders[request.blocks[0]] = request.order
        self.chosen += [self._due] * bool(self._due)

    def give_back(self) -> None:
        for request, prompt in self._ends.items():
            planned = self.plan(prompt, request.budget)
            if planned is not None and request.kept:
                self.take_back(request, *planned)
            if request in self._due:
                end = end_of_text(
                    prompt,
                    planned,
                    decode_budget=RULE.budget,
                    block_size=BLOCK,
                    num_kv_heads=self.rows_of_layer,
                )
                self.take_back(request, end, request.boundary // BLOCK)

    def _choose(self, request: Request) -> None:
        """Ada-KV's shares of what rows hold of the text, its newest entries apart."""
        computed, prompt = request.computed, self._ends[request]
        new = torch.arange(request.boundary, computed, device=self.device)
        everything = torch.arange(computed, device=self.device)
        kept = request.kept or [[everything[: request.boundary]] * HEADS] * LAYERS
        request.kept = []
        for layer in range(LAYERS):
            rows = [torch.cat([row, new]) for row in kept[layer]]
            scores = [self._scored(request, layer, h, row) for h, row in enumerate(rows)]
            for row, of_row in zip(rows, scores, strict=True):
                of_row[row < prompt] = -torch.inf
                of_row[-WINDOW:] = -torch.inf
            most = HEADS * (RULE.budget - WINDOW)
            best = torch.cat(scores).topk(most).indices
            ends = torch.tensor([len(row) for row in rows], device=self.device).cumsum(0)
            wins = torch.bucketize(best, ends, right=True).bincount(minlength=HEADS).tolist()
            shares = [(1 - FLOOR) * win + FLOOR * most / HEADS for win in wins]
            counts = reference.largest_remainder(shares, most)
            found = []
            for row, of_row, count in zip(rows, scores, counts, strict=True):
                stays = row < prompt
                stays[-WINDOW:] = True
                # Equal ones are neighbours; the first of them stay.
                stays[of_row.sort(descending=True, stable=True).indices[:count]] = True
                found.append(row[stays])
            request.kept.append(found)

    def _scored(self, request: Request, layer: int, head: int, row: torch.Tensor) -> torch.Tensor:
        """``[len(row)]``"""
        newest = slice(request.computed - WINDOW, request.computed)
        queries = request.queries[layer, newest, head * GROUP : (head + 1) * GROUP]
        of_candidates = reference.score(
            queries.transpose(0, 1)[None].double(),
            request.keys[layer, row, head][None, None].to(self.dtype).double(),
            scale=SCALE,
        )[0, 0]
        scores = torch.full((len(row),), -torch.inf, dtype=torch.float64, device=self.device)
        scores[: len(of_candidates)] = of_candidates[: len(row)]
        return scores


def run_texts(steps: TextSteps, number_of_steps: int, *, waits: bool = False) -> None:
    """Prompts that are compressed or not, whose texts are due together or apart; requests that come
    and go or have to start again."""
    rng = random.Random(1)
    for number in range(number_of_steps):
        while len(steps.requests) < 4:
            request = steps.add(rng.choice([5, 20, BUDGET, 100, 140, 161]))
            request.wait = rng.choice([0, 1, 3, 60]) if waits else 0
        counts = []
        for request in steps.requests:
            left = request.prompt - request.computed
            counts.append(min(left, rng.randint(40, 90)) if left > 0 else rng.choice([1, 1, 1, 2]))
        run_step(steps, counts)
        for request in list(steps.requests):
            if request.computed > 440:
                steps.remove(request)
        if number % 90 == 60:
            steps.remove(rng.choice(steps.requests))
        if number % 90 == 30:
            steps.preempt(rng.choice(steps.requests))


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("mode", ["fill", "exact"])
@pytest.mark.parametrize("name", ["ada_snapkv", "model_column_max"])
def test_rows_hold_what_is_chosen(device: torch.device, name: str, mode: str, waits: bool):
    """A step chooses from all its texts at once, whatever the length of each."""
    steps = TextSteps(Settings(name, BUDGET, mode).policy_for(BLOCK), device, torch.float32)
    run_texts(steps, 250, waits=waits)
    assert sum(map(len, steps.chosen)) > 12 and max(map(len, steps.chosen)) > 1
    for request in list(steps.requests):
        steps.remove(request)
    assert sorted(steps.free) == list(range(1, NUM_BLOCKS))


@pytest.mark.parametrize(("kv_dtype", "dtype"), [("int8", torch.float16), ("fp8", torch.bfloat16)])
@pytest.mark.parametrize("name", ["ada_snapkv", "model_column_max"])
def test_codes_move_as_they_are(device: torch.device, name: str, kv_dtype: str, dtype: torch.dtype):
    chosen = Settings(name, BUDGET).policy_for(BLOCK)
    steps = TextSteps(chosen, device, dtype, kv_dtype=kv_dtype)
    run_texts(steps, 120)
    assert sum(map(len, steps.chosen)) > 4


@pytest.mark.parametrize(
    "name", ["r_kv", "critical_ada_snapkv", "corm", "streaming", "keydiff", "tova", "knorm"]
)
def test_a_choice_depends_on_no_other_text(device: torch.device, name: str):
    """A long one beside short ones, in one choice."""
    rule = Rule(get(name), 70, every=2 * BLOCK)
    prompts = [20, 100, 23]
    alone = [written(device, rule, [prompt])[0] for prompt in prompts]
    together = written(device, rule, prompts)
    for out, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(out, expected)


def written(device: torch.device, rule: Rule, prompts: list[int]) -> list[torch.Tensor]:
    """What attention gave requests that are chosen from twice, at the same steps."""
    torch.manual_seed(0)  # of the output projections
    steps = Steps(get("ada_snapkv"), device, torch.float32, rule=rule)
    for prompt in prompts:
        torch.manual_seed(prompt)
        steps.add(prompt)
    outs: list[list[torch.Tensor]] = [[] for _ in prompts]
    for number in range(rule.most + rule.every + 10):
        counts = [1] * len(prompts) if number else prompts
        metadata = steps.describe(counts)
        for request in steps.requests:
            order, computed = request.order, request.computed
            if number == 1:
                due = computed + rule.most
                request.order = Order(computed, computed, BUDGET, (), due)
            elif order is not None and computed == order.due:
                request.order = Order(computed, order.at, rule.budget, (), computed + rule.every)
            if request.order is not None:
                steps.told.orders[request.blocks[0]] = request.order
        step = steps.cache.begin_step(batch_of(metadata))
        for layer in range(LAYERS):
            given = steps.inputs(layer, counts)
            out = torch.empty_like(given[0])
            steps.cache.attend(layer, step, *given, out)
            for of_request, new in zip(outs, out.split(counts), strict=True):
                of_request.append(new)
        steps.advance(counts)
    return [torch.cat(of_request) for of_request in outs]


@pytest.mark.parametrize(
    ("rows", "lengths", "sizes"),
    [
        (16, [100, 60000, 100, 5, 70000, 3], [1, 1, 2, 1, 1]),
        (16, [30000, 30000, 30000, 1], [2, 2]),
        (MOST_ROWS // 3, [40] * 7, [3, 3, 1]),
        (MOST_ROWS * 2, [40] * 2, [1, 1]),
    ],
)
def test_choices_are_bounded(rows: int, lengths: list[int], sizes: list[int]):
    """In what they look at, and in rows; each text is in one, in their order."""
    counts = Counts(Later(torch.zeros(1, 2, rows // 2)), 0)
    text = Text(1, [], 0, 0, counts, counts)
    due = [Due(i, text, 0, 0, [], [[n] * (rows // 2)] * 2) for i, n in enumerate(lengths)]
    found = list(together(due))
    assert [len(some) for some in found] == sizes
    assert [it for some in found for it in some] == due
