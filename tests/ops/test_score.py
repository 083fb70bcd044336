"""score against its definition."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from adakv import ops
from cases import CORNER_PROMPTS, LARGE_PROMPTS, PROMPTS, Prompt
from tolerance import assert_close


def check(queries: Tensor, keys: Tensor, **options: Any) -> None:
    expected = reference.score(queries, keys, **options)
    baseline = reference.score(queries, keys, dtype=queries.dtype, **options)
    assert_close(ops.score(queries, keys, **options), expected, baseline, "scores")


@pytest.mark.parametrize("case", [*PROMPTS, *CORNER_PROMPTS, *LARGE_PROMPTS], ids=str)
def test_score_equals_definition(case: Prompt, device: torch.device) -> None:
    check(case.queries(device), case.entries(device), seq_lens=case.lengths(device))


@pytest.mark.parametrize("window_reduce", ["mean", "max", "sum"])
@pytest.mark.parametrize("group_reduce", ["mean", "max", "sum"])
@pytest.mark.parametrize("order", ["group_first", "pool_first"])
def test_score_reduces_as_told(
    window_reduce: str, group_reduce: str, order: str, device: torch.device
) -> None:
    case = Prompt(kv_heads=3, group=3, window=40, dtype=torch.bfloat16, seq_lens=(100, 73))
    for pool, width in (("max", 7), ("avg", 5), ("none", 7), ("max", 1), ("avg", 63)):
        check(
            case.queries(device),
            case.entries(device),
            seq_lens=case.lengths(device),
            window_reduce=window_reduce,
            group_reduce=group_reduce,
            order=order,
            pool=pool,
            pool_width=width,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_score_of_wide_windows_and_options(dtype: torch.dtype, device: torch.device) -> None:
    for window, softcap, with_sinks in product((33, 128, 150), (None, 5.0), (False, True)):
        case = Prompt(length=1700, window=window, group=2, dtype=dtype, seq_lens=(1700, 901))
        sink_logits = torch.randn(4, device=device) if with_sinks else None
        check(
            case.queries(device) * 3,
            case.entries(device),
            seq_lens=case.lengths(device),
            scale=0.2,
            softcap=softcap,
            sink_logits=sink_logits,
        )


def test_score_takes_a_given_lse(device: torch.device) -> None:
    case = Prompt(batch=1, length=900, dtype=torch.bfloat16)
    queries, keys = case.queries(device), case.entries(device)
    logits = reference.window_logits(queries[0].cpu().double(), keys[0].cpu().double())
    lse = logits.logsumexp(-1)[None].float().to(device)
    expected = reference.score(queries, keys)
    baseline = reference.score(queries, keys, dtype=torch.bfloat16)
    assert_close(ops.score(queries, keys, lse=lse), expected, baseline)
    halved = ops.score(queries, keys, lse=lse + 2**0.5)  # nothing but the given lse is used
    assert_close(halved, expected * torch.e ** -(2**0.5), baseline * torch.e ** -(2**0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_queries", [8, 300, 701], ids=lambda n: f"W{n}")
def test_score_of_any_queries(num_queries: int, dtype: torch.dtype, device: torch.device) -> None:
    """All queries of a prompt, every stride-th, near ones left out, some before the prompt."""
    case = Prompt(
        length=701, group=2, kv_heads=3, window=num_queries, dtype=dtype, seq_lens=(701, 390)
    )
    queries, keys = case.queries(device) * 2, case.entries(device)
    for reduce, (window, stride, distance) in product(
        ("max", "sum", "mean"), ((0, 1, 0), (32, 1, 16), (None, 3, 400), (5, 90, 1))
    ):
        check(
            queries,
            keys,
            seq_lens=case.lengths(device),
            sink_logits=torch.linspace(-1, 2, 6, device=device),
            window_reduce=reduce,
            group_reduce=reduce,
            pool="none" if window == 0 else "avg",
            order="group_first" if stride == 1 else "pool_first",
            window=window,
            stride=stride,
            distance=distance,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 80, 128, 256], ids=lambda d: f"D{d}")
def test_score_of_all_queries_by_head_dim(
    head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    case = Prompt(length=1300, window=1300, kv_heads=1, group=3, head_dim=head_dim, dtype=dtype)
    queries, keys = case.queries(device), case.entries(device)
    for softcap in (0.0, 4.0):
        options = {"window_reduce": "max", "softcap": softcap, "pool_width": 5}
        check(queries, keys, window=20, distance=2, **options)
    queries, keys = queries[:1], keys[:1]
    logits = reference.window_logits(queries[0].cpu().double(), keys[0].cpu().double())
    lse = logits.logsumexp(-1)[None].float().to(device)
    expected = reference.score(queries, keys, window=0)
    baseline = reference.score(queries, keys, window=0, dtype=dtype)
    assert_close(ops.score(queries, keys, window=0, lse=lse), expected, baseline)


def test_score_of_extreme_logits_is_finite(device: torch.device) -> None:
    case = Prompt(length=300, window=8)
    queries, keys = case.queries(device) * 300, case.entries(device) * 300
    scores = ops.score(queries, keys, pool="none")
    assert scores[..., :292].isfinite().all()
    assert float(scores[..., :292].sum(-1).max()) <= 1 + 1e-5


@pytest.mark.parametrize("case", [PROMPTS[3], LARGE_PROMPTS[0]], ids=str)
def test_score_gives_the_same_bits_for_any_number_of_threads(case: Prompt) -> None:
    queries, keys = case.queries(torch.device("cpu")), case.entries(torch.device("cpu"))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.score(queries, keys, seq_lens=case.lengths(torch.device("cpu"))))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_score_names_what_is_wrong(device: torch.device) -> None:
    case = Prompt()
    queries, keys = case.queries(device), case.entries(device)
    with pytest.raises(ValueError, match="pool_width"):
        ops.score(queries, keys, pool_width=4)
    with pytest.raises(ValueError, match="float32"):
        ops.score(queries, keys.half())
    with pytest.raises(ValueError, match="keys"):
        ops.score(queries, keys[..., :32])
    for wrong in ("window", "stride", "distance"):
        with pytest.raises(ValueError, match=wrong):
            ops.score(queries, keys, **{wrong: -2})
    with pytest.raises(ValueError, match="stride"):
        ops.score(queries, keys, stride=2**24)
    with pytest.raises(ValueError, match="q heads"):
        ops.score(queries[:, :3], keys)
