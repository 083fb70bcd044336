"""Pages that a network foretells: the paper's sizes, the definition, and files that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import listed_pages
from adakv.policy import AttentionPredictor, get_read
from predictor_file import SHAPES, predictor_file

PAGE = 16


def test_sizes_of_the_paper(tmp_path: Path, device: torch.device) -> None:
    """4,833 parameters; of a budget of 1,024 entries 56 blocks of 16 are foretold, beside the first
    64 entries and the newest 64. Here an eighth of 8,192 entries is such a budget."""
    path, weights = predictor_file(tmp_path)
    assert sum(x.numel() for x in weights.values()) == 4_833
    history = torch.rand(1, 1, 2, 64, 512, device=device)
    lengths = torch.tensor([[8192]], dtype=torch.int32, device=device)
    pages, counts = AttentionPredictor(file=path).pages(history, lengths, page_size=16)
    read = pages[0, 0, : int(counts)].tolist()
    assert len(read) == 64 and read[:4] == [0, 1, 2, 3] and read[-4:] == [508, 509, 510, 511]


def test_a_network_that_repeats_the_last_steps(tmp_path: Path, device: torch.device) -> None:
    """One of its channels passes the history on, so that what is foretold is the mean over steps:
    .3 of page 1, .2 of page 2 and .4 of page 3, which is not read as page 4 has .5."""
    weights = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for name, place in (("conv1.weight", (0, 0, 1, 1)), ("conv2.weight", (0, 0, 1, 1))):
        weights[name][place] = 1
    weights["conv3.weight"][0, 0, 0] = 1
    path = str(tmp_path / "predictor.safetensors")
    save_file(weights, path)
    predictor = AttentionPredictor(file=path, share=3 / 6, first=1, newest=1, least=2)
    steps = torch.tensor([[9, 0.6, 0.2, 0.4, 0.5, 9], [9, 0.0, 0.2, 0.4, 0.5, 9]], device=device)
    lengths = torch.tensor([[6 * PAGE - 3]], dtype=torch.int32, device=device)
    pages, counts = predictor.pages(steps.view(1, 1, 1, 2, 6), lengths, page_size=PAGE)
    assert counts.tolist() == [[3]] and pages.flatten().tolist()[:3] == [0, 4, 5]


@pytest.mark.parametrize("steps", [1, 64])
@pytest.mark.parametrize(
    "settings",
    [
        {"share": 0.25},
        {"share": 0.5, "first": 1, "newest": 2, "least": 3},
        {"share": 0.3, "first": 0, "newest": 1, "least": 1},
        {"share": 1.0},
        {"share": 0.01},
    ],
    ids=str,
)
def test_pages_are_those_of_the_definition(
    tmp_path: Path, device: torch.device, steps: int, settings: dict[str, Any]
) -> None:
    """Rows of unequal length, down to one entry; what is behind a row's end may be anything."""
    path, weights = predictor_file(tmp_path)
    predictor = AttentionPredictor(file=path, **settings)
    lengths = [[600, 1, 255], [64, 90, 431]]
    history = torch.rand(2, 3, 2, steps, 38, device=device) ** 4
    counts_of = torch.tensor(lengths, dtype=torch.int32, device=device)
    pages, counts = predictor.pages(history, counts_of, page_size=PAGE)
    how = {name: getattr(predictor, name) for name in ("share", "least", "first", "newest")}
    for b, row_lengths in enumerate(lengths):
        for h, length in enumerate(row_lengths):
            expected = listed_pages.foretold_pages(
                history[b, h].cpu(), length, weights, page_size=PAGE, **how
            )
            assert pages[b, h, : int(counts[b, h])].tolist() == expected
            assert (pages[b, h, int(counts[b, h]) :] == 38).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0}, "share must be above 0 and at most 1, got 0"),
        ({"first": -1}, "first must be at least 0"),
        ({"newest": 0}, "newest must be at least 1"),
        ({"least": 7}, "least must be at least 8, got 7"),
        ({"history": 0}, "history must be at least 1"),
        ({"every": 0}, "every must be at least 1"),
        ({"file": "nothing"}, "file must be there, got 'nothing'"),
        ({"file": 5}, "file must be a path, got 5"),
    ],
)
def test_settings_are_checked(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    path, _ = predictor_file(tmp_path)
    with pytest.raises(ValueError, match=message):
        AttentionPredictor(**{"file": path} | settings)


def test_files_of_other_networks_are_refused(tmp_path: Path) -> None:
    path, weights = predictor_file(tmp_path)
    save_file(weights | {"conv2.weight": torch.zeros(16, 16, 3, 3)}, path)
    with pytest.raises(ValueError, match=r"conv2.weight \[32, 16, 3, 3\].*is \[16, 16, 3, 3\]"):
        AttentionPredictor(file=path)
    del weights["conv3.bias"]
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"file must hold conv3\.bias"):
        AttentionPredictor(file=path)


def test_reads_are_written_down(tmp_path: Path) -> None:
    path, _ = predictor_file(tmp_path)
    predictor = AttentionPredictor(file=path, share=0.25)
    assert get_read(str(predictor)) == predictor
    with pytest.raises(ValueError, match="PageRead\\(\\) must be one of Quest, AttentionPredictor"):
        get_read("PageRead()")
