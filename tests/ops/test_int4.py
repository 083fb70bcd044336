"""int4 and int2 pages with 16-bit tails: codes of whole pages, what is read before its page is
full, and what becomes of entries that no code can hold."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import cases
import reference
from adakv import ops
from adakv.cache import KVCache
from adakv.entries import Held
from ops.test_attend import schedule_of
from ops.test_quantised import DIMS, hostile
from tolerance import assert_close

KINDS = pytest.mark.parametrize("kv_dtype", ["int4", "int2"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def written(
    x: Tensor, device: torch.device, values: Tensor | None = None, kv_dtype: str = "int4"
) -> ops.Layer:
    """A layer whose one row was given entries ``[n, D]``: keys, and values, else those negated."""
    keys, values = (
        x[None, None].to(device),
        (-x if values is None else values)[None, None].to(device),
    )
    layer = cases.paged_layer(
        [[0]],
        head_dim=x.shape[-1],
        dtype=x.dtype,
        new_tokens=len(x),
        kv_dtype=kv_dtype,
        device=device,
    )
    expected = cases.copied(layer)
    reference.append(keys, values, expected)
    ops.append(keys, values, layer)
    cases.assert_same_layer(layer, expected)
    return layer


def whole_pages(x: Tensor) -> Tensor:
    """So many entries that every page is full."""
    return x.repeat(-(-32 // len(x)) + 1, 1)[: -(-len(x) // 32) * 32]


@pytest.mark.parametrize("head_dim", DIMS)
@DTYPES
@KINDS
def test_what_is_read_is_within_half_a_step(
    kv_dtype: str, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    """A step is the range / 15, in int2 / 3, rounded up to 16 bits: of a dimension over the 32 keys
    of a page, of 64 dimensions of a value, in int2 32."""
    most, group_dims = {"int4": (15, 64), "int2": (3, 32)}[kv_dtype]
    x = whole_pages(hostile(head_dim, dtype))
    keys, values = reference.row_of(written(x, device, kv_dtype=kv_dtype), 0, 0)
    exact = x.double().unflatten(0, (-1, 32))
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    spread = exact.amax(1, keepdim=True) - exact.amin(1, keepdim=True)
    step = spread / most * (1 + torch.finfo(dtype).eps) + smallest
    error = (keys.unflatten(0, (-1, 32)) - exact).abs()
    assert (error <= step / 2 * (1 + 1e-6)).all()
    assert (error[(spread == 0).expand_as(error)] == 0).all()
    for part, group in zip(
        values.split(group_dims, -1), (-x.double()).split(group_dims, -1), strict=True
    ):
        spread = group.amax(-1, keepdim=True) - group.amin(-1, keepdim=True)
        step = spread / most * (1 + torch.finfo(dtype).eps) + smallest
        fits = (spread <= torch.finfo(torch.float32).max).expand_as(part)
        assert ((part - group).abs() <= step / 2 * (1 + 1e-6))[fits].all()
        assert part[~fits].isnan().all()


@DTYPES
@KINDS
def test_every_code_is_the_nearest(kv_dtype: str, dtype: torch.dtype, device: torch.device) -> None:
    """All 16-bit numbers from 0 to the largest code, where the scale is 1."""
    largest, group_dims = {"int4": (15, 64), "int2": (3, 32)}[kv_dtype]
    every = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.float() <= largest]
    of_value = group_dims - 2
    x = every[: len(every) // (3 * of_value) * 3 * of_value].view(-1, of_value)
    ends = torch.tensor([0.0, largest], dtype=dtype)
    rows = whole_pages(torch.cat([ends.expand(len(x), 2), x], 1))
    values = reference.row_of(written(rows, device, rows, kv_dtype), 0, 0)[1]
    assert values[: len(x), 2:].equal(x.double().round())
    column = every[: len(every) // 30 * 30].view(-1, 30, 1)  # of 30 keys
    column = torch.cat([ends[None, :, None].expand(len(column), 2, 1), column], 1).flatten(0, 1)
    keys = reference.row_of(
        written(column.expand(-1, 8).contiguous(), device, kv_dtype=kv_dtype), 0, 0
    )[0]
    assert keys.equal(column.double().round().expand(-1, 8))


@DTYPES
@KINDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_entry(
    bad: float, kv_dtype: str, dtype: torch.dtype, device: torch.device
) -> None:
    x = torch.randn(64, 80).to(dtype)
    clean = reference.row_of(written(x, device, kv_dtype=kv_dtype), 0, 0)
    for half in range(2):
        both = torch.stack([x, -x])
        both[half, 5, 70] = both[half, 40, 3] = bad
        keys, values = reference.row_of(written(both[0], device, both[1], kv_dtype), 0, 0)
        others = [i for i in range(64) if i not in (5, 40)]
        assert torch.equal(values[others], clean[1][others])
        assert keys.isfinite().all()
        if half == 0:
            assert values[[5, 40]].isnan().all()
        else:  # a value's group by itself
            size = {"int4": 64, "int2": 32}[kv_dtype]
            first = 70 // size * size
            assert values[5, first : first + size].isnan().all() and values[40, :size].isnan().all()
            assert torch.equal(values[5, :first], clean[1][5, :first])
            assert torch.equal(values[40, size:], clean[1][40, size:])
            assert torch.equal(keys, clean[0])


@DTYPES
@KINDS
def test_a_page_without_a_finite_key(
    kv_dtype: str, dtype: torch.dtype, device: torch.device
) -> None:
    page = torch.full((32, 24), float("nan"), dtype=dtype)
    keys, values = reference.row_of(written(page, device, kv_dtype=kv_dtype), 0, 0)
    assert (keys == 0).all() and values.isnan().all()


@DTYPES
@KINDS
def test_attend_gives_nan_where_the_entry_counts(
    kv_dtype: str, dtype: torch.dtype, device: torch.device
) -> None:
    """In the row that has it, for the queries that see it."""
    layer = cases.paged_layer(
        [[61, 61]], dtype=dtype, new_tokens=8, kv_dtype=kv_dtype, device=device
    )
    keys, values = torch.randn(2, 1, 2, 8, 64).to(device, dtype)
    keys[0, 1, 1, 7] = float("inf")  # fills no page of its own, but is the 63rd of its row
    schedule = schedule_of(layer, new_tokens=8)
    queries = torch.randn(1, 4, 8, 64).to(device, dtype)
    out, lse = ops.attend(queries, layer, schedule, keys=keys, values=values)
    assert out[:, :2].isfinite().all() and lse.isfinite().all()
    assert out[:, 2:, 0].isfinite().all() and out[:, 2:, 1:].isnan().all()


@DTYPES
@KINDS
@pytest.mark.parametrize("head_dim", [8, 64, 120, 256])
@pytest.mark.parametrize(("columns", "num_new"), [(1, None), (1, (1, 0)), (3, (3, 1)), (40, None)])
def test_attend_reads_a_page_before_one_token_fills_it(
    columns: int,
    num_new: tuple[int, ...] | None,
    head_dim: int,
    kv_dtype: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    lengths = [[31, 63, 0, 64], [95, 31, 32, 700]]
    layer = cases.paged_layer(
        lengths,
        new_tokens=columns,
        head_dim=head_dim,
        dtype=dtype,
        kv_dtype=kv_dtype,
        device=device,
    )
    by_hand = cases.copied(layer)
    shape = (2, 4, columns, head_dim)
    keys, values = (cases.noncontiguous(torch.randn(shape).to(device, dtype)) for _ in "kv")
    queries = torch.randn(2, 12, columns, head_dim).to(device, dtype)
    counts = None if num_new is None else cases.int32(num_new, device)
    schedule = schedule_of(layer, new_tokens=columns, num_new=counts)
    out, lse = ops.attend(queries, layer, schedule, keys=keys, values=values, num_new=counts)
    reference.append(keys, values, by_hand, num_new=counts)
    cases.assert_same_layer(layer, by_hand)  # quantised by now
    options = {"num_new": counts, "appends": True}
    expected = reference.attend(queries, by_hand, **options)
    baseline = reference.attend(queries, by_hand, dtype=dtype, **options)
    assert_close(out, expected[0], baseline[0], "out")
    assert_close(lse, expected[1], baseline[1], "lse")


@DTYPES
@KINDS
def test_entries_are_read_out_of_pages_and_tails(
    kv_dtype: str, dtype: torch.dtype, device: torch.device
) -> None:
    lengths = [[5, 64, 0], [95, 32, 200]]
    layer = cases.paged_layer(lengths, head_dim=72, dtype=dtype, kv_dtype=kv_dtype, device=device)
    held = Held(layer, 200, dtype)
    for b, row in enumerate(lengths):
        for h, length in enumerate(row):
            keys, values = (x.float().to(dtype) for x in reference.row_of(layer, b, h))
            torch.testing.assert_close(held.keys[b, h, :length].cpu(), keys)
            torch.testing.assert_close(held.values[b, h, :length].cpu(), values)


def test_verbs_name_what_is_wrong_with_int4_pages(device: torch.device) -> None:
    layer = cases.paged_layer(
        [[3, 5]], new_tokens=1, dtype=torch.float16, kv_dtype="int4", device=device
    )
    x = torch.randn(1, 2, 1, 64, device=device)
    tails, scales, pages = layer.tails, layer.key_scales, layer.pages
    assert tails is not None and scales is not None
    with pytest.raises(ValueError, match="need keys, values and queries in float16 or bfloat16"):
        ops.append(x, x, layer)
    before = cases.copied(layer)
    for wrong, message in [
        (layer._replace(tails=None), "pages must be"),
        (layer._replace(tails=tails.bfloat16()), "tails must be float16"),
        (layer._replace(tails=tails[:, :, :32].clone()), r"tails must be \[B, Hkv, 64, D\]"),
        (layer._replace(tails=tails.repeat(1, 1, 1, 2)[..., :64]), "contiguous from the third"),
        (layer._replace(key_scales=None), "key_scales is missing"),
        (layer._replace(key_scales=scales[:, :, :8].clone()), "key_scales must be"),
        (layer._replace(value_scales=layer.value_scales[..., :0].clone()), "must have 2 numbers"),
        (layer._replace(pages=pages[..., :24].clone()), r"pages must be \[N, 2, P, 32\] for int4"),
        (layer._replace(pages=pages[..., :16].clone()), "value_scales must have 4 numbers"),  # int2
        (layer._replace(pages=pages.half()), "pages must be uint8"),
        (layer._replace(pages=pages[:, :, :16], page_positions=layer.page_positions[:, :16]), "32"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.append(x.half(), x.half(), wrong)
    cases.assert_same_layer(layer, before)


@KINDS
def test_caches_refuse_what_tails_are_not_for(kv_dtype: str) -> None:
    sizes = {"num_layers": 1, "num_sequences": 1, "num_kv_heads": 1, "head_dim": 64}
    sizes |= {"num_pages": 4, "max_row_pages": 4}
    with pytest.raises(ValueError, match=f"page_size must be 32 for pages of {kv_dtype}, got 16"):
        KVCache(**sizes, kv_dtype=kv_dtype, page_size=16)
    with pytest.raises(ValueError, match="float16 and bfloat16, got keys and values in float32"):
        KVCache(**sizes, kv_dtype=kv_dtype, dtype=torch.float32)


@pytest.mark.parametrize(("kv_dtype", "entry_bytes"), [("int4", 80 + 2 * 4), ("int2", 40 + 3 * 4)])
def test_bytes_of_a_cache_have_its_tails(kv_dtype: str, entry_bytes: int) -> None:
    cache = KVCache(
        num_layers=3,
        num_sequences=2,
        num_kv_heads=5,
        head_dim=80,
        num_pages=40,
        max_row_pages=4,
        kv_dtype=kv_dtype,
    )
    assert cache.page_size == 32
    assert cache.page_bytes == 32 * entry_bytes + 2 * 80 * 2 + 32 * 4
    assert cache.tail_bytes == 3 * 5 * 2 * 32 * 80 * 2
    assert cache.bytes_used == 0
    cache.begin(0, [40], [40])
    assert cache.bytes_used == cache.pages_used * cache.page_bytes + cache.tail_bytes
    tails = cache.layer(1).tails
    assert tails is not None and tails.shape == (2, 5, 64, 80)
    cache.remove(0)
    assert cache.bytes_used == 0


class History:
    """A cache and, beside it, what the definition makes of the same calls."""

    def __init__(self, seed: int, kv_dtype: str, device: torch.device) -> None:
        self.device = device
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.dtype = self.random.choice([torch.float16, torch.bfloat16])
        self.head_dim = self.random.choice([8, 64, 72, 128])
        self.cache = KVCache(
            num_layers=2,
            num_sequences=3,
            num_kv_heads=2,
            head_dim=self.head_dim,
            num_pages=200,
            max_row_pages=12,
            dtype=self.dtype,
            kv_dtype=kv_dtype,
            device=device,
        )
        self.live: set[int] = set()
        self.expected = [cases.copied(layer) for layer in self.cache.layers]
        self._share()

    def _share(self) -> None:
        """The definition's layers have one pool, too."""
        shared = ("pages", "value_pages", "page_positions", "key_scales", "value_scales")
        first = {name: getattr(self.expected[0], name) for name in shared}
        self.expected = [layer._replace(**first) for layer in self.expected]

    def begin(self) -> None:
        free = sorted({0, 1, 2} - self.live)
        if not free:
            return self.remove()
        b, length = self.random.choice(free), self.random.randrange(120)
        rows = [sorted(self.random.sample(range(length), k=length * i // 3)) for i in (1, 3)]
        kept = ops.Kept(
            cases.int32([t for row in rows for t in row], self.device),
            cases.int32([0, len(rows[0]), len(rows[0]) + len(rows[1])], self.device),
        )
        for layer in range(2):
            keys, values = self.entries(1, length), self.entries(1, length)
            total = len(kept.positions)
            pages = self.cache.begin(layer, [total], [length], first_sequence=b)
            ops.compact(keys, values, kept, rows_of(self.cache.layer(layer), b), *pages)
            reference.compact(keys, values, kept, rows_of(self.expected[layer], b), *pages)
        self.live.add(b)
        return None

    def remove(self) -> None:
        if self.live:
            b = self.random.choice(sorted(self.live))
            self.live.remove(b)
            self.cache.remove(b)
            for layer in self.expected:
                layer.block_table[b], layer.lengths[b], layer.seen[b] = -1, 0, 0

    def decode(self) -> None:
        columns = self.random.choice([1, 1, 1, 5, 33])
        counts = [self.random.choice([columns, columns // 2]) * (b in self.live) for b in range(3)]
        pages, rows = self.cache.pages_to_grow(counts), self.cache.row_pages_to_grow(counts)
        if pages > self.cache.num_free or rows > self.cache.max_row_pages:
            self.reserve(self.cache.num_pages + pages, rows + 3)
        while columns:
            now = self.cache.grow(counts, columns)
            new = [max(0, now - (columns - count)) for count in counts]
            self.step(now, new)
            counts = [count - n for count, n in zip(counts, new, strict=True)]
            columns -= now

    def step(self, columns: int, counts: list[int]) -> None:
        num_new, attends = cases.int32(counts, self.device), self.random.random() < 0.7
        schedule = ops.plan(
            *self.cache.plan_inputs, new_tokens=columns, num_new=num_new, page_size=32
        )
        for index, expected in enumerate(self.expected):
            layer = self.cache.layer(index)
            expected.fresh_pages.copy_(layer.fresh_pages)
            keys, values = self.entries(3, columns), self.entries(3, columns)
            queries = torch.randn(3, 4, columns, self.head_dim).to(self.device, self.dtype)
            reference.append(keys, values, expected, num_new=num_new)
            if not attends:
                ops.append(keys, values, layer, num_new=num_new)
                continue
            out, lse = ops.attend(
                queries, layer, schedule[index], keys=keys, values=values, num_new=num_new
            )
            given = {"num_new": num_new, "appends": True}
            right = reference.attend(queries, expected, **given)
            baseline = reference.attend(queries, expected, dtype=self.dtype, **given)
            assert_close(out, right[0], baseline[0], "out")
            assert_close(lse, right[1], baseline[1], "lse")

    def reserve(self, pages: int, rows: int) -> None:
        self.cache.reserve(num_pages=pages, max_row_pages=rows)
        before, self.expected = self.expected, [cases.copied(x) for x in self.cache.layers]
        self._share()
        for layer, old in zip(self.expected, before, strict=True):
            for b, h in torch.cartesian_prod(torch.arange(3), torch.arange(2)).tolist():
                new = cases.row_entries(layer, b, h)
                for a, e in zip(new, cases.row_entries(old, b, h), strict=True):
                    assert torch.equal(cases.numbers(a), cases.numbers(e))

    def check(self) -> None:
        for layer, expected in zip(self.cache.layers, self.expected, strict=True):
            expected.fresh_pages.copy_(layer.fresh_pages)
            cases.assert_same_layer(layer, expected)
        used = self.cache.pages_used * self.cache.page_bytes
        assert self.cache.bytes_used == used + len(self.live) * self.cache.tail_bytes

    def entries(self, batch: int, columns: int) -> Tensor:
        x = torch.randn(batch, 2, columns, self.head_dim) * torch.rand(self.head_dim).exp()
        return (x + 5 * torch.randn(self.head_dim)).to(self.device, self.dtype)


def rows_of(layer: ops.Layer, b: int) -> ops.Layer:
    names = ("block_table", "lengths", "seen", "fresh_pages", "tails")
    return layer._replace(**{name: getattr(layer, name)[b : b + 1] for name in names})


@pytest.mark.parametrize("kv_dtype", ["int4", "int2", "mixed3", "mixed6"])
@pytest.mark.parametrize("seed", range(4))
def test_random_histories(seed: int, kv_dtype: str, device: torch.device) -> None:
    history = History(seed, kv_dtype, device)
    for _ in range(25):
        action = history.random.choice(
            [history.begin, history.begin, history.remove, *[history.decode] * 6]
        )
        action()
        history.check()
