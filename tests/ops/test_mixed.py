"""Mixed keys: dimensions in 16, in 4 and in 2 bits of pages that are int4's otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cases
import codes
import reference
from adakv import ops
from adakv.cache import KVCache
from adakv.entries import Held
from adakv.formats import bits_of_keys, key_dims
from ops.test_attend import schedule_of
from ops.test_int4 import whole_pages, written
from ops.test_quantised import hostile

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@pytest.mark.parametrize(
    ("bits", "head_dim", "dims"),
    [
        (2, 64, (0, 64)),
        (2.5, 64, (0, 48)),
        (3, 64, (0, 32)),
        (4, 64, (0, 0)),
        (5, 64, (4, 0)),  # 4.75
        (6, 96, (16, 0)),
        (3, 80, (0, 40)),
        (3, 72, (0, 40)),  # less than asked for
        (8, 256, (84, 0)),
    ],
)
def test_bits_become_dimensions(bits: float, head_dim: int, dims: tuple[int, int]) -> None:
    assert key_dims(bits, head_dim) == dims


@pytest.mark.parametrize("head_dim", [8, 24, 64, 72, 80, 96, 120, 128, 256])
def test_dimensions_have_no_more_bits_than_asked_for(head_dim: int) -> None:
    for tenths in range(20, 81):
        in_16, in_2 = key_dims(tenths / 10, head_dim)
        in_4 = head_dim - in_16 - in_2
        assert in_16 % 4 == in_4 % 4 == in_2 % 8 == 0
        assert min(in_16, in_4, in_2) >= 0
        given = 16 * in_16 + 4 * in_4 + 2 * in_2
        assert tenths / 10 * head_dim - 48 < given <= tenths / 10 * head_dim + 1e-9


@pytest.mark.parametrize("kv_dtype", ["mixed", "mixed1.9", "mixed9", "mixed3.123", "mixed-3"])
def test_other_bits_are_refused(kv_dtype: str) -> None:
    sizes = {"num_layers": 1, "num_sequences": 1, "num_kv_heads": 1, "head_dim": 64}
    with pytest.raises(ValueError, match="kv_dtype"):
        KVCache(**sizes, num_pages=4, max_row_pages=4, kv_dtype=kv_dtype)


def test_codes_are_packed_from_the_lowest_bits_on() -> None:
    four = torch.tensor([[3, 0, 1, 2]], dtype=torch.uint8)
    assert codes.packed(four, 2).tolist() == [[3 | 0 << 2 | 1 << 4 | 2 << 6]]
    assert codes.packed(four, 4).tolist() == [[3, 1 | 2 << 4]]
    assert codes.unpacked(codes.packed(four, 2), 2).equal(four)


@pytest.mark.parametrize("kv_dtype", ["mixed", "mixed2", "mixed3"])
@pytest.mark.parametrize("head_dim", [8, 64, 72, 128, 256])
@DTYPES
def test_what_is_read_is_within_half_a_step(
    head_dim: int, dtype: torch.dtype, kv_dtype: str, device: torch.device
) -> None:
    """The step is a 15th or a third of a dimension's range over a page's 32 keys, or nothing."""
    x = whole_pages(hostile(head_dim, dtype))
    keys, values = reference.row_of(written(x, device, kv_dtype=kv_dtype), 0, 0)
    in_16, in_2 = cases.mixed_dims(kv_dtype, head_dim)
    steps = torch.full((head_dim,), 15.0).double()
    steps[head_dim - in_2 :] = 3
    exact = x.double().unflatten(0, (-1, 32))
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    spread = exact.amax(1, keepdim=True) - exact.amin(1, keepdim=True)
    step = spread / steps * (1 + torch.finfo(dtype).eps) + smallest
    error = (keys.unflatten(0, (-1, 32)) - exact).abs()
    assert (error <= step / 2 * (1 + 1e-6)).all()
    assert (error[..., :in_16] == 0).all()
    assert (error[(spread == 0).expand_as(error)] == 0).all()
    as_int4 = reference.row_of(written(x, device), 0, 0)[1]
    torch.testing.assert_close(values, as_int4, rtol=0, atol=0, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_entry(
    bad: float, dtype: torch.dtype, device: torch.device
) -> None:
    x = torch.randn(64, 80).to(dtype)
    clean = reference.row_of(written(x, device, kv_dtype="mixed"), 0, 0)
    broken = x.clone()
    broken[5, 0] = broken[40, 79] = bad  # in 16 bits, and in 2
    keys, values = reference.row_of(written(broken, device, -x, kv_dtype="mixed"), 0, 0)
    others = [i for i in range(64) if i not in (5, 40)]
    assert keys.isfinite().all()
    assert values[[5, 40]].isnan().all()
    assert torch.equal(values[others], clean[1][others])
    in_16, _ = cases.mixed_dims("mixed", 80)
    assert torch.equal(keys[others, :in_16], clean[0][others, :in_16])
    assert (keys[[5, 40], :in_16] == 0).all()


@DTYPES
def test_a_page_without_a_finite_key(dtype: torch.dtype, device: torch.device) -> None:
    page = torch.full((32, 24), float("nan"), dtype=dtype)
    keys, values = reference.row_of(written(page, device, kv_dtype="mixed"), 0, 0)
    assert (keys == 0).all() and values.isnan().all()


@DTYPES
def test_the_order_of_dimensions_does_not_change_attention(
    dtype: torch.dtype, device: torch.device
) -> None:
    """Where all dimensions have the same bits: queries and keys in another order give the same."""
    order = torch.randperm(64)
    x = torch.randn(1, 1, 96, 64).to(dtype)
    queries = torch.randn(1, 2, 1, 64).to(dtype)
    outs = []
    for channels in (torch.arange(64), order):
        layer = written(x[0, 0][:, channels], device, x[0, 0], kv_dtype="mixed2")
        asked = queries[..., channels].to(device)
        outs.append(ops.attend(asked, layer, schedule_of(layer, new_tokens=0))[0].cpu())
    torch.testing.assert_close(outs[0], outs[1], atol=2e-2, rtol=2e-2)


def test_keys_of_pages_are_not_read_out(device: torch.device) -> None:
    layer = cases.paged_layer([[64, 40]], dtype=torch.bfloat16, kv_dtype="mixed3", device=device)
    with pytest.raises(ValueError, match="mixed keys can't be read out of their pages"):
        _ = Held(layer, 64, torch.bfloat16).keys


def layer_of(**changes: Tensor | None) -> ops.Layer:
    layer = cases.paged_layer([[3, 5]], new_tokens=1, dtype=torch.float16, kv_dtype="mixed")
    return layer._replace(**changes)


def test_verbs_name_what_is_wrong_with_mixed_pages() -> None:
    layer = layer_of()
    x = torch.randn(1, 2, 1, 64).half()
    values, scales, pages = layer.value_pages, layer.key_scales, layer.pages
    assert values is not None and scales is not None
    before = cases.copied(layer)
    for wrong, message in [
        (layer_of(value_pages=values[..., :24].clone()), "value_pages"),
        (layer_of(value_pages=values.half()), "value_pages"),
        (layer_of(key_scales=scales[:, :, :58].clone()), "multiple n of 4 dimensions"),
        (layer_of(pages=pages[..., :20].clone()), "pages"),
        (layer_of(tails=None), "must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.append(x, x, wrong)
    cases.assert_same_layer(layer, before)


@pytest.mark.parametrize(
    ("head_dim", "kv_dtype"), [(64, "mixed3"), (80, "mixed2"), (256, "mixed5")]
)
def test_bytes_of_a_cache_are_those_of_its_dimensions(head_dim: int, kv_dtype: str) -> None:
    cache = KVCache(
        num_layers=3,
        num_sequences=2,
        num_kv_heads=5,
        head_dim=head_dim,
        num_pages=40,
        max_row_pages=4,
        kv_dtype=kv_dtype,
    )
    in_16, in_2 = key_dims(bits_of_keys(kv_dtype) or 0, head_dim)
    keys = 32 * (16 * in_16 + 4 * (head_dim - in_16 - in_2) + 2 * in_2) // 8
    groups = -(-head_dim // 64)
    scales = 2 * (head_dim - in_16) * 2 + 32 * 2 * groups * 2
    assert cache.kv_dtype == kv_dtype and cache.page_size == 32
    assert cache.page_bytes == keys + 32 * head_dim // 2 + scales + 32 * 4
    assert cache.tail_bytes == 3 * 5 * 2 * 32 * head_dim * 2
