"""score against its definition."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from adakv import ops
from cases import (
    CORNER_PROMPTS,
    FORMATS,
    LARGE_PROMPTS,
    PROMPTS,
    Prompt,
    copied,
    paged_layer,
)
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


HELD = [
    ([[100, 37, 16], [0, 5, 64]], 16, 64),
    ([[700, 31], [33, 4000]], 16, 128),
    ([[200, 130, 129]], 8, 128),
    ([[300, 256], [255, 1]], 256, 64),
    ([[90, 50], [20, 70]], 32, 80),
    ([[90, 40]], 64, 256),
]


@pytest.mark.parametrize("dtype, kv_dtype", FORMATS, ids=str)
@pytest.mark.parametrize("value_dim", [None, 32], ids=["even", "Dv32"])
@pytest.mark.parametrize("lengths, page_size, head_dim", HELD, ids=str)
def test_score_of_what_rows_hold(
    lengths: list[list[int]],
    page_size: int,
    head_dim: int,
    value_dim: int | None,
    dtype: torch.dtype,
    kv_dtype: str,
    device: torch.device,
) -> None:
    layer = paged_layer(
        lengths,
        page_size=page_size,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=dtype,
        kv_dtype=kv_dtype,
        device=device,
    )
    host, most = copied(layer), max(map(max, lengths)) + 9
    batch, heads = layer.lengths.shape
    for window, group, options in (
        (8, 4, {}),
        (33, 1, {"window_reduce": "max", "pool": "avg", "pool_width": 5}),
        (4, 2, {"softcap": 5.0, "order": "pool_first", "group_reduce": "max"}),
        (40, 2, {"window": 0, "window_reduce": "sum", "group_reduce": "sum", "pool": "none"}),
        (270, 1, {"sink_logits": torch.randn(heads), "scale": 0.2}),
    ):
        queries = torch.randn(batch, heads * group, window, head_dim).to(dtype)
        expected = reference.score(queries, None, host, most, **options)
        baseline = reference.score(queries, None, host, most, dtype=dtype, **options)
        given = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in options.items()}
        scores = ops.score(queries.to(device), None, layer, most, **given)
        assert_close(scores, expected, baseline, f"scores, {options}")


def test_score_of_what_rows_hold_equals_that_of_a_tensor(device: torch.device) -> None:
    """Bit for bit: a row is as good as a sequence."""
    lengths = [[2000, 1, 700], [64, 900, 1555]]
    layer = paged_layer(lengths, head_dim=128, dtype=torch.bfloat16, device=device)
    pages = layer.block_table.clamp(min=0).long()[..., :125]
    keys = layer.pages[pages, 0].flatten(2, 3).flatten(0, 1)[:, None].nan_to_num()
    queries = torch.randn(2, 12, 16, 128, device=device).bfloat16()
    of_rows = ops.score(
        queries.view(6, 4, 16, 128), keys, seq_lens=layer.lengths.flatten().contiguous()
    )
    assert torch.equal(ops.score(queries, None, layer, 2000), of_rows.view(2, 3, 2000))


def test_score_names_what_is_wrong_with_a_layer() -> None:
    layer = paged_layer([[20, 30]], dtype=torch.bfloat16)
    queries = torch.randn(1, 2, 4, 64).bfloat16()
    lens = torch.tensor([20], dtype=torch.int32)
    int4 = paged_layer([[20, 30]], dtype=torch.bfloat16, kv_dtype="int4")
    for message, args, options in (
        (r"lengths must lie in 0 \.\. 29, got 30 for row \(0, 1\)", (None, layer, 29), {}),
        ("keys or a layer must be given", (None,), {}),
        ("layer must be left out where keys are given", (queries, layer, 30), {}),
        ("seq_lens must be left out with a layer", (None, layer, 30), {"seq_lens": lens}),
        ("layer must not be of int4", (None, int4, 30), {}),
        (
            "pages must be bfloat16 like queries",
            (None, layer._replace(pages=layer.pages.half()), 30),
            {},
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ops.score(queries, *args, **options)
