"""Trained gates: what their files say, however a prompt comes, and which files are refused."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import reference
from adakv.policy import Gate, LayerInputs, get
from cases import Prompt
from policy.helpers import kept_rows, layer_inputs
from tolerance import assert_close

LAYERS, HEADS, WIDTH, MIDDLE, LENGTH = 4, 2, 24, 12, 90


def weights(kind: str, layers: int = LAYERS, width: int = WIDTH) -> dict[str, Tensor]:
    """Those of a random gate, "linear" or "mlp"."""
    found = {}
    for layer in range(layers):
        name, into = f"layers.{layer}", width
        if kind == "mlp":
            found[f"{name}.0.weight"] = torch.randn(MIDDLE, width) / width**0.5
            found[f"{name}.0.bias"] = torch.randn(MIDDLE)
            name, into = f"{name}.2", MIDDLE
        found[f"{name}.weight"] = torch.randn(HEADS, into) / into**0.5
        found[f"{name}.bias"] = torch.randn(HEADS) - 4
    return found


def gate_file(folder: Path, kind: str = "linear", **sizes: int) -> str:
    path = folder / "gate.safetensors"
    save_file(weights(kind, **sizes), path)
    return str(path)


def hidden_inputs(device: torch.device, *, layer: int = 1) -> LayerInputs:
    """Two prompts, of which the second is shorter."""
    prompt = Prompt(length=LENGTH, seq_lens=(LENGTH, LENGTH - 30))
    inputs = layer_inputs(prompt, device, layer=layer, num_layers=LAYERS)
    return replace(inputs, hidden=torch.randn(2, LENGTH, WIDTH, device=device))


def test_a_gate_computed_by_hand(tmp_path: Path, device: torch.device) -> None:
    """x = (1, 2): head 0 has ln(1/2) * 1 + ln(1/4) * 2 = -5 ln 2, head 1 has 2 ln 3 - ln 3."""
    path = str(tmp_path / "gate.safetensors")
    rows = [[-math.log(2), -math.log(4)], [0.0, math.log(3)]]
    save_file(
        {"layers.0.weight": torch.tensor(rows), "layers.0.bias": torch.tensor([0, -math.log(3)])},
        path,
    )
    entries = torch.zeros(1, 2, 1, 8, device=device)
    hidden = torch.tensor([[[1.0, 2.0]]], device=device)
    inputs = LayerInputs(entries, entries, entries, None, (1,), 0, 1, hidden=hidden)
    scores = Gate(path, pinned=0).score(inputs)
    torch.testing.assert_close(scores.cpu(), torch.tensor([[[2.0**-5], [3.0]]]))
    scores = Gate(path, pinned=0, threshold=0.04).score(inputs)
    torch.testing.assert_close(scores.cpu(), torch.tensor([[[-math.inf], [3.0]]]))
    assert Gate(path, pinned=1).score(inputs).isinf().all()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scores_are_those_of_the_definition(
    tmp_path: Path, device: torch.device, kind: str, dtype: torch.dtype
) -> None:
    inputs = hidden_inputs(device)
    assert inputs.hidden is not None
    inputs = replace(inputs, hidden=inputs.hidden.to(dtype))
    given = weights(kind)
    path = str(tmp_path / "gate.safetensors")
    save_file({name: x.to(dtype) for name, x in given.items()}, path)
    rounded = {name: x.to(device, dtype) for name, x in given.items()}
    scores = Gate(path, pinned=0).score(inputs)
    assert scores.dtype == torch.float32
    hidden = inputs.hidden
    assert hidden is not None
    expected, baseline = (reference.gate(hidden.to(t), rounded, 1) for t in (torch.float64, dtype))
    assert_close(scores.log(), expected, baseline)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("borders", [[1], [60], [7, 8, 88]], ids=str)
def test_parts_give_what_the_whole_prompt_gives(
    tmp_path: Path, device: torch.device, kind: str, borders: list[int]
) -> None:
    gate, whole = Gate(gate_file(tmp_path, kind)), hidden_inputs(device)
    hidden, taken = whole.hidden, None
    assert hidden is not None
    for start, end in pairwise([0, *borders, LENGTH]):
        taken = gate.take(taken, replace(whole, hidden=hidden[:, start:end]))
    assert taken is not None
    torch.testing.assert_close(gate.finish(taken, whole), gate.score(whole))


@pytest.mark.parametrize("allocator", ["Uniform()", "Adaptive()", "Capped()"])
@pytest.mark.parametrize("selector", ["TopScore()", "TwoStage()"])
def test_a_gate_is_a_scorer_like_others(
    tmp_path: Path, device: torch.device, allocator: str, selector: str
) -> None:
    """Written down it comes back, and what stays is what its scores say."""
    gate = Gate(gate_file(tmp_path), window=8)
    policy = get(f"{gate} * {allocator} * {selector}")
    assert policy.scorer == gate and get(str(policy)) == policy and "hidden" in policy.needs
    inputs = hidden_inputs(device)
    kept = policy.choose(inputs, 30)
    assert kept_rows(kept, HEADS) == kept_rows(
        policy.choose(inputs, 30, scores=gate.score(inputs)), HEADS
    )


def test_a_threshold_leaves_room(tmp_path: Path, device: torch.device) -> None:
    gate = Gate(gate_file(tmp_path), window=8, pinned=2, threshold=0.018)
    policy = get(f"{gate} * Capped() * TopScore()")
    inputs = hidden_inputs(device)
    given = {name: x.to(device) for name, x in load_file(gate.file).items()}
    assert inputs.hidden is not None
    logits = reference.gate(inputs.hidden, given, 1).tolist()
    for b, rows in enumerate(kept_rows(policy.choose(inputs, LENGTH - 1), HEADS)):
        length = inputs.prompt_lens[b]
        for row, of_row in zip(rows, logits[b], strict=True):
            best = {t for t in range(length) if math.exp(of_row[t]) >= 0.018}
            assert 0 < len(best) < length
            kept = {0, 1, *best, *range(length - 8, length)}
            fits = length <= LENGTH - 1  # then all of it stays, as Capped says
            assert row == sorted(range(length) if fits else kept)


def test_a_file_that_changed_is_read_again(tmp_path: Path, device: torch.device) -> None:
    inputs = hidden_inputs(device)
    path = gate_file(tmp_path)
    first = Gate(path).score(inputs)
    before = os.stat(path).st_mtime_ns
    gate_file(tmp_path)
    os.utime(path, ns=(before + 1, before + 1))
    assert not torch.equal(Gate(path).score(inputs), first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "file must hold layers.0.*holds layers .*"),
        ({"layers.1.weight": [4, 24], "layers.1.bias": [4]}, r"holds layers \[1\]"),
        ({"layers.0.weight": [4, 24]}, "file must hold layers.0.bias"),
        ({"layers.0.0.weight": [4, 24], "layers.0.0.bias": [4]}, "file must hold layers.0.2.weigh"),
        ({"layers.0.weight": [4, 24], "layers.0.bias": [5]}, r"\[out, in\].*\[4, 24\] and \[5\]"),
        ({"layers.0.weight": [24], "layers.0.bias": [24]}, r"\[24\] and \[24\]"),
        (
            {"layers.0.0.weight": [6, 24], "layers.0.0.bias": [6],
             "layers.0.2.weight": [4, 7], "layers.0.2.bias": [4]},
            "takes the 6 numbers .* it takes 7",
        ),
        (
            {"layers.0.weight": [4, 24], "layers.0.bias": [4],
             "layers.1.weight": [4, 25], "layers.1.bias": [4]},
            "layers of one size",
        ),
    ],
)  # fmt: skip
def test_what_is_no_gate_is_refused(
    tmp_path: Path, change: dict[str, list[int]], message: str
) -> None:
    path = tmp_path / "gate.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in change.items()}, path)
    with pytest.raises(ValueError, match=message):
        Gate(str(path))


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\xff" * 100])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "gate.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="file must be a safetensors file, got"):
        Gate(str(path))
    with pytest.raises(ValueError, match="file must be "):
        Gate(str(tmp_path))
    with pytest.raises(ValueError, match="file must be there"):
        Gate(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="file must be there"):
        get("Gate(file='nothing') * Adaptive() * TopScore()")


@pytest.mark.parametrize("sizes", [{"layers": 3}, {"width": 25}])
def test_a_gate_of_another_model_is_refused(
    tmp_path: Path, device: torch.device, sizes: dict[str, int]
) -> None:
    gate = Gate(gate_file(tmp_path, **sizes))
    with pytest.raises(ValueError, match="file must be of a gate for 4 layers of 2 kv heads and"):
        gate.score(hidden_inputs(device))


def test_hidden_states_must_be_there(tmp_path: Path, device: torch.device) -> None:
    gate, inputs = Gate(gate_file(tmp_path)), hidden_inputs(device)
    assert inputs.hidden is not None
    with pytest.raises(ValueError, match="hidden must be given"):
        gate.score(replace(inputs, hidden=None))
    with pytest.raises(ValueError, match="hidden must be that of all 90 positions, got 89"):
        gate.score(replace(inputs, hidden=inputs.hidden[:, 1:]))
    with pytest.raises(ValueError, match=r"hidden must be \[B, T, E\] with B = 2, got \[1, 90"):
        replace(inputs, hidden=inputs.hidden[:1])
