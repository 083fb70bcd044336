"""Budgets in proportions that were measured beforehand, from numbers and from files."""

from __future__ import annotations

import pytest
import torch

from adakv.policy import KeyDiff, Policy, Profile, TopScore, get
from cases import Prompt
from policy.helpers import kept_rows, layer_inputs


def profile_counts(profile: Profile, budget: int, length: int = 100) -> list[list[int]]:
    """Entries that each layer and head keeps, with a window of 10."""
    policy = Policy(KeyDiff(window=10), profile, TopScore())
    layers, heads = len(profile.of_kv_heads), len(profile.of_kv_heads[0])
    prompt = Prompt(batch=1, kv_heads=heads, group=1, length=length, head_dim=8)
    inputs = [
        layer_inputs(prompt, torch.device("cpu"), layer=layer, num_layers=layers)
        for layer in range(layers)
    ]
    kept = policy.choose_all(inputs, budget)
    totals = [policy.totals(x, budget)[0] for x in inputs]
    counts = [[len(row) for row in kept_rows(k, heads)[0]] for k in kept]
    assert list(map(sum, counts)) == totals
    return counts


@pytest.mark.parametrize(
    ("shares", "budget", "expected"),
    [
        # 2 * 2 * 20 candidates in proportion; layers first, 20 * 6 / 4 = 30 and 10 for a head
        ([[1, 5], [1, 1]], 30, [[20, 60], [20, 20]]),
        ([[10, 50], [10, 10]], 30, [[20, 60], [20, 20]]),
        ([[1, 1], [1, 1]], 30, [[30, 30], [30, 30]]),
        # the second head wants 95 of 90: the first gets the rest
        ([[1, 19]], 60, [[20, 100]]),
        # the first layer wants 108 a head of 90: the second gets 30 a head
        ([[9, 9], [1, 1]], 70, [[100, 100], [40, 40]]),
        # thirds of 20: by largest remainder, lower head first
        ([[1, 1, 1, 0]], 15, [[17, 17, 16, 10]]),
        # nobody who is left has a share
        ([[1, 0, 0]], 60, [[100, 40, 40]]),
    ],
)
def test_profile_keeps_its_proportions(shares, budget, expected):
    profile = Profile(tuple(map(tuple, shares)))
    assert profile_counts(profile, budget) == expected


@pytest.mark.parametrize(
    ("text", "group", "expected"),
    [
        ("[[1, 2.5], [0, 4]]", 1, [[1, 2.5], [0, 4]]),
        # Retrieval heads, in any order: means over their trials, sums over two q heads a kv head
        ('{"1-0": 0, "0-1": [1, 2], "0-0": [1], "1-1": 4.0}', 1, [[1, 1.5], [0, 4]]),
        ('{"0-0": 1, "0-1": [2, 4], "0-2": 0, "0-3": 0.5}', 2, [[4, 0.5]]),
        ("1.0e+00\t2.5e+00\n0.0e+00\t4.0e+00\n", 1, [[1, 2.5], [0, 4]]),  # DuoAttention
        # Attention Matching: of kv heads
        ('{"L0H0": 1e-3, "L0H1": 0.0025, "L1H1": 0.004, "L1H0": 0}', 1, [[1, 2.5], [0, 4]]),
    ],
)
def test_profile_is_read_from_a_file(tmp_path, text, group, expected):
    path = tmp_path / "heads"
    path.write_text(text)
    profile = Profile(file=str(path), group=group)
    assert profile_counts(profile, 30) == profile_counts(Profile(expected), 30)
    written = f"KeyDiff() * Profile(file={str(path)!r}, group={group}) * TopScore()"
    assert get(written) == Policy(KeyDiff(), profile, TopScore())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[1, 2], [3]]", r"heads' must be \[layers\]\[heads\]"),
        ("[]", r"must be \[layers\]\[heads\]"),
        ("", r"must be \[layers\]\[heads\]"),
        ("[[0, 0]]", "not all of them 0"),
        ("[[1, -1]]", "at least 0"),
        ("[[1, NaN]]", "finite"),
        ("[[1, null]]", "float"),
        ("[1, 2]", "file must hold numbers of heads, got .*heads'"),
        ("not json", "could not convert string to float: 'not'"),
        ("[[1,", "file must hold numbers of heads"),
        ("[" * 100_000, "file must hold numbers of heads"),
        ("{}", "file must hold numbers of heads"),
        ('{"version": 2, "shares": [[1]]}', "its version must be 1, got 2"),
        ('{"0-0": []}', "file must hold numbers of heads"),
        ('{"0": 1}', "file must hold numbers of heads"),
        ('{"L0": 1}', "its names must be 'layer-head' or 'L0H0', got 'L0'"),
        ('{"0--1": 1}', "its names must be 'layer-head' or 'L0H0', got '0--1'"),
        ('{"0-0": 1, "1-1": 1}', "it lacks '0-1'"),
        ("[[1, 2, 3]]", "group must divide the 3 heads of a layer, got 2"),
    ],
)
def test_files_that_are_no_profile_are_refused(tmp_path, text, message):
    path = tmp_path / "heads"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Profile(file=str(path), group=2 if "group" in message else 1)


def test_profile_is_numbers_or_a_file(tmp_path):
    for given in ({}, {"shares": ((1, 2),), "file": str(tmp_path)}):
        with pytest.raises(ValueError, match="shares or file must be given to Profile"):
            Profile(**given)
    with pytest.raises(ValueError, match=r"file must hold numbers of heads, got .*absent"):
        Profile(file=str(tmp_path / "absent"))


def test_profile_must_be_the_models():
    with pytest.raises(ValueError, match="shares must be those of 4 layers, got 2"):
        Policy(KeyDiff(window=8), Profile(((1, 1), (1, 1))), TopScore()).totals(
            layer_inputs(Prompt(), torch.device("cpu")), 30
        )
    profile = Profile(((1, 1, 1),) * 4)
    with pytest.raises(ValueError, match="shares must be those of 2 kv heads, got 3 a layer"):
        Policy(KeyDiff(window=8), profile, TopScore()).choose(
            layer_inputs(Prompt(), torch.device("cpu")), 30
        )
