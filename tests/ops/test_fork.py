"""Forks of a cache through random histories: each branch holds its own tokens and no other's, and
pages are free when nobody has them."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import adakv
import cases
import reference
from adakv import ops
from adakv.cache import KVCache, sequences
from adakv.entries import Held
from adakv.tensors import Source

LAYERS, HEADS, DIM = 2, 2, 8


@dataclass
class Text:
    """What a sequence ought to hold: in each row positions, and the numbers of their entries."""

    rows: list[list[list[tuple[int, int]]]] = field(
        default_factory=lambda: [[[] for _ in range(HEADS)] for _ in range(LAYERS)]
    )
    seen: int = 0

    def copy(self, back: int = 0) -> Text:
        rows = [[row[: len(row) - back] for row in layer] for layer in self.rows]
        return Text(rows, self.seen - back)


class Branch:
    """A cache, and its texts beside it."""

    numbers = 0  # of entries made so far

    def __init__(self, cache: KVCache, texts: list[Text]) -> None:
        self.cache, self.texts = cache, texts

    @classmethod
    def made(cls, device: torch.device, kv_dtype: str, batch: int, num_pages: int = 600) -> Branch:
        cache = KVCache(
            num_layers=LAYERS,
            num_sequences=batch,
            num_kv_heads=HEADS,
            head_dim=DIM,
            num_pages=num_pages,
            max_row_pages=100,
            page_size=8 if kv_dtype == "auto" else 32,
            dtype=torch.float32 if kv_dtype == "auto" else torch.bfloat16,
            device=device,
            kv_dtype=kv_dtype,
        )
        return cls(cache, [Text() for _ in range(batch)])

    def entries(self, rows: list[list[tuple[int, int]]], width: int, *, by_place: bool) -> Tensor:
        """``[Hkv, width, D]`` of entries, by position or on the right; NaN elsewhere."""
        x = torch.full((HEADS, width, DIM), float("nan"))
        for h, row in enumerate(rows):
            for i, (position, number) in enumerate(row):
                x[h, position if by_place else width - len(row) + i] = value_of(number)
        return x

    def begin(self, b: int, length: int, *, model_wide: bool = False) -> None:
        cache, text = self.cache, Text(seen=length)
        for layer in range(LAYERS):
            for h in range(HEADS):
                kept = torch.randperm(length)[: int(torch.randint(length + 1, ()))].sort().values
                text.rows[layer][h] = [(p, self.number()) for p in kept.tolist()]
        totals = [sum(map(len, layer)) for layer in text.rows]
        if model_wide:  # as many pages for all layers together
            mean = -(-sum(totals) // LAYERS)
            page_ids, starts = cache.begin_layers(
                range(LAYERS), [[mean]] * LAYERS, [length], first_sequence=b
            )
        for layer, rows in enumerate(text.rows):
            if not model_wide:
                page_ids, starts = cache.begin(layer, [totals[layer]], [length], first_sequence=b)
            view = sequences(cache.layer(layer), slice(b, b + 1))
            keys = self.entries(rows, length, by_place=True).to(cache.dtype)[None].to(cache.device)
            flat = [position for row in rows for position, _ in row]
            ends = torch.tensor([0, *map(len, rows)]).cumsum(0).int().to(cache.device)
            kept = ops.Kept(cases.int32(flat, cache.device), ends)
            ops.compact(keys.nan_to_num(), -keys.nan_to_num(), kept, view, page_ids, starts)
            if model_wide:
                cache.advance_pages(starts, view.lengths)
        self.texts[b] = text

    def number(self) -> int:
        Branch.numbers += 1
        return Branch.numbers

    def append(self, counts: list[int]) -> None:
        cache, columns = self.cache, max(counts)
        missing = cache.pages_to_grow(counts) - cache.num_free
        if missing > 0:
            cache.reserve(num_pages=cache.num_pages + missing)
        while columns:
            now = cache.grow(counts, columns)
            piece = [max(0, n - (columns - now)) for n in counts]
            for layer in range(LAYERS):
                keys = []
                for text, n in zip(self.texts, piece, strict=True):
                    new = [[(text.seen + i, self.number()) for i in range(n)] for _ in range(HEADS)]
                    keys.append(self.entries(new, now, by_place=False))
                    for row, more in zip(text.rows[layer], new, strict=True):
                        row += more
                x = torch.stack(keys).nan_to_num().to(cache.dtype).to(cache.device)
                ops.append(x, -x, cache.layer(layer), num_new=cases.int32(piece, cache.device))
            for text, n in zip(self.texts, piece, strict=True):
                text.seen += n
            counts = [n - p for n, p in zip(counts, piece, strict=True)]
            columns -= now

    def fork(self, sources: list[int], back: list[int], *, whole: bool) -> Branch:
        cache = self.cache
        missing = cache.pages_to_fork(sources, whole=whole) - cache.num_free
        if missing > 0:
            cache.reserve(num_pages=cache.num_pages + missing + 7)
        made = cache.fork(sources, back=back, whole=whole)
        texts = [
            self.texts[b].copy(n) for b, n in zip(sources, back or [0] * len(sources), strict=True)
        ]
        return Branch(made, texts)

    def choose_again(self) -> None:
        """Some entries of every row leave, in place."""
        cache, kept_rows = self.cache, []
        for layer in range(LAYERS):
            kept_rows.append([])
            for text in self.texts:
                for h, row in enumerate(text.rows[layer]):
                    stays = torch.rand(len(row)) < 0.7
                    slots = stays.nonzero().flatten().tolist()
                    kept_rows[-1].append(slots)
                    text.rows[layer][h] = [row[i] for i in slots]
        totals = [
            [sum(map(len, text.rows[layer])) for text in self.texts] for layer in range(LAYERS)
        ]
        longest = [max(len(r) for layer in text.rows for r in layer) for text in self.texts]
        if cache.num_free < cache.pages_used:
            cache.reserve(num_pages=2 * cache.num_pages)
        page_ids, starts = cache.begin_again(totals, longest)
        for layer, rows in enumerate(kept_rows):
            ends = torch.tensor([0, *map(len, rows)]).cumsum(0).int().to(cache.device)
            flat = cases.int32([slot for row in rows for slot in row], cache.device)
            kept = ops.Kept(flat, ends)
            ops.compact(None, None, kept, cache.layer(layer), page_ids, starts[layer])

    def check(self) -> None:
        cache = self.cache
        assert cache.pages_used + cache.num_free == cache.num_pages
        size, step = cache.page_size, 1 / (3 if cache.kv_dtype == "int2" else 15)
        for layer in range(LAYERS):
            view = cases.mapped(cache.layer(layer), Tensor.cpu)
            for b, text in enumerate(self.texts):
                assert view.seen[b] == text.seen
                for h, row in enumerate(text.rows[layer]):
                    length, num_pages = int(view.lengths[b, h]), -(-len(row) // size)
                    assert length == len(row)
                    table = view.block_table[b, h]
                    assert (table[num_pages:] == -1).all() and (table[:num_pages] >= 0).all()
                    pages = table[:num_pages].long()
                    positions = view.page_positions[pages].flatten()[:length].tolist()
                    assert positions == [position for position, _ in row]
                    if cache.kv_dtype == "auto":
                        keys, values = view.pages[pages].transpose(0, 1).flatten(1, 2)[:, :length]
                        wanted = torch.stack([value_of(number) for _, number in row] or [keys[0:0]])
                        assert torch.equal(keys, wanted.view(keys.shape)), (layer, b, h)
                        assert torch.equal(values, -keys)
            if cache.kv_dtype != "auto":
                self.check_codes(layer, step)

    def check_codes(self, layer: int, step: float) -> None:
        """Codes and tails, read as attention reads them."""
        longest = max(len(row) for text in self.texts for row in text.rows[layer])
        view = cases.mapped(self.cache.layer(layer), Tensor.cpu)
        held = Held(view, longest, torch.bfloat16)
        for b, text in enumerate(self.texts):
            for h, row in enumerate(text.rows[layer]):
                if not row:
                    continue
                wanted = torch.stack([value_of(number) for _, number in row])
                for x, y in ((held.keys, wanted), (held.values, -wanted)):
                    assert (x[b, h, : len(row)] - y).abs().max() <= step


def value_of(number: int) -> Tensor:
    """Elements ``[D]`` in 0 .. 1 that tell numbers apart."""
    return ((number * torch.arange(1, DIM + 1) * 37) % 64) / 64


@dataclass(frozen=True)
class Case:
    """``back`` and ``stretch`` are those of the sources ``(1, 0, 1, 2)``."""

    stretch: tuple[int, ...]
    back: tuple[int, ...] | None = None
    whole: bool = False

    def __str__(self) -> str:
        text = f"back{self.back}" if self.back else "all"
        return f"{text}-whole" if self.whole else f"{text}-stretch{self.stretch}"


CASES = [
    Case((0, 0, 0, 0)),
    Case((1, 2, 7, 3)),
    Case((8, 8, 8, 8)),
    Case((5, 1, 8, 0), back=(1, 9, 0, 0)),
    Case((0, 0, 8, 8), back=(16, 17, 3, 0)),
    Case((8, 0, 3, 1), whole=True),
    Case((8, 0, 3, 1), back=(9, 1, 16, 0), whole=True),
]


@pytest.mark.parametrize(
    ("kv_dtype", "value_dim"),
    [
        ("auto", 16),
        ("int8", 16),
        ("fp8", 16),
        ("int4", 16),
        ("int2", 16),
        ("auto", 8),
        ("int8", 72),
    ],
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fork_equals_the_definition(
    case: Case, kv_dtype: str, value_dim: int, device: torch.device
) -> None:
    if cases.has_tails(kv_dtype) and case.back:
        pytest.skip("its keys share scales")
    dtype = torch.float32 if kv_dtype == "auto" else torch.bfloat16
    lengths, sources = [[17, 40, 24], [16, 32, 19], [0, 9, 1]], [1, 0, 1, 2]
    settings = {"page_size": 8, "head_dim": 16, "value_dim": value_dim}
    settings |= {"dtype": dtype, "device": device}
    source = cases.paged_layer(lengths, kv_dtype=kv_dtype, **settings)
    num_pages, _, page_size, _ = source.pages.shape
    back = case.back or (0,) * 4
    held = [[n - less for n in lengths[b]] for b, less in zip(sources, back, strict=True)]
    counts = [sum(-(-n // page_size) for n in row) + 3 if case.whole else 6 for row in held]
    free = [*{*range(num_pages)}.difference(source.block_table.flatten().tolist())]
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    given = [cases.int32(x) for x in (sources, case.stretch, free[: ends[-1]], ends)]
    columns = source.block_table.shape[2]
    rows = cases.empty_layer(4, 3, num_pages=1, columns=columns, kv_dtype=kv_dtype, **settings)
    own = {name: getattr(rows, name) for name in ("block_table", "lengths", "seen", "fresh_pages")}
    layer = source._replace(**own, tails=rows.tails)
    before, expected = cases.copied(source), cases.copied(layer)
    reference.fork(
        Source(before.block_table, before.lengths, before.seen, before.tails),
        *given,
        expected,
        back=cases.int32(back),
        whole=case.whole,
    )
    ops.fork(
        Source(source.block_table, source.lengths, source.seen, source.tails),
        *(x.to(device) for x in given),
        layer,
        back=cases.int32(back, device) if case.back else None,
        whole=case.whole,
    )
    cases.assert_same_layer(layer, expected)
    cases.assert_same_layer(source, before)


@pytest.mark.parametrize("kv_dtype", ["auto", "int4", "int2", "int8"])
@pytest.mark.parametrize("seed", range(4))
def test_branches_of_random_histories_hold_their_own_tokens(
    kv_dtype: str, seed: int, device: torch.device
) -> None:
    torch.manual_seed(seed)
    root = Branch.made(device, kv_dtype, batch=2)
    for b in range(2):
        root.begin(b, int(torch.randint(1, 60, ())), model_wide=seed % 2 == 1)
    branches = [root]
    for step in range(60):
        now = branches[int(torch.randint(len(branches), ()))]
        choice, batch = int(torch.randint(10, ())), len(now.texts)
        if choice < 4:
            most = 45 if choice == 0 else 3
            now.append([int(torch.randint(most + 1, ())) for _ in range(batch)])
        elif choice < 7 and len(branches) < 5:
            count = int(torch.randint(1, 4, ()))
            sources = torch.randint(batch, (count,)).tolist()
            back = [] if cases.has_tails(kv_dtype) else [0] * count
            if back and choice == 6:
                held = [min(len(r) for rows in now.texts[b].rows for r in rows) for b in sources]
                back = [min(int(torch.randint(20, ())), most) for most in held]
                newest = [newest_of(now.texts[b]) for b in sources]
                back = [min(n, most) for n, most in zip(back, newest, strict=True)]
            branches.append(now.fork(sources, back, whole=choice == 5))
        elif choice == 7 and len(branches) > 1:
            branches.remove(now)
        elif choice == 8 and not cases.has_tails(kv_dtype):
            if any(now.cache.shares_pages(b) for b in range(batch)):
                with pytest.raises(ValueError, match="fork"):
                    now.cache.begin_again([[9] * batch] * LAYERS, [9] * batch)
                place = branches.index(now)
                now = now.fork(list(range(batch)), [], whole=True)
                branches[place] = now
            now.choose_again()
        if step % 4 == 0:
            for branch in branches:
                branch.check()
    last = branches.pop()
    branches.clear()
    del root, branch, now
    last.check()
    for b in range(len(last.texts)):
        last.cache.remove(b)
    assert last.cache.num_free == last.cache.num_pages


def newest_of(text: Text) -> int:
    """How many of the newest tokens every row holds."""
    count = 0
    while all(
        len(row) > count and row[-1 - count][0] == text.seen - 1 - count
        for rows in text.rows
        for row in rows
    ):
        count += 1
    return count


def test_forking_again_and_again_takes_no_more_pages(device: torch.device) -> None:
    """As beam search does: a thousand steps take the pages of their tokens."""
    cache = Branch.made(device, "auto", batch=1)
    cache.begin(0, 20)
    length, used = 0, []
    for step in range(120):
        cache = cache.fork([0, 0], [], whole=False).fork([1], [], whole=False)
        cache.append([1])
        length += 1
        used.append(cache.cache.pages_used)
        if step % 10 == 0:
            cache.check()
    most = LAYERS * HEADS * (-(-20 // 8) + 2 + -(-length // 8) + 2)
    assert used[-1] <= most


def test_branches_share_the_pages_of_what_they_have_in_common(device: torch.device) -> None:
    root = Branch.made(device, "auto", batch=1)
    root.begin(0, 300)
    before = root.cache.pages_used
    branches = [root.fork([0], [], whole=False) for _ in range(10)]
    assert root.cache.pages_used == before + 10 * 2 * LAYERS * HEADS
    assert root.cache.shares_pages(0)
    del branches
    assert root.cache.pages_used == before and not root.cache.shares_pages(0)


def test_a_fork_that_does_not_fit_changes_nothing(device: torch.device) -> None:
    root = Branch.made(device, "auto", batch=1, num_pages=40)
    root.begin(0, 60)
    free = root.cache.num_free
    with pytest.raises(adakv.Error, match=f"{free} free"):
        root.cache.fork([0] * 20)
    for sources, back, message in (
        ([], [], "at least one"),
        ([1], [], "sequence must be 0 .. 0, got 1"),
        ([0], [-1], "back must not be negative"),
        ([0], [1, 2], "back must have 1 elements"),
    ):
        with pytest.raises(ValueError, match=message):
            root.cache.fork(sources, back=back)
    assert root.cache.num_free == free
    root.check()
    root.append([9])
    root.check()


def test_a_pool_that_grows_does_so_for_all_branches(device: torch.device) -> None:
    root = Branch.made(device, "auto", batch=1, num_pages=60)
    root.begin(0, 60)
    branch = root.fork([0, 0], [], whole=False)
    branch.append([100, 30])
    assert root.cache.num_pages == branch.cache.num_pages > 60
    assert root.cache.layer(1).pages.data_ptr() == branch.cache.layer(1).pages.data_ptr()
    root.append([50])
    for each in (root, branch):
        each.check()


@pytest.mark.parametrize("kv_dtype", ["auto", "int4"])
@pytest.mark.parametrize("model_wide", [False, True])
def test_branches_within_a_cache_come_and_go(
    kv_dtype: str, model_wide: bool, device: torch.device
) -> None:
    """The last slot holds a text on which the others go on, each for a while."""
    torch.manual_seed(3)
    root = Branch.made(device, kv_dtype, batch=4)
    root.begin(3, 70, model_wide=model_wide)
    cache, alone = root.cache, root.cache.pages_used
    for step in range(30):
        slot = int(torch.randint(3, ()))
        if root.texts[slot].seen:
            cache.remove(slot)
            root.texts[slot] = Text()
        else:
            source = 3 if step % 3 else (slot + 1) % 3
            if root.texts[source].seen:
                cache.fork_into(slot, [source])
                root.texts[slot] = root.texts[source].copy()
        new = [int(torch.randint(12, ())) if text.seen else 0 for text in root.texts[:3]]
        root.append([*new, 0])
        root.check()
    for slot in range(3):
        cache.remove(slot)
    assert cache.pages_used == alone
    with pytest.raises(ValueError, match="sequence 3 holds entries already"):
        cache.fork_into(2, [3, 3])
    with pytest.raises(ValueError, match=r"sequence must be 0 \.\. 3, got 4"):
        cache.fork_into(4, [3])
    assert cache.pages_used == alone
