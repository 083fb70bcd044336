"""Which pages a step reads: worked examples, the definition, and what rows of any length do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import listed_pages
from adakv.policy import Quest, get_read
from adakv.policy.reads import top_p
from adakv.step import Attention

PAGE, DIM = 8, 16


def test_top_p_of_the_worked_example(device: torch.device) -> None:
    """SpecAttn: .5 .3 .1 .06 .04 at mass .85 gives the threshold .099609 after ten halvings."""
    weights = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04], device=device)
    assert listed_pages.top_p(weights.double(), 0.85) == pytest.approx(0.099609, abs=1e-6)
    threshold = top_p(weights, 0.85)
    assert float(threshold) == pytest.approx(0.099609, abs=1e-6)
    assert (weights >= threshold).nonzero().flatten().tolist() == [0, 1, 2]


def bounds_of(keys: Tensor, num_pages: int) -> Tensor:
    """``[B, Hkv, m, 2 D]`` of keys ``[B, Hkv, T, D]``; what is behind the last whole page is no
    number."""
    batch, heads, length, dim = keys.shape
    bounds = keys.new_full((batch, heads, num_pages, 2 * dim), math.nan)
    whole = length // PAGE
    pages = keys[:, :, : whole * PAGE].reshape(batch, heads, whole, PAGE, dim)
    bounds[:, :, :whole] = torch.cat([pages.amax(3), pages.amin(3)], -1)
    return bounds


def test_a_choice_computed_by_hand(device: torch.device) -> None:
    """Two numbers a key, q = (1, -2). Bounds: 3 - 2 * -1 = 5, 1 - 2 * 2 = -3 and 0 - 2 * -4 = 8:
    of four pages half is read, the newest and that of 8."""
    pages = [[(3, -1), (-9, 5)], [(1, 2), (0, 3)], [(0, -4), (-1, 9)], [(7, -7), (7, -7)]]
    keys = torch.tensor(pages, dtype=torch.float32, device=device).repeat(1, PAGE // 2, 1)
    keys = keys.view(1, 1, 4 * PAGE, 2)
    queries = torch.tensor([1.0, -2.0], device=device).view(1, 1, 1, 2)
    lengths = torch.tensor([[4 * PAGE]], dtype=torch.int32, device=device)
    quest, how = Quest(share=0.5, least=0), {"page_size": PAGE, "attention": Attention(0.1)}
    listed, counts = quest.pages(queries, bounds_of(keys, 4), lengths, **how)  # type: ignore[arg-type]
    assert listed.flatten().tolist() == [2, 3] and counts.tolist() == [[2]]


SETTINGS = [
    Quest(share=0.25, least=0),
    Quest(share=0.3, least=3, newest=2),
    Quest(share=0.5, mass=0.6, least=0),
    Quest(share=1.0, mass=0.3, least=0),
    Quest(share=0.01, least=0),
    Quest(share=1.0),
    Quest(share=0.1, least=100),
]


@pytest.mark.parametrize("quest", SETTINGS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("attention", [Attention(), Attention(0.5, 3.0)])
def test_pages_are_those_of_the_definition(
    device: torch.device, quest: Quest, tokens: int, attention: Attention
) -> None:
    """Rows of unequal length, of which one has tokens only in some columns."""
    lengths = [[150, 9], [1, 96], [17, 160]]
    num_new = [tokens, min(tokens, 1), tokens]
    lengths = [[max(n, new) for n in row] for row, new in zip(lengths, num_new, strict=True)]
    keys = torch.randn(3, 2, 160, DIM, device=device)
    queries = torch.randn(3, 6, tokens, DIM, device=device)
    listed, counts = quest.pages(
        queries,
        bounds_of(keys, 21),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        page_size=PAGE,
        attention=attention,
        num_new=torch.tensor(num_new, dtype=torch.int32, device=device),
    )
    assert listed.shape[2] <= 21 + quest.newest + 2
    for b, new in enumerate(num_new):
        for h in range(2):
            expected = _expected(
                quest, queries[b, 3 * h : 3 * h + 3], keys[b, h, : lengths[b][h]], new, attention
            )
            count = int(counts[b, h])
            assert listed[b, h, :count].tolist() == expected
            assert (listed[b, h, count:] == 21).all()


def _expected(
    quest: Quest, queries: Tensor, keys: Tensor, new: int, attention: Attention
) -> list[int]:
    tokens = queries.shape[1]
    asked = queries[:, tokens - new :]
    if new < tokens:  # pages at the end are those of the columns, padding or not
        padding = asked[:, :1].expand(-1, tokens - new, -1)
        asked = torch.cat([padding, asked], 1)
    return listed_pages.listed_pages(
        asked.cpu(), keys.cpu(), page_size=PAGE, share=quest.share, mass=quest.mass,
        least=quest.least, newest=quest.newest, scale=attention.scale, softcap=attention.softcap,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0}, "share must be above 0 and at most 1, got 0"),
        ({"share": 1.1}, "share must be above 0"),
        ({"mass": 0.0}, "mass must be above 0 and at most 1"),
        ({"mass": 2}, "mass must be above 0"),
        ({"newest": 0}, "newest must be at least 1"),
        ({"least": -1}, "least must be at least 0"),
        ({"full_layers": -1}, "full_layers must be at least 0"),
        ({"share": "half"}, "share must be a number"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quest(**settings)  # type: ignore[arg-type]


def test_reads_are_written_down() -> None:
    quest = Quest(share=0.25, mass=0.9)
    assert str(quest) == "Quest(share=0.25, mass=0.9)" and get_read(str(quest)) == quest
    assert get_read(quest) is quest and get_read("Quest()") == Quest()
    for wrong in ("quest", "Quest(0.5)", "Adaptive()", "Quest() * Quest()", 5, None):
        with pytest.raises(ValueError, match=r"^read "):
            get_read(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unexpected keyword argument 'shar': did you mean 'share"):
        get_read("Quest(shar=0.5)")
