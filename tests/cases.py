"""Case tables, and inputs made to be hostile.

Everything that a verb must not read holds NaN, views are not contiguous, block tables are shuffled
and lengths ragged, unless a case says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import codes
from adakv.formats import bits_of_keys, key_dims
from adakv.ops import Layer

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Dtypes of keys and values with the ``kv_dtype`` of pages that may hold them.
FORMATS = (
    *((dtype, "auto") for dtype in DTYPES),
    *((dtype, kv_dtype) for kv_dtype in ("int8", "fp8") for dtype in DTYPES[1:]),
)
#: The same where rows have tails and pages 32 entries: int4, int2, and with mixed keys.
TAILED = tuple((dtype, kv_dtype) for kv_dtype in ("int4", "int2", "mixed") for dtype in DTYPES[1:])


def mixed_dims(kv_dtype: str, head_dim: int) -> tuple[int, int]:
    """Dimensions of mixed keys in 16 bits and in 2: of "mixed" some of each, if there are so many,
    else those of a format."""
    if kv_dtype == "mixed":
        return 4, (head_dim - 8) // 16 * 8
    return key_dims(bits_of_keys(kv_dtype) or 4, head_dim)


def has_tails(kv_dtype: str) -> bool:
    """Whether rows have tails."""
    return kv_dtype in ("int4", "int2") or kv_dtype.startswith("mixed")


def noncontiguous(x: Tensor) -> Tensor:
    """The same numbers in a view with gaps in every dimension but the last, which is contiguous."""
    shape = [2 * size + 1 for size in x.shape[:-1]] + [x.shape[-1] + 8]
    hole = float("nan") if x.is_floating_point() else -(2**31)
    host = torch.full(shape, hole, dtype=x.dtype, device=x.device)
    view = host[tuple(slice(1, None, 2) for _ in x.shape[:-1])][..., : x.shape[-1]]
    view.copy_(x)
    return view


@dataclass(frozen=True)
class Prompt:
    """The tensors of B sequences of T positions, or of ``seq_lens`` positions each."""

    batch: int = 2
    kv_heads: int = 2
    group: int = 4
    length: int = 100
    window: int = 8
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    seq_lens: tuple[int, ...] | None = None

    def __str__(self) -> str:
        shape = f"{self.batch}x{self.kv_heads}x{self.group}-T{self.length}-W{self.window}"
        ragged = "" if self.seq_lens is None else "-" + "_".join(map(str, self.seq_lens))
        return f"{shape}-D{self.head_dim}-{str(self.dtype)[6:]}{ragged}"

    def lengths(self, device: torch.device) -> Tensor | None:
        """``seq_lens`` as a tensor."""
        return None if self.seq_lens is None else int32(self.seq_lens, device)

    def queries(self, device: torch.device) -> Tensor:
        """``[B, Hq, W, D]``."""
        return self._random(self.kv_heads * self.group, self.window, device)

    def entries(self, device: torch.device) -> Tensor:
        """Keys or values ``[B, Hkv, T, D]``; NaN behind ``seq_lens``."""
        x = self._random(self.kv_heads, self.length, device)
        for b, seq_len in enumerate(self.seq_lens or ()):
            x[b, :, seq_len:] = float("nan")
        return x

    def w_o(self, device: torch.device, width: int = 96) -> Tensor:
        """``[E, Hq * D]``."""
        x = torch.randn(width, self.kv_heads * self.group * self.head_dim) / self.head_dim**0.5
        return noncontiguous(x.to(device, self.dtype))

    def _random(self, heads: int, length: int, device: torch.device) -> Tensor:
        x = torch.randn(self.batch, heads, length, self.head_dim)
        return noncontiguous(x.to(device, self.dtype))


def int32(values: object, device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def random_scores(batch: int, heads: int, length: int, *, levels: int = 0) -> Tensor:
    """``[B, H, T]`` float32 as a softmax gives them, heads of very different sharpness.

    With ``levels`` there are only so many different values: ties everywhere.
    """
    sharpness = torch.rand(batch, heads, 1) * 4
    scores = torch.softmax(torch.randn(batch, heads, length) * sharpness, -1)
    return torch.floor(scores * length * levels / 4) / levels if levels else scores


def paged_layer(
    lengths: list[list[int]],
    *,
    page_size: int = 16,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    new_tokens: int = 0,
    seen: list[int] | None = None,
    device: torch.device | str = "cpu",
    kv_dtype: str = "auto",
    value_dim: int | None = None,
) -> Layer:
    """A layer whose rows hold random entries, with fresh pages for ``new_tokens`` more.

    Pages are shuffled over a pool twice as large as needed; all slots without an entry hold NaN.
    Pages with tails have 32 entries, whatever ``page_size`` says.
    """
    page_size = 32 if has_tails(kv_dtype) else page_size
    held = int32(lengths)  # [B, Hkv]
    used = -(-held // page_size)
    fresh = -(-(held + new_tokens) // page_size) - used
    num_fresh = max(int(fresh.max()), 1) if held.numel() else 1
    columns = int((used + num_fresh).max()) + 2 if held.numel() else 2
    num_pages = 2 * int((used + num_fresh).sum()) + 3
    free = iter(torch.randperm(num_pages).tolist())
    widths = (head_dim, value_dim or head_dim)
    pages = torch.full((num_pages, 2, page_size, max(widths)), float("nan"))
    page_positions = torch.full((num_pages, page_size), -7, dtype=torch.int32)
    table = torch.full((*held.shape, columns), -1, dtype=torch.int32)
    fresh_pages = torch.full((*held.shape, num_fresh), -1, dtype=torch.int32)
    if seen is None:
        seen = [max(row, default=0) + 5 for row in lengths]
    for b, h in torch.cartesian_prod(*(torch.arange(n) for n in held.shape)).tolist():
        length = lengths[b][h]
        positions = torch.randperm(max(seen[b], length))[:length].sort().values
        for slot in range(0, length, page_size):
            page = next(free)
            count = min(page_size, length - slot)
            table[b, h, slot // page_size] = page
            pages[page, :, :count] = torch.randn(2, count, max(widths))
            page_positions[page, :count] = positions[slot : slot + count]
        for k in range(num_fresh):
            fresh_pages[b, h, k] = next(free)
    layer = Layer(
        **held_as(pages.to(dtype), kv_dtype, device, widths),
        page_positions=page_positions.to(device),
        block_table=noncontiguous(table.to(device)),
        lengths=noncontiguous(held.to(device)),
        seen=int32(seen, device),
        fresh_pages=noncontiguous(fresh_pages.to(device)),
    )
    return with_tails(layer, pages.to(dtype)) if has_tails(kv_dtype) else layer


def empty_layer(
    batch: int,
    heads: int,
    *,
    num_pages: int,
    columns: int,
    page_size: int = 16,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    kv_dtype: str = "auto",
    value_dim: int | None = None,
) -> Layer:
    """A layer before compact: NaN in all slots, nonsense in all integers."""
    page_size = 32 if has_tails(kv_dtype) else page_size
    widths = (head_dim, value_dim or head_dim)
    pages = torch.full((num_pages, 2, page_size, max(widths)), float("nan"), dtype=dtype)
    shapes = [
        (num_pages, page_size),
        (batch, heads, columns),
        (batch, heads),
        (batch,),
        (batch, heads, 4),
    ]
    names = ("page_positions", "block_table", "lengths", "seen", "fresh_pages")
    layer = Layer(
        **held_as(pages, kv_dtype, device, widths),
        **{
            name: torch.full(shape, -7, dtype=torch.int32, device=device)
            for name, shape in zip(names, shapes, strict=True)
        },
    )
    return with_tails(layer, pages) if has_tails(kv_dtype) else layer


def held_as(
    pages: Tensor, kv_dtype: str, device: torch.device | str, widths: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """The fields of a layer that hold ``pages`` ``[N, 2, P, D]``; quantised ones lie apart, as they
    do in a cache. Of keys and values that differ in their ``widths``, so many dimensions."""
    if widths is not None and widths[0] != widths[1]:
        return _held_apart(pages, kv_dtype, device, widths)
    if kv_dtype == "auto":
        return {"pages": pages.to(device)}
    if kv_dtype.startswith("mixed"):
        return _held_mixed(pages, mixed_dims(kv_dtype, pages.shape[3]), device)
    if has_tails(kv_dtype):
        parts = [codes.quantise_page(*page, kv_dtype) for page in pages]
        names = ("pages", "key_scales", "value_scales")
        return {
            name: apart(torch.stack(x).to(device))
            for name, x in zip(names, zip(*parts, strict=True), strict=True)
        }
    held, scales = codes.quantise(pages, kv_dtype)
    halves = {"key_scales": scales[:, 0], "value_scales": scales[:, 1]}
    return {name: apart(x.to(device)) for name, x in ({"pages": held} | halves).items()}


def _held_apart(
    pages: Tensor, kv_dtype: str, device: torch.device | str, widths: tuple[int, int]
) -> dict[str, Tensor]:
    halves = [
        pages[:, half, :, :width] for half, width in enumerate(widths)
    ]  # [N, P, D], [N, P, Dv]
    fields = {}
    if kv_dtype != "auto":
        both = [codes.quantise(half, kv_dtype) for half in halves]
        halves = [held for held, _ in both]
        names = ("key_scales", "value_scales")
        fields = {name: apart(x.to(device)) for name, (_, x) in zip(names, both, strict=True)}
    return fields | _side_by_side(*(half.to(device) for half in halves))


def _held_mixed(
    pages: Tensor, dims: tuple[int, int], device: torch.device | str
) -> dict[str, Tensor]:
    parts = [codes.quantise_mixed_page(*page, *dims) for page in pages]
    keys, values, *scales = (torch.stack(x).to(device) for x in zip(*parts, strict=True))
    fields = {
        name: apart(x) for name, x in zip(("key_scales", "value_scales"), scales, strict=True)
    }
    return fields | _side_by_side(keys, values)


def _side_by_side(keys: Tensor, values: Tensor) -> dict[str, Tensor]:
    """Keys ``[N, P, ...]`` and values in pages, one behind the other."""
    halves = keys, values
    host = apart(torch.cat([half.flatten(1) for half in halves], 1))
    parts = host.split([half[0].numel() for half in halves], 1)
    held = [x.unflatten(1, (1, *half.shape[1:])) for x, half in zip(parts, halves, strict=True)]
    return {"pages": held[0], "value_pages": held[1]}


def with_tails(layer: Layer, pages: Tensor) -> Layer:
    """The layer with the last entries of its rows, those of ``pages`` ``[N, 2, P, D]``, in tails,
    and NaN in the rest of them."""
    _, _, page_size, head_dim = pages.shape
    tails = pages.new_full((*layer.lengths.shape, 2 * page_size, head_dim), float("nan"))
    for b, h in torch.cartesian_prod(*(torch.arange(n) for n in layer.lengths.shape)).tolist():
        length = int(layer.lengths[b, h])
        if length > 0 and length % page_size:
            page = int(layer.block_table[b, h, length // page_size])
            tails[b, h] = pages[page].flatten(0, 1)
    host = tails.new_full((len(tails), 2 * tails.shape[1] + 1, *tails.shape[2:]), float("nan"))
    host = host.to(layer.pages.device)
    host[:, 1::2] = tails.to(layer.pages.device)
    return layer._replace(tails=host[:, 1::2])


def apart(x: Tensor) -> Tensor:
    """The same in a view with 16 bytes between one element of the first dimension and the next."""
    size, gap = x[:1].numel(), 16 // x.element_size()
    host = torch.full((len(x), size + gap), 77, dtype=x.dtype, device=x.device)
    host[:, :size] = x.flatten(1)
    return host[:, :size].unflatten(1, x.shape[1:]) if len(x) else x


def with_biases(layer: Layer) -> Layer:
    """A layer of plain pages with random biases of its entries, and NaN in all other slots."""
    is_held = layer.page_positions >= 0
    biases = torch.randn(is_held.shape, device=is_held.device).where(is_held, torch.nan)
    return layer._replace(page_biases=biases.half())


def copied(layer: Layer) -> Layer:
    """A layer of its own with the same contents, on the CPU."""
    return mapped(layer, lambda x: torch.empty_like(x, device="cpu").copy_(x))


def mapped(layer: Layer, change: Callable[[Tensor], Tensor]) -> Layer:
    """The layer whose tensors were changed; those that it doesn't have stay None."""
    return Layer(*(x if x is None else change(x) for x in layer))


def row_entries(layer: Layer, b: int, h: int) -> tuple[Tensor, ...]:
    """Keys ``[length, D]`` and values ``[length, Dv]`` of a row in slot order, and their positions;
    of quantised pages the codes, and the scales of both behind them; of int4 pages those of the
    whole ones, and the row's tail."""
    length, page_size = int(layer.lengths[b, h]), layer.pages.shape[2]
    if layer.tails is not None:
        whole = layer.block_table[b, h, : length // page_size].long().cpu()
        held = (layer.pages, layer.value_pages, layer.key_scales, layer.value_scales)
        tail = layer.tails[b, h].unflatten(0, (2, page_size))[:, : length % page_size]
        every = layer.block_table[b, h, : -(-length // page_size)].long().cpu()
        positions = layer.page_positions.cpu()[every].flatten()[:length]
        return *(x.cpu()[whole] for x in held if x is not None), tail.cpu(), positions
    pages = layer.block_table[b, h, : -(-length // page_size)].long().cpu()
    slots = (
        *(layer.pages[:, 0], layer.values),
        *(layer.page_positions, layer.key_scales, layer.value_scales, layer.page_biases),
    )
    return tuple(x.cpu()[pages].flatten(0, 1)[:length] for x in slots if x is not None)


def assert_same_layer(actual: Layer, expected: Layer) -> None:
    """Equal integers, and bit for bit equal entries in every slot that is in use."""
    for name in ("block_table", "lengths", "seen", "fresh_pages"):
        a, b = getattr(actual, name).cpu(), getattr(expected, name).cpu()
        assert torch.equal(a, b), (name, a, b)
    for b, h in torch.cartesian_prod(*(torch.arange(n) for n in expected.lengths.shape)).tolist():
        for a, e in zip(row_entries(actual, b, h), row_entries(expected, b, h), strict=True):
            assert torch.equal(numbers(a), numbers(e)), (b, h)


def numbers(x: Tensor) -> Tensor:
    """What a tensor holds, so that equal numbers are equal: NaN, too."""
    return x if x.dtype == torch.int32 else x.float().nan_to_num(nan=-77.0)


#: Shapes that together reach every branch; quick.
PROMPTS = [
    Prompt(),
    Prompt(dtype=torch.float16),
    Prompt(dtype=torch.bfloat16),
    Prompt(head_dim=128, dtype=torch.bfloat16, seq_lens=(100, 61)),
    Prompt(head_dim=80, group=2, seq_lens=(37, 100)),
    Prompt(head_dim=96, group=1, dtype=torch.float16, window=32),
    Prompt(head_dim=256, kv_heads=1, group=8, length=257),
    Prompt(head_dim=8, group=16, window=1, dtype=torch.bfloat16),
    Prompt(head_dim=120, kv_heads=3, group=3, length=70, window=5),
]

#: Where things go wrong: T < W, T = 1, nothing at all, a window that covers everything.
CORNER_PROMPTS = [
    Prompt(length=5, window=8, seq_lens=(5, 3)),
    Prompt(length=1, window=1),
    Prompt(length=8, window=8),
    Prompt(length=9, window=8),
    Prompt(seq_lens=(0, 1)),
    Prompt(seq_lens=(8, 9)),
    Prompt(batch=0),
    Prompt(batch=1, kv_heads=1, group=1, length=3, window=1, head_dim=8),
]

LARGE_PROMPTS = [Prompt(batch=1, kv_heads=4, length=5000, window=32, head_dim=128)]
