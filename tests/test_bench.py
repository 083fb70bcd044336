"""``adakv bench``: what is timed is the same attention, and all that was measured is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from adakv.cli.inputs import manual_text
from adakv.cli.main import run_command_line
from adakv.eval import speed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("is_even", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_ways_attend_to_the_same_entries(
    is_even: bool, dtype: torch.dtype, device: torch.device
) -> None:
    layers = speed.Layers(100, is_even=is_even, dtype=dtype, device=device)
    for i in range(9):  # more than there are layers
        ours, theirs = layers.adakv(i), layers.torch(i)
        torch.testing.assert_close(ours, theirs, atol=1e-2 if dtype.itemsize == 2 else 1e-5, rtol=0)
    assert not torch.equal(layers.adakv(0), layers.adakv(1))


def test_uneven_lengths_have_a_floor_and_the_mean() -> None:
    lengths = speed.uneven_lengths(1000, (200, 2, 8))
    assert lengths.shape == (200, 2, 8) and lengths.min() >= 200
    assert lengths.float().mean().item() == pytest.approx(1000, rel=1e-2)
    assert lengths.float().std() > 100


def test_numbers_are_the_same_every_time() -> None:
    sizes = {"is_even": False, "dtype": torch.float32, "device": torch.device("cpu"), "rounds": 2}
    found = speed.attend(64, **sizes)
    assert (found.entries, found.heads, found.adakv.rounds) == (64, "uneven", 2)
    assert found.speedup == found.torch.median_us / found.adakv.median_us > 0
    torch.manual_seed(0)
    first = speed.Layers(64, is_even=False, dtype=torch.float32, device=torch.device("cpu"))
    torch.manual_seed(0)
    second = speed.Layers(64, is_even=False, dtype=torch.float32, device=torch.device("cpu"))
    assert torch.equal(first.adakv(0), second.adakv(0))


@pytest.mark.model
def test_bench_measures_a_model_and_draws(model: str, tmp_path: Path, capsys: Any) -> None:
    out, picture = tmp_path / "bench.json", tmp_path / "bench.svg"
    words = ["bench", model, "--tokens", "300", "--rounds", "1", "--max-new-tokens", "4"]
    words += ["--dtype", "float32", "--json", str(out), "--plot", str(picture), "--ratio", "0.25"]
    assert run_command_line(words) == 0
    shown = capsys.readouterr().out
    for text in ("torch: ", "threads: ", "Decode attention", "uneven", "full cache", "tokens read"):
        assert text in shown
    assert picture.read_text().startswith("<?xml")
    found = json.loads(out.read_text())
    assert [case["entries"] for case in found["attend"]] == [1024, 1024, 4096, 4096, 16384, 16384]
    full, compressed = found["runs"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    num_tokens = len(tokenizer(manual_text(tokenizer, 300))["input_ids"])
    assert full["prompt_tokens"] == compressed["prompt_tokens"] == num_tokens
    assert len(full["tokens"]) == len(compressed["tokens"]) == 4
    assert compressed["cache_bytes"] < 0.6 * full["cache_bytes"]
    for run in found["runs"]:
        assert run["prefill_seconds"] > 0 and run["token_seconds"] > 0


def test_bench_refuses_what_it_cannot_use(tmp_path: Path, capsys: Any) -> None:
    assert run_command_line(["bench", "--policy", "snapkw"]) == 2
    assert "did you mean 'snapkv'?" in capsys.readouterr().err
    assert run_command_line(["bench", "--plot", str(tmp_path)]) == 2
    assert "can't be written" in capsys.readouterr().err
