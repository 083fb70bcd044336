"""Devices, seeds and markers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import adakv

DEVICES = ["cpu"]
if torch.cuda.is_available() and "cuda" in adakv.backends():
    DEVICES.append("cuda")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    config.addinivalue_line("markers", "model: runs a transformers model")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and "cuda" not in DEVICES:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every test that takes it runs on the CPU, and on CUDA where there is one."""
    return torch.device(request.param)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny models: a parallel region costs more than what it would share out."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small model, for tests of the command line."""
    from small_model import save_model  # needs transformers

    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path: Path) -> str:
    """The name of a text's file, for tests of the command line."""
    path = tmp_path / "text.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 10)
    return str(path)
