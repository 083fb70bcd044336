"""Quantised pages: how far what is read may be from what was written, and what becomes of entries
that no code can hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cases
import reference
from adakv import ops

FORMATS = cases.FORMATS[3:]
DIMS = [8, 64, 80, 96, 120, 256]


def hostile(head_dim: int, dtype: torch.dtype) -> Tensor:
    """Entries ``[n, D]``: of every size, constant, with one value far out, with halves between
    codes."""
    most = torch.finfo(dtype).max
    plain = torch.randn(40, head_dim)
    sizes = plain * torch.logspace(-45, 38, 40)[:, None]
    far = torch.randn(4, head_dim)
    far[:, head_dim // 2] = torch.tensor([1e3, -1e3, most / 4, -most / 4])
    steps = torch.arange(head_dim).float().expand(4, -1) / torch.tensor([[1.0], [2], [4], [-8]])
    flat = torch.tensor([0.0, -0.0, 1.5, -3.25, 6e-8, most, -most]).repeat_interleave(head_dim)
    x = torch.cat([plain, sizes, far, steps, flat.view(-1, head_dim)])
    return x.clamp(-most, most).to(dtype)


def spoilt(head_dim: int, dtype: torch.dtype) -> Tensor:
    """Entries ``[n, D]``, of which each other one has a NaN or an infinity."""
    x = torch.randn(12, head_dim).to(dtype)
    bad = [float("nan"), float("inf"), float("-inf")]
    for i in range(0, 12, 2):
        x[i, (i * 37) % head_dim] = bad[i // 2 % 3]
    return x


def written(x: Tensor, kv_dtype: str, device: torch.device) -> ops.Layer:
    """A layer whose one row was given entries ``[n, D]``, as keys, and negated as values."""
    layer = cases.paged_layer(
        [[0]],
        head_dim=x.shape[-1],
        dtype=x.dtype,
        new_tokens=len(x),
        device=device,
        kv_dtype=kv_dtype,
    )
    expected = cases.copied(layer)
    reference.append(x[None, None], -x[None, None], expected)
    ops.append(x[None, None].to(device), -x[None, None].to(device), layer)
    cases.assert_same_layer(layer, expected)
    return layer


def read(layer: ops.Layer) -> Tensor:
    """Keys and values ``[2, n, D]`` float64."""
    count = int(layer.lengths[0, 0])
    pages = layer.block_table[0, 0, : -(-count // 16)].long()
    return torch.stack(reference.entries_of(layer, pages))[:, :count]


@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize(("dtype", "kv_dtype"), FORMATS, ids=str)
def test_what_is_read_is_near_what_was_written(
    head_dim: int, dtype: torch.dtype, kv_dtype: str, device: torch.device
) -> None:
    """int8: within half a step, which is the range of 64 dimensions / 255, rounded up to 16 bits.
    fp8: within 2^-4 of the number, or half of the smallest step, 2^-9 of the scale."""
    x = hostile(head_dim, dtype)
    keys, values = read(written(x, kv_dtype, device))
    round_up = 1 + torch.finfo(dtype).eps
    for got, given in ((keys, x), (values, -x)):
        for part, exact in zip(got.split(64, -1), given.double().split(64, -1), strict=True):
            error = (part - exact).abs()
            smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            if kv_dtype == "int8":
                spread = exact.amax(-1, keepdim=True) - exact.amin(-1, keepdim=True)
                fits = (spread <= torch.finfo(torch.float32).max).expand_as(part)
                scale = spread / 255 * round_up + smallest
                bound = (scale / 2).expand_as(part)
            else:
                scale = exact.abs().amax(-1, keepdim=True) / 448 * round_up + smallest
                fits = torch.ones_like(part, dtype=torch.bool)
                bound = (exact.abs() * 2**-4).maximum(scale * 2**-10)
            assert (error <= bound * (1 + 1e-6))[fits].all()
            assert part[~fits].isnan().all()
            flat = (exact.amax(-1) == exact.amin(-1)) & (kv_dtype == "int8")
            assert torch.equal(part[flat], exact[flat])


@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize(("dtype", "kv_dtype"), FORMATS, ids=str)
def test_what_is_not_finite_stays_in_its_group(
    head_dim: int, dtype: torch.dtype, kv_dtype: str, device: torch.device
) -> None:
    x = spoilt(head_dim, dtype)
    for got in read(written(x, kv_dtype, device)):
        for part, exact in zip(got.split(64, -1), x.split(64, -1), strict=True):
            is_spoilt = ~exact.isfinite().all(-1)
            assert part[is_spoilt].isnan().all()
            assert part[~is_spoilt].isfinite().all()


@pytest.mark.parametrize(("dtype", "kv_dtype"), FORMATS, ids=str)
def test_every_code_is_the_nearest(dtype: torch.dtype, kv_dtype: str, device: torch.device) -> None:
    """All 16-bit numbers from 0 to the largest of a group, against torch's own conversion."""
    top = 448.0 if kv_dtype == "fp8" else 255.0  # the scale is 1
    every = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.float() <= top]
    x = every[: len(every) // 63 * 63].view(-1, 63)
    ends = torch.full((len(x), 1), top)
    if kv_dtype == "int8":
        x, ends = x[:, :62], torch.cat([torch.zeros(len(x), 1), ends], 1)
    x = torch.cat([ends.to(dtype), x], 1)
    codes = torch.stack(cases.row_entries(written(x, kv_dtype, device), 0, 0)[:2])
    if kv_dtype == "fp8":
        expected = x.float().to(torch.float8_e4m3fn)
    else:
        expected = x.float().round().to(torch.uint8)
    assert torch.equal(codes[0].float(), expected.float())


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_verbs_name_what_is_wrong_with_quantised_pages(kv_dtype: str, device: torch.device) -> None:
    layer = cases.paged_layer(
        [[3, 5]], new_tokens=1, dtype=torch.float16, kv_dtype=kv_dtype, device=device
    )
    x = torch.randn(1, 2, 1, 64, device=device)
    scales = layer.key_scales
    assert scales is not None
    with pytest.raises(ValueError, match="need keys, values and queries in float16 or bfloat16"):
        ops.append(x, x, layer)
    for wrong, message in [
        (layer._replace(key_scales=None), "key_scales is missing"),
        (layer._replace(value_scales=scales.bfloat16()), "value_scales must be float16"),
        (layer._replace(key_scales=scales[..., :0].clone()), "key_scales must have [12] numbers"),
        (layer._replace(key_scales=scales[:, :8]), "key_scales must be"),
        (layer._replace(pages=layer.pages[..., :32]), "pages must be"),
        (
            layer._replace(pages=layer.pages.expand(-1, 2, -1, -1)[:, :1].expand(-1, 2, -1, -1)),
            "contiguous",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.append(x.half(), x.half(), wrong)
    plain = cases.paged_layer([[3, 5]], new_tokens=1, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match="must be left out for pages of float16"):
        ops.append(x.half(), x.half(), plain._replace(key_scales=scales))
