"""A thousand requests through one engine: nothing is left of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("vllm.v1", reason="vllm isn't installed; make test-vllm runs these tests")

import vllm_many_requests
from vllm_engine import elsewhere, save_llama
from vllm_many_requests import ENVIRONMENT, REQUESTS, ROUNDS

#: Bytes that the policy remembers of a prompt: its window's queries in all layers, float32.
REMEMBERED = 3 * 4 * 32 * 32 * 4


@pytest.mark.slow
def test_nothing_is_left_of_a_thousand_requests(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    done = elsewhere(vllm_many_requests.run, save_llama(tmp_path))
    assert done.counts.requests_compressed == done.counts.compressed_under_pressure > REQUESTS
    assert done.num_preemptions > 0 and done.cached > ROUNDS * REQUESTS
    for name, value in done._asdict().items():
        record_property(name, value)
    most = (ROUNDS - 2) * REQUESTS * REMEMBERED / 2
    for sizes in (done.resident, done.on_device):
        assert sizes[-1] - sizes[1] < most, sizes  # the first rounds are left to allocators
