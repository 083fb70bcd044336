"""Tiny models: one thread for all of them."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def tiny_models(one_thread: None) -> None:
    """Every test here takes :func:`conftest.one_thread`."""
