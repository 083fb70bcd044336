"""Weights of a random attention predictor."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

SHAPES = {
    "conv1.weight": (16, 1, 3, 3), "conv1.bias": (16,),
    "conv2.weight": (32, 16, 3, 3), "conv2.bias": (32,),
    "conv3.weight": (1, 32, 1), "conv3.bias": (1,),
}  # fmt: skip


def predictor_file(folder: Path) -> tuple[str, dict[str, Tensor]]:
    weights = {name: torch.randn(shape) / 3 for name, shape in SHAPES.items()}
    path = str(folder / "predictor.safetensors")
    save_file(weights, path)
    return path, weights
