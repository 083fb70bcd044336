"""Steps over tiers whose entries have some of their dimensions, against attention in plain torch
over keys and values that are made whole again."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from adakv import ops
from adakv.basis import Basis, channels, directions, mean_square
from adakv.cache import KVCache
from adakv.devices import FirstSlots, grow_step
from adakv.ops import Kept
from adakv.step import Attention
from adakv.tiered_cache import TieredCache
from adakv.tiers import Tiers
from cases import int32
from tolerance import assert_close

B, HKV, GROUP, D, T = 2, 2, 3, 32, 40
INF = float("inf")

#: Entries of each row [B][Hkv] in each tier; a row of a later one may be empty.
COUNTS = [[[3, 17], [8, 1]], [[20, 0], [11, 5]], [[0, 9], [7, 30]]]


def rows(counts: list[list[int]], device: torch.device) -> Kept:
    """Some positions of each row."""
    flat = [n for row in counts for n in row]
    positions = [torch.randperm(T)[:n].sort().values for n in flat]
    ends = [0, *torch.tensor(flat).cumsum(0).tolist()]
    return Kept(torch.cat(positions).int().to(device), int32(ends, device))


@dataclass
class Filled:
    """Tiers with entries in them, and what was put there."""

    kv: TieredCache
    keys: Tensor  # [B, Hkv, T, D]
    values: Tensor
    kept: list[Kept]

    @classmethod
    def of(cls, text: str, dtype: torch.dtype, device: torch.device) -> Filled:
        tiers = Tiers.given(text)
        sizes = {"num_layers": 1, "num_sequences": B, "num_kv_heads": HKV, "page_size": 32}
        caches = [
            KVCache(
                **sizes, head_dim=key, value_dim=value, num_pages=64, max_row_pages=16,
                dtype=dtype, device=device, kv_dtype=name,
            )
            for name, (key, value) in zip(tiers.formats, tiers.dims((D, D)), strict=True)
        ]  # fmt: skip
        kv = TieredCache(tiers, caches)
        keys, values = torch.randn(2, B, HKV, T, D).to(device, dtype)
        held = torch.ones(B, HKV, T, dtype=torch.bool, device=device)
        queries = torch.randn(B, HKV * GROUP, 5, D, device=device)
        assert kv.basis is not None
        kv.basis.of(0).fill(tiers.basis_of(keys, values, held, mean_square(queries, HKV)))
        kept = [rows(counts, device) for counts in COUNTS[: len(caches)]]
        for cache, basis, of_tier in zip(caches, kv.bases, kept, strict=True):
            entries = (keys, values) if basis is None else basis.of(0).of_entries(keys, values)
            totals = of_tier.indptr[::HKV].diff().tolist()
            pages = cache.begin(0, totals, [T] * B)
            ops.compact(*entries, of_tier, cache.layer(0), *pages)
        return cls(kv, keys, values, kept)

    def row(self, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of a row as they stand in its tiers, those of narrow ones whole."""
        b, h = r // HKV, r % HKV
        found = []
        for basis, kept in zip(self.kv.bases, self.kept, strict=True):
            start, end = list(pairwise(kept.indptr.tolist()))[r]
            positions = kept.positions[start:end].long()
            entries = [x[b, h, positions].to(dtype) for x in (self.keys, self.values)]
            if basis is not None:
                key, value = (None if x is None else x[0, b, h] for x in basis)
                assert key is not None
                if key.is_floating_point():
                    entries[0] = entries[0] @ key.to(dtype) @ key.to(dtype).T
                else:
                    entries[0] = torch.zeros_like(entries[0]).index_copy(1, key, entries[0][:, key])
                if value is not None:
                    entries[1] = entries[1] @ value.to(dtype) @ value.to(dtype).T
            found.append(entries)
        return torch.cat([k for k, _ in found]), torch.cat([v for _, v in found])

    def attended(
        self,
        new: tuple[Tensor, Tensor, Tensor],
        num_new: list[int],
        how: Attention,
        dtype: torch.dtype,
    ) -> Tensor:
        """``[B, S, Hq, D]``"""
        queries, new_keys, new_values = (x.to(dtype) for x in new)
        out = torch.zeros_like(queries)
        columns = queries.shape[2]
        for b, count in enumerate(num_new):
            for q in range(HKV * GROUP):
                h, first = q // GROUP, columns - count
                keys, values = self.row(b * HKV + h, dtype)
                for s in range(first, columns):
                    k = torch.cat([keys, new_keys[b, h, first : s + 1]])
                    v = torch.cat([values, new_values[b, h, first : s + 1]])
                    z = k @ queries[b, q, s] * (how.scale or D**-0.5)
                    if how.softcap:
                        z = how.softcap * torch.tanh(z / how.softcap)
                    if how.sink_logits is not None:
                        z = torch.cat([z, how.sink_logits[q : q + 1].to(dtype)])
                    out[b, q, s] = z.softmax(0)[: len(v)] @ v
        return out.transpose(1, 2)


TEXTS = [
    "auto:1/2 + channels=.6:1/2",
    "auto:1/2 + rank=1/2:1/2",
    "auto:1/3 + rank=1/2:1/3 + rank=1/4:1/3",
    "auto:1/3 + channels=1/2:1/3 + channels=1/4:1/3",
    "auto:1/3 + auto:1/3 + rank=1/2:1/3",
    "rank=1",
    "channels=1",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_new", [[1, 1], [3, 3], [1, 3]], ids=str)
@pytest.mark.parametrize("text", TEXTS)
def test_a_step_attends_to_what_narrow_entries_stand_for(
    text: str, num_new: list[int], dtype: torch.dtype, device: torch.device
) -> None:
    filled, columns = Filled.of(text, dtype, device), max(num_new)
    sinks = torch.randn(HKV * GROUP, device=device)
    for how in (Attention(), Attention(scale=0.3, softcap=5.0, sink_logits=sinks)):
        new = [torch.randn(B, heads, columns, D) for heads in (HKV * GROUP, HKV, HKV)]
        new = [x.to(device, dtype) for x in new]
        given = (new[0], new[1], new[2])
        expected = filled.attended(given, num_new, how, torch.float64)
        baseline = filled.attended(given, num_new, how, dtype)
        step = grow_step(filled.kv.fork([0, 1]), num_new, columns)
        assert_close(step.attend(0, *given, how), expected, baseline)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("width", ["channels=.6", "rank=1/2"])
def test_narrow_entries_have_codes_too(kv_dtype: str, width: str, device: torch.device) -> None:
    """Near what they stand for: a code is wrong by some hundredths."""
    filled = Filled.of(f"auto:1/2 + {kv_dtype}/{width}:1/2", torch.bfloat16, device)
    new = [torch.randn(B, heads, 1, D).to(device, torch.bfloat16) for heads in (6, HKV, HKV)]
    given = (new[0], new[1], new[2])
    out = grow_step(filled.kv, [1, 1], 1).attend(0, *given, Attention()).double()
    expected = filled.attended(given, [1, 1], Attention(), torch.float64)
    assert (out - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("text", TEXTS[:3])
def test_slots_forks_and_steps_planned_again_have_the_rows_of_their_sequences(
    text: str, device: torch.device
) -> None:
    filled = Filled.of(text, torch.float32, device)
    new = [torch.randn(B, heads, 1, D).to(device) for heads in (HKV * GROUP, HKV, HKV)]
    expected = filled.attended((new[0], new[1], new[2]), [1, 1], Attention(), torch.float64)

    def check(got: Tensor, sequences: list[int]) -> None:
        assert (got.double() - expected[sequences]).abs().max() < 1e-5

    branches = filled.kv.fork([1, 0, 1])
    crossed = [x[[1, 0, 1]] for x in new]
    check(grow_step(branches, [1, 1, 1], 1).attend(0, *crossed, Attention()), [1, 0, 1])
    last = [x[1:] for x in new]
    fork = filled.kv.fork([0, 1])
    check(grow_step(fork, [1], 1, slots=slice(1, 2)).attend(0, *last, Attention()), [1])
    fork = filled.kv.fork([0, 1])
    first = FirstSlots(fork, 1)
    fork.grow([1, 0], 1)
    step = first.plan(int32([1], device), None)
    check(step.attend(0, *[x[:1] for x in new], Attention()), [0])


def test_bytes_are_those_of_pages_and_bases(device: torch.device) -> None:
    filled = Filled.of("auto:1/2 + rank=1/2:1/2", torch.bfloat16, device)
    first, second = filled.kv.caches
    entry = (D // 2 + D // 2) * 2 + 4  # numbers in 16 bits, and a position
    assert second.page_bytes == 32 * entry
    of_row = 2 * D * (D // 2) * 2
    bytes_of_pages = first.bytes_used + second.bytes_used
    assert filled.kv.bytes_used == bytes_of_pages + B * HKV * of_row
    filled.kv.remove(0)
    bytes_of_pages = first.bytes_used + second.bytes_used
    assert filled.kv.bytes_used == bytes_of_pages + HKV * of_row


def test_channels_are_those_of_think() -> None:
    """Two queries and two keys of four channels, by hand: the means of their squares are (1, .5, 2,
    .01) and (.01, 4, .5, 9). The first and the last channel go."""
    queries = torch.tensor([[1, 0, 2, 0.1], [1, 1, 0, 0.1]])[None, None]
    keys = torch.tensor([[0.1, 2, 1, 3], [0.1, 2, 0, 3]])[None, None]
    squares = mean_square(queries, 1)
    assert torch.allclose(squares, torch.tensor([1, 0.5, 2, 0.01]))
    scores = squares * keys.square().mean(2)
    assert torch.allclose(scores, torch.tensor([0.01, 2, 1, 0.09]))
    held = torch.ones(1, 1, 2, dtype=torch.bool)
    found = channels(squares, keys, held)
    assert found.tolist() == [[[1, 2, 3, 0]]]
    logits = [torch.outer(q, k).norm() for q, k in zip(queries[0, 0].T, keys[0, 0].T, strict=True)]
    assert torch.allclose(torch.stack(logits), torch.tensor([0.2, 8**0.5, 2, 0.6]), atol=1e-6)
    far = torch.cat([keys, torch.tensor([[100.0, 0, 0, 0]])[None, None]], 2)
    held = torch.tensor([[[True, True, False]]])
    assert channels(squares, far, held).tolist() == [[[1, 2, 3, 0]]]


def test_a_group_asks_for_channels_together() -> None:
    queries = torch.randn(B, HKV * GROUP, 7, D)
    expected = torch.zeros(B, HKV, D)
    for q in range(HKV * GROUP):
        expected[:, q // GROUP] += queries[:, q].square().mean(1) / GROUP
    assert torch.allclose(mean_square(queries, HKV), expected, atol=1e-6)


def test_directions_leave_out_as_little_as_can_be(device: torch.device) -> None:
    """What is left out of rows is the smallest singular values of those that count, squared."""
    x = torch.randn(B, HKV, T, D, device=device) * torch.linspace(0.1, 3, D, device=device)
    held = torch.rand(B, HKV, T, device=device) < 0.8
    found = directions(x, held)
    eye = torch.eye(D, device=device).expand(B, HKV, D, D)
    assert torch.allclose(found.mT @ found, eye, atol=1e-5)
    for b in range(B):
        for h in range(HKV):
            row = x[b, h, held[b, h]].double()
            values = torch.linalg.svdvals(row).square()
            for width in (8, 16, D):
                basis = found[b, h, :, :width].double()
                lost = (row - row @ basis @ basis.T).square().sum()
                assert abs(lost - values[width:].sum()) < 1e-5 * values.sum()


def test_rows_without_entries_have_a_basis(device: torch.device) -> None:
    x, held = torch.randn(1, 2, 3, D, device=device), torch.zeros(1, 2, 3, device=device).bool()
    found = directions(x, held)
    assert torch.allclose(found.mT @ found, torch.eye(D, device=device).expand(1, 2, D, D))
    x[0, 0, 0, 0] = INF
    assert directions(x, ~held).isfinite().all()
    assert channels(torch.ones(1, 2, D, device=device), x, held).shape == (1, 2, D)
    assert Basis(torch.zeros(1, 2, D, 8)).narrowed(4, 4).keys.shape == (1, 2, D, 4)
