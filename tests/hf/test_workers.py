"""Prompts over several processes: here two on the CPU."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import adakv
from adakv.hf.workers import UNITS, _units
from hf.families import LLAMA, VOCAB

pytestmark = pytest.mark.model

TWO = ["cpu", "cpu"]


def llama(device: torch.device) -> Any:
    """A model for each process."""
    return LLAMA.model().to(device)


def killed(device: torch.device) -> Any:
    """A process that is gone before it writes."""
    os.kill(os.getpid(), signal.SIGKILL)


def broken(device: torch.device) -> Any:
    """A process without its model."""
    raise RuntimeError("no such weights")


def given(*lengths: int) -> list[list[int]]:
    return [torch.randint(3, VOCAB, (n,)).tolist() for n in lengths]


def test_prompts_over_two_processes_are_written_as_by_one():
    """In their order, with their own counts, spans and chance."""
    prompts = given(70, 40, 90, 60, 45, 80, 55)
    how: dict[str, Any] = {
        "policy": "ada_snapkv",
        "budget": 48,
        "max_new_tokens": [5, 9, 3, 12, 1, 7, 8],
        "protect": [[(0, i + 1)] for i in range(7)],
        "options": adakv.BatchOptions(temperature=1.0, seed=3, max_batch=2),
    }
    expected = adakv.generate_batch(LLAMA.model(), prompts, **how)
    found = adakv.generate_on(TWO, llama, [torch.tensor(prompts[0]), *prompts[1:]], **how)
    assert found == expected
    assert [result.index for result in found] == list(range(7))


def test_processes_read_a_prefix_each():
    (prefix,), prompts = given(90), given(5, 40, 3)
    how: dict[str, Any] = {"budget": 48, "max_new_tokens": [5, 9, 3], "protect": [[(3, 9)]]}
    expected = adakv.generate_batch(LLAMA.model(), prompts, prefix=prefix, **how)
    assert adakv.generate_on(TWO, llama, prompts, prefix=torch.tensor(prefix), **how) == expected


def test_a_folder_will_do(tmp_path: Path):
    LLAMA.model().save_pretrained(tmp_path)
    (result,) = adakv.generate_on(TWO, tmp_path, given(60), budget=40, max_new_tokens=4)
    assert len(result.tokens) == 4 or result.end == "eos"
    assert adakv.generate_on(TWO, tmp_path, []) == []


def test_errors_name_the_prompt_and_the_device():
    prompts = given(60, 60, 60)
    options = adakv.BatchOptions(max_batch=1, cache_bytes=150_000)
    with pytest.raises(adakv.Error, match=r"prompts\[2\] can never fit"):
        adakv.generate_on(
            TWO, llama, [*prompts[:2], given(400)[0]], ratio=1.0, max_new_tokens=2, options=options
        )
    one_each = adakv.BatchOptions(max_batch=1)
    with pytest.raises(
        adakv.Error, match=r"cpu ended with exit code -9 while it had prompts\[\d\]"
    ):
        adakv.generate_on(TWO, killed, prompts[:2], budget=40, options=one_each)
    with pytest.raises(adakv.Error, match=r"prompts\[\d\] on cpu: RuntimeError: no such weights"):
        adakv.generate_on(TWO, broken, prompts[:2], budget=40, options=one_each)


@pytest.mark.parametrize("devices", ["cuda:0", [], ["cuda:0", "cuda:0"]])
def test_devices_are_a_list_of_different_ones(devices: Any):
    with pytest.raises(ValueError, match="devices must"):
        adakv.generate_on(devices, llama, given(60), budget=40)


@pytest.mark.parametrize(
    ("count", "max_batch", "sizes"),
    [
        (1, 64, [1]),
        (7, 64, [4, 3]),  # evenly
        (100, 8, [13] * 7 + [9]),  # not all at once
        (100, 30, [30, 30, 30, 10]),  # but full batches
    ],
)
def test_units_are_full_batches_where_all_have_some(count: int, max_batch: int, sizes: list[int]):
    assert UNITS == 4
    options = adakv.BatchOptions(max_batch=max_batch, seed=5)
    units = list(_units([[1]] * count, 2, options, {"protect": None, "max_new_tokens": 3}))
    assert [len(unit.prompts) for unit in units] == sizes
    assert [unit.settings["options"].seed - 5 for unit in units] == [x.first for x in units]
