"""Biases of entries: how the verbs carry what attend adds to their logits."""

from __future__ import annotations

import pytest
import torch

import reference
from adakv import ops
from adakv.cache import KVCache
from cases import (
    assert_same_layer,
    copied,
    empty_layer,
    int32,
    noncontiguous,
    paged_layer,
    with_biases,
)
from tolerance import assert_close


@pytest.mark.parametrize("tokens", [1, 3])
def test_new_entries_have_no_bias(tokens: int, device: torch.device) -> None:
    layer = paged_layer([[40, 15], [16, 100]], new_tokens=3, dtype=torch.bfloat16, device=device)
    layer = with_biases(layer)
    keys, values = (
        noncontiguous(torch.randn(2, 2, tokens, 64).to(device, torch.bfloat16)) for _ in "kv"
    )
    by_hand, appended = copied(layer), copied(layer)
    queries = torch.randn(2, 8, tokens, 64).to(device, torch.bfloat16)
    plan_inputs = (layer.lengths[None], layer.block_table[None], layer.fresh_pages[None])
    schedule = ops.plan(*plan_inputs, new_tokens=tokens)[0]
    out, _ = ops.attend(queries, layer, schedule, keys=keys, values=values)
    reference.append(keys, values, by_hand)
    assert_same_layer(layer, by_hand)
    expected, _ = reference.attend(queries, by_hand)
    baseline, _ = reference.attend(queries, by_hand, dtype=torch.bfloat16)
    assert_close(out, expected, baseline, "out")
    ops.append(keys.cpu(), values.cpu(), appended)
    assert_same_layer(appended, by_hand)


@pytest.mark.parametrize("is_given", [True, False], ids=["given", "left out"])
@pytest.mark.parametrize("page_size", [8, 16, 64])
def test_compact_puts_biases_beside_entries(
    is_given: bool, page_size: int, device: torch.device
) -> None:
    kept = ops.Kept(
        int32([0, 3, 4, 90, 7, *range(20, 60)], device), int32([0, 4, 4, 5, 45], device)
    )
    keys, values = (noncontiguous(torch.randn(2, 2, 100, 64, device=device)) for _ in "kv")
    biases = torch.randn(2, 2, 200, device=device).half()[:, :, :100]
    layers = [
        empty_layer(2, 2, num_pages=40, columns=9, page_size=page_size, device=device)
        for _ in range(2)
    ]
    ours, expected = (
        layer._replace(page_biases=torch.full((40, page_size), 7, device=device).half())
        for layer in layers
    )
    page_ids = torch.randperm(40)[:24].int().to(device)
    given = biases if is_given else None
    where = page_ids, int32([0, 10, 24], device)
    ops.compact(keys, values, kept, ours, *where, biases=given)
    reference.compact(keys, values, kept, expected, *where, biases=given)
    assert_same_layer(ours, expected)


def cache_of(device: torch.device, *, has_biases: bool = True, num_pages: int = 100) -> KVCache:
    return KVCache(
        num_layers=2,
        num_sequences=2,
        num_kv_heads=2,
        head_dim=8,
        num_pages=num_pages,
        max_row_pages=9,
        page_size=8,
        dtype=torch.float32,
        device=device,
        has_biases=has_biases,
    )


def filled(device: torch.device, kept: list[list[int]]) -> tuple[KVCache, torch.Tensor]:
    """A cache whose first layer keeps such positions of each row, and the biases ``[B, Hkv, T]`` of
    the prompts that they were in."""
    cache = cache_of(device)
    totals = [len(kept[0]) + len(kept[1]), len(kept[2]) + len(kept[3])]
    keys, values = (torch.randn(2, 2, 50, 8, device=device) for _ in "kv")
    biases = torch.randn(2, 2, 50, device=device).half()
    ends = int32([0, *torch.tensor([len(row) for row in kept]).cumsum(0).tolist()], device)
    chosen = ops.Kept(int32([p for row in kept for p in row], device), ends)
    for layer in range(2):
        pages = cache.begin(layer, totals, [50, 50])
        ops.compact(keys, values, chosen, cache.layer(layer), *pages, biases=biases)
    return cache, biases


def held(cache: KVCache, layer: int = 0) -> list[torch.Tensor]:
    view = cache.layer(layer)
    batch, heads = view.lengths.shape
    return [reference.biases_of(view, b, h) for b in range(batch) for h in range(heads)]


ROWS = [list(range(0, 40, 2)), list(range(9)), [3, 8, 30], list(range(10, 50))]


def test_biases_stay_with_entries_in_place(device: torch.device) -> None:
    cache, biases = filled(device, ROWS)
    left = [[1, 2, 9, 19], [0, 8], [], list(range(5, 40))]
    totals = [[6, 35]] * 2
    page_ids, starts = cache.begin_again(totals, [35, 35])
    ends = int32([0, 4, 6, 6, 41], device)
    kept = ops.Kept(int32([slot for row in left for slot in row], device), ends)
    for layer in range(2):
        ops.compact(None, None, kept, cache.layer(layer), page_ids, starts[layer])
    for r, (row, slots) in enumerate(zip(ROWS, left, strict=True)):
        expected = biases.cpu()[r // 2, r % 2, [row[slot] for slot in slots]]
        assert torch.equal(held(cache)[r], expected), r


@pytest.mark.parametrize("whole", [False, True])
def test_forks_have_the_biases_of_their_source(whole: bool, device: torch.device) -> None:
    cache, _ = filled(device, ROWS)
    before = held(cache, 1)
    fork = cache.fork([1, 0, 1], whole=whole)
    assert fork.has_biases
    expected = [*before[2:], *before[:2], *before[2:]]
    assert all(map(torch.equal, held(fork, 1), expected))


def test_a_cache_that_grows_keeps_its_biases(device: torch.device) -> None:
    cache, _ = filled(device, ROWS)
    before = held(cache)
    cache.reserve(num_pages=200)
    assert all(map(torch.equal, held(cache), before))


def test_biases_take_16_bits_an_entry_and_nothing_without(device: torch.device) -> None:
    with_, without = cache_of(device), cache_of(device, has_biases=False)
    assert without.page_bytes == 2 * 8 * 8 * 4 + 8 * 4
    assert with_.page_bytes == without.page_bytes + 8 * 2
    assert without.layer(0).page_biases is None
    biases = with_.layer(0).page_biases
    assert biases is not None and (biases.dtype, list(biases.shape)) == (torch.float16, [100, 8])
    full, _ = filled(device, ROWS)
    assert full.bytes_used == full.pages_used * with_.page_bytes


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8", "int4", "int2"])
def test_quantised_pages_have_no_biases(kv_dtype: str) -> None:
    sizes = {"num_layers": 1, "num_sequences": 1, "num_kv_heads": 1, "head_dim": 64}
    with pytest.raises(ValueError, match=f"pages of {kv_dtype} have no biases"):
        KVCache(**sizes, num_pages=9, max_row_pages=9, kv_dtype=kv_dtype, has_biases=True)


def test_verbs_refuse_what_biases_do_not_go_with(device: torch.device) -> None:
    plain = paged_layer([[40, 15]], device=device)
    layer = with_biases(plain)
    queries = torch.randn(1, 8, 1, 64, device=device)
    schedule = ops.plan(
        plain.lengths[None], plain.block_table[None], plain.fresh_pages[None], new_tokens=0
    )[0]
    most = plain.block_table.shape[2] * 16
    with pytest.raises(ValueError, match="accumulated must be left out for a layer with page_bia"):
        ops.attend(queries, layer, schedule, accumulated=torch.zeros(1, 2, most, device=device))
    with pytest.raises(ValueError, match="layer must be without page_biases"):
        ops.score(queries, None, layer, 40)
    wrong = with_biases(plain)._replace(page_biases=layer.page_biases.float())
    with pytest.raises(ValueError, match="page_biases must be float16"):
        ops.attend(queries, wrong, schedule)
    keys = torch.randn(1, 2, 30, 64, device=device)
    biases = torch.zeros(1, 2, 30, device=device).half()
    kept = ops.Kept(int32([1, 2], device), int32([0, 1, 2], device))
    pages = int32([0, 1, 2, 3], device), int32([0, 4], device)
    with pytest.raises(ValueError, match="biases must be left out for a layer without page_biases"):
        ops.compact(keys, keys, kept, plain, *pages, biases=biases)
    with pytest.raises(ValueError, match="biases must be left out where keys are"):
        ops.compact(None, None, kept, layer, *pages, biases=biases)
    with pytest.raises(ValueError, match=r"biases must .*T.* = 30"):
        ops.compact(keys, keys, kept, layer, *pages, biases=biases[..., :29])
