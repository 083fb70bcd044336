"""What must stay of prompts: in which forms it is given, and that every policy keeps it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from adakv.policy import (
    Adaptive,
    Budget,
    LayerInputs,
    ModelWide,
    Policy,
    Profile,
    Protection,
    Pyramid,
    TokenClasses,
    TopScore,
    TwoStage,
    Uniform,
    WholePages,
    WindowAttention,
    get,
    names,
    spans_of,
)
from adakv.policy.protection import mask_of
from adakv.reading import Part, Reader
from cases import Prompt
from policy.helpers import kept_rows, layer_inputs, rotate

LAYERS, LENGTH, WINDOW = 3, 150, 32
SPANS = ((7, 20), (60, 64))
PROTECTED = {*range(7, 20), *range(60, 64)}


def mask(length: int, *spans: tuple[int, int]) -> torch.Tensor:
    return mask_of([spans], length, torch.device("cpu"))[0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, [(), ()]),
        ([], [(), ()]),
        ([(3, 5)], [((3, 5),)] * 2),
        ([[8, 9], (np.int64(3), 5)], [((3, 5), (8, 9))] * 2),
        ([(0, 4), (2, 6), (6, 7)], [((0, 7),)] * 2),
        ([(5, 40)], [((5, 10),)] * 2),
        ([(10, 40)], [()] * 2),
        (mask(10, (0, 2), (9, 10)), [((0, 2), (9, 10))] * 2),
        (mask(10, (4, 6)).numpy(), [((4, 6),)] * 2),
        (torch.stack([mask(10, (1, 2)), mask(10)]), [((1, 2),), ()]),
        ([[(1, 2)], []], [((1, 2),), ()]),
        ([None, [(1, 2)]], [(), ((1, 2),)]),
        ([mask(10, (0, 10)), [(1, 2)]], [((0, 10),), ((1, 2),)]),
    ],
    ids=str,
)
def test_protection_is_given_as_spans_or_masks(given: Any, expected: list[Any]):
    assert Protection.given(given).spans([10, 10]) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0, 4), r"protect must be spans \[\(begin, end\), ...\] .* got 0 in the list"),
        (4, "protect must be spans .* got 4"),
        ("0:4", "protect must be spans .* got '0:4'"),
        ([(4, 4)], r"got \(4, 4\)"),
        ([(-1, 4)], r"got \(-1, 4\)"),
        ([(0, 4.5)], r"got \(0, 4.5\) in the list"),
        ([(True, False)], r"got \(True, False\) in the list"),
        ([(0, 4), []], r"got \(0, 4\) in the list"),
        ([(0, 4), [(1, 2)]], r"got \(0, 4\) in the list"),
        (torch.ones(10), "protect must be spans"),
        (torch.ones(1, 2, 10, dtype=torch.bool), r"got a mask \[1, 2, 10\]"),
        ([torch.ones(2, 10, dtype=torch.bool)], r"got a mask \[2, 10\]"),
    ],
    ids=str,
)
def test_protection_refuses_what_is_ambiguous(given: Any, message: str):
    with pytest.raises(ValueError, match=message):
        Protection.given(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[(0, 4)]], "one list or row for each of 2 sequences, got 1"),
        (torch.ones(3, 10, dtype=torch.bool), "for each of 2 sequences, got 3"),
        (torch.ones(12, dtype=torch.bool), "sequence 1 has 10, and its mask 12"),
        (torch.ones(2, 12, dtype=torch.bool), "without padding: sequence 1 has 10"),
    ],
    ids=str,
)
def test_protection_is_for_the_prompts_there_are(given: Any, message: str):
    with pytest.raises(ValueError, match=message):
        Protection.given(given).spans([12, 10])


@pytest.mark.parametrize("given", [None, [], [None, []], mask(10), [(10, 12)], [(3, 5)]], ids=str)
def test_protection_of_nothing_is_false(given: Any):
    prompts = [torch.arange(10)] * 2
    protection = Protection.of_prompts(given, [], prompts)
    assert bool(protection) == any(Protection.given(given).spans([10, 10]))
    assert bool(protection.of_one(1)) == bool(protection)
    assert bool(Protection.of_prompts(given, [4], prompts).of_one(0))


def test_spans_of_tokens():
    ids = torch.tensor([[0, 0, 7, 5, 7], [7, 7, 5, 5, 8]])
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert spans_of(ids, [7, 8], padding) == [[(0, 1), (2, 3)], [(0, 2), (4, 5)]]
    assert spans_of(ids[0], [7]) == [(2, 3), (4, 5)]
    assert spans_of([5, 7, 7], [7]) == [(1, 3)]
    assert spans_of([5, 7, 7], []) == []
    assert Protection.given(spans_of(ids, [8])).spans([5, 5]) == [(), ((4, 5),)]
    for wrong in (["a"], [0.5], torch.zeros(1, 1, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="input_ids must be integers"):
            spans_of(wrong, [7])
    with pytest.raises(ValueError, match="token_ids must be a list of token ids, got 7"):
        spans_of([5, 7], 7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="token_ids must be at least 0, got -1"):
        spans_of([5, 7], [-1])
    with pytest.raises(ValueError, match=r"attention_mask must be \[2, 5\] as input_ids"):
        spans_of(ids, [7], padding[0])


def inputs_of(device: torch.device, layer: int, **changes: Any) -> LayerInputs:
    torch.manual_seed(layer)
    prompt = Prompt(batch=2, group=2, length=LENGTH, head_dim=16)
    whole = layer_inputs(prompt, device, layer=layer, num_layers=LAYERS, all_queries=True)
    return replace(whole, attention=whole.attention._replace(rotate=rotate), **changes)


def read(
    policy: Policy, budget: int, protect: Any, device: torch.device, cuts: tuple[int, ...] = ()
) -> list[list[list[int]]]:
    """``[L * B][Hkv]`` positions that stay of two prompts, read in parts."""
    classes = TokenClasses.given({"image": [(0, LENGTH - 20)]})
    reader = Reader(
        Budget(policy, budget), LAYERS, protection=Protection.given(protect), classes=classes
    )
    chosen = {}
    ends = [*cuts, LENGTH]
    for layer in range(LAYERS):
        whole = inputs_of(device, layer)
        assert whole.w_o is not None
        for start, end in zip([0, *cuts], ends, strict=True):
            reader.begin([end, end], end, is_complete=end == LENGTH)
            entries = whole.keys[:, :, :end], whole.values[:, :, :end]
            queries = whole.queries[:, :, start:end]
            reader.take(
                layer,
                Part(queries, lambda x=entries: x, whole.attention, lambda x=whole.w_o: x),
            )
        repeat = (whole.queries, whole.keys) if "repeat" in policy.needs else None
        chosen |= reader.finish(layer, repeat=repeat)
    heads = whole.num_kv_heads
    return [row for x in range(LAYERS) for row in kept_rows(chosen[x][0].kept, heads)]


@pytest.mark.parametrize("cuts", [(), (10, 62, 100)], ids=str)
@pytest.mark.parametrize("name", [name for name in names() if name != "full"])
def test_every_policy_keeps_what_is_protected(device: torch.device, name: str, cuts: Any):
    policy, budget = get(name), 100
    free = read(policy, budget, None, device, cuts)
    rows = read(policy, budget, [[*SPANS], [(100, 117)]], device, cuts)
    for index, row in enumerate(rows):
        protected = PROTECTED if index % 2 == 0 else {*range(100, 117)}
        protected = protected | {*range(LENGTH - policy.window, LENGTH)}
        assert all(protected <= {*head} for head in row), index
    total, expected = (sum(len(head) for row in kept for head in row) for kept in (rows, free))
    drifts = getattr(policy.allocator, "safeguard", None) == "official_round"
    assert abs(total - expected) <= 2 * len(rows) * drifts
    if name not in ("streaming", "prefixkv", "prefixkv_text"):  # they keep early ones anyway
        assert any(not {*head} >= PROTECTED for row in free for head in row)


POLICIES = [
    Policy(WindowAttention(pinned=4), Adaptive(floor=0.5), TwoStage()),
    Policy(WindowAttention(pinned=4), Adaptive(safeguard="hard_floor"), TopScore()),
    Policy(WindowAttention(), Adaptive(floor=0.0, safeguard="none"), TopScore()),
    Policy(WindowAttention(), Adaptive(weigh_heads=True), TopScore()),
    Policy(WindowAttention(), Adaptive(counts_window=True), TwoStage(counts_window=True)),
    Policy(WindowAttention(), Adaptive(budgets_from="critical"), TopScore()),
    Policy(WindowAttention(), ModelWide(floor=0.3, safeguard="hard_floor"), TwoStage()),
    Policy(WindowAttention(), ModelWide(reserve=1), TwoStage()),
    Policy(WindowAttention(), WholePages(Adaptive(), 16), TopScore()),
    Policy(WindowAttention(), Uniform(), TopScore()),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_as_much_is_protected_as_the_budget_holds(device: torch.device, policy: Policy):
    """The window, what is pinned and what is protected, in every head, and nothing else."""
    pinned = policy.scorer.pinned
    expected = {*range(pinned), *PROTECTED, *range(LENGTH - WINDOW, LENGTH)}
    least = len(expected)
    rows = read(policy, least, SPANS, device)
    assert all(expected <= {*head} for row in rows for head in row)
    first = f" and {pinned} pinned ones" if pinned else ""
    message = (
        f"protect: sequence 0 has 17 protected tokens; with the policy's window of 32 entries"
        f"{first} {least} must stay in every kv head, and one of layer 0 has room for {least - 1}:"
    )
    with pytest.raises(ValueError, match=message):
        read(policy, least - 1, SPANS, device)


def test_what_is_protected_twice_counts_once(device: torch.device):
    """By the scorer or the window, too."""
    policy = Policy(WindowAttention(pinned=4), Adaptive(), TopScore())
    spans = [(0, 10), (5, 12), (130, 150)]
    rows = read(policy, 12 + WINDOW, spans, device)
    assert all(head == [*range(12), *range(118, 150)] for row in rows for head in row)


def test_a_prompt_that_fits_protects_as_much_as_it_likes(device: torch.device):
    rows = read(get("ada_snapkv"), LENGTH, [(0, LENGTH)], device)
    assert all(head == [*range(LENGTH)] for row in rows for head in row)


@pytest.mark.parametrize(
    ("policy", "budget", "message"),
    [
        (Policy(WindowAttention(), Uniform(Pyramid()), TopScore()), 60, "of layer 2 has room for"),
        (
            Policy(WindowAttention(), Profile(((1, 1), (1, 1), (9, 1))), TopScore()),
            70,
            "of layer 0 has room for",
        ),
        (
            Policy(WindowAttention(), Adaptive(safeguard="official_round"), TopScore()),
            WINDOW + 4,
            "and one of layer 0 has room for 35",
        ),
        (
            Policy(WindowAttention(), WholePages(Adaptive(safeguard="official_round")), TopScore()),
            WINDOW + 4,
            "and one of layer 0 has room for 35",
        ),
    ],
    ids=repr,
)
def test_unequal_layers_and_heads_need_room_each(policy: Policy, budget: int, message: str):
    spans = [(0, 17)] if budget > 40 else [(0, 4)]
    reader = Reader(Budget(policy, budget), LAYERS, protection=Protection.given(spans))
    with pytest.raises(ValueError, match=message):
        reader.begin([LENGTH], LENGTH, is_complete=True)
    assert not reader.is_begun
    reader.begin([LENGTH], LENGTH)
    with pytest.raises(ValueError, match=message):
        reader.check_complete()


def test_what_stays_anyway_needs_no_more_room(device: torch.device):
    """Heads without a share of a profile have their window and nothing else."""
    policy = Policy(WindowAttention(), Profile(((1, 0), (1, 1), (9, 1))), TopScore())
    rows = read(policy, 60, [(140, 150)], device)
    assert rows[0][1] == [*range(LENGTH - WINDOW, LENGTH)]


def test_given_scores_do_not_unprotect(device: torch.device):
    protected = mask_of([SPANS, ()], LENGTH, device)
    inputs = inputs_of(device, 0, protected=protected)
    inputs = replace(inputs, queries=inputs.queries[:, :, -WINDOW:])
    scores = torch.full((2, 2, LENGTH), -1.0, device=device)
    scores[:, :, 100:118] = 1.0
    rows = kept_rows(get("snapkv").choose(inputs, WINDOW + 17, scores=scores), 2)
    assert all({*head} >= PROTECTED for head in rows[0])
    assert all({*range(100, 117)} <= {*head} for head in rows[1])
    assert scores.max() == 1.0
    for wrong in (protected.float(), protected[0], protected[:, :-1]):
        with pytest.raises(ValueError, match=r"protected must be boolean \[B, T\] = \[2, 150\]"):
            replace(inputs, protected=wrong)
