"""Entries held with some of their dimensions, against definitions in loops."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import pytest
import torch
from torch import Tensor

from adakv.basis import Basis, along, by_error, in_order, mean_size, width_of
from tolerance import assert_close

B, HKV, GROUP, D, N = 2, 3, 2, 16, 5


def orthonormal(width: int) -> Tensor:
    """``[B, Hkv, D, width]`` float64."""
    return torch.linalg.qr(torch.randn(B, HKV, D, D, dtype=torch.float64))[0][..., :width]


@pytest.mark.parametrize("heads", [HKV, HKV * GROUP])
@pytest.mark.parametrize("width", [8, D])
def test_each_kv_head_has_channels_in_an_order_of_its_own(
    heads: int, width: int, device: torch.device
) -> None:
    x = torch.randn(B, N, heads, D).transpose(1, 2)  # as models have queries in memory
    channels = torch.stack([torch.randperm(D)[:width] for _ in range(B * HKV)])
    channels = channels.view(B, HKV, width)
    expected = torch.empty(B, heads, N, width)
    for b, h, i, d in product(range(B), range(heads), range(N), range(width)):
        expected[b, h, i, d] = x[b, h, i, channels[b, h * HKV // heads, d]]
    assert torch.equal(in_order(x.to(device), channels.to(device)).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [HKV, HKV * GROUP])
def test_each_kv_head_has_directions_of_its_own(
    heads: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, directions = torch.randn(B, heads, N, D).to(dtype), orthonormal(8).to(dtype)

    def by_hand(kind: torch.dtype) -> Tensor:
        rows = [
            x[b, h].to(kind) @ directions[b, h * HKV // heads].to(kind)
            for b, h in product(range(B), range(heads))
        ]
        return torch.stack(rows).view(B, heads, N, 8)

    got = along(x.to(device), directions.to(device))
    assert_close(got, by_hand(torch.float64), by_hand(dtype))


def test_a_basis_of_all_dimensions_changes_nothing_but_the_order(device: torch.device) -> None:
    """Logits of float64 and what values stand for are those of the entries themselves."""
    queries = torch.randn(B, HKV * GROUP, N, D, dtype=torch.float64, device=device)
    keys, values = torch.randn(2, B, HKV, 7, D, dtype=torch.float64, device=device)
    channels = torch.stack([torch.randperm(D) for _ in range(B * HKV)]).view(B, HKV, D)
    directions = orthonormal(D).to(device)
    expected = queries.view(B, HKV, -1, D) @ keys.transpose(2, 3)
    for basis in (Basis(channels.to(device)), Basis(directions, directions.flip(3))):
        held, held_values = basis.of_entries(keys, values)
        asked = basis.of_queries(queries).view(B, HKV, -1, D)
        assert torch.allclose(asked @ held.transpose(2, 3), expected, atol=1e-12)
        assert torch.allclose(basis.whole(held_values), values, atol=1e-12)


def test_rows_and_layers_of_a_basis_are_its_tensors() -> None:
    basis = Basis(torch.randn(4, B, HKV, D, 8), torch.randn(4, B, HKV, D, 8))
    one = basis.of(2)
    assert one.values is not None
    assert torch.equal(one.keys, basis.keys[2])
    assert one.of(slice(0, 1)).keys.shape == (1, HKV, D, 8)
    assert basis.num_bytes == 2 * 4 * B * HKV * D * 8 * 4
    assert Basis(torch.zeros(B, HKV, 8, dtype=torch.int64)).num_bytes == B * HKV * 8 * 8


@pytest.mark.parametrize(
    ("dim", "share", "width"),
    [
        (64, 0.6, 40),  # ThinK drops int(.4 * 64) = 25 channels, and pages hold multiples of 8
        (128, 0.6, 80),
        (80, 0.6, 48),
        (64, 0.25, 16),
        (64, 0.5, 32),
        (64, 1.0, 64),
        (8, 0.25, 8),
        (100, 0.999, 100),
        (256, 0.001, 8),
    ],
)
def test_widths_are_multiples_of_eight(dim: int, share: float, width: int) -> None:
    assert width_of(dim, Fraction(str(share))) == width


def test_the_order_of_channels_is_mixkvqs() -> None:
    """A channel with a large range that queries hardly look at comes behind one with a small range
    that they look at."""
    queries = torch.tensor([[2, 0.1, 1], [-2, 0.1, 3]])[None, None]
    keys = torch.tensor([[0, -3, 1], [3, 3, 1.25]])[None, None]
    sizes = mean_size(queries, 1)
    torch.testing.assert_close(sizes[0, 0], torch.tensor([2, 0.1, 2]))
    assert by_error(sizes, keys, torch.ones(1, 1, 2, dtype=torch.bool)).tolist() == [[[0, 1, 2]]]


def test_ranges_are_those_of_pages_of_held_keys(device: torch.device) -> None:
    """A page is the first 32 keys that are held, the next 32, and so on; the mean is over pages."""
    batch, heads, count, dim = 2, 3, 150, 16
    keys = torch.randn(batch, heads, count, dim) * torch.rand(dim).exp()
    held = torch.rand(batch, heads, count) < 0.6
    held[1, 2] = False  # a row of nothing, which has some order
    sizes = torch.rand(batch, heads, dim)
    got = by_error(sizes.to(device), keys.to(device), held.to(device)).cpu()
    for b, h in product(range(batch), range(heads)):
        pages = keys[b, h][held[b, h]].split(32)
        ranges = [page.amax(0) - page.amin(0) for page in pages if len(page)]
        errors = sizes[b, h] * torch.stack(ranges or [torch.zeros(dim)]).sum(0)
        assert got[b, h].equal(errors.argsort(descending=True, stable=True))


def test_sizes_of_queries_are_means_over_the_group() -> None:
    queries = torch.randn(B, HKV * GROUP, N, D)
    sizes = mean_size(queries, HKV)
    for b, h, d in product(range(B), range(HKV), range(D)):
        group = queries[b, h * GROUP : (h + 1) * GROUP, :, d].abs().mean()
        torch.testing.assert_close(sizes[b, h, d], group)
