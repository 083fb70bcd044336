"""One layer budget over ranks, on gloo."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from two_ranks import scores_of, work


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(folder)), nprocs=2)
    both = [torch.load(Path(folder) / str(rank)) for rank in range(2)]
    assert both[0] == both[1]
    return both[0]


def test_ranks_get_their_part_of_the_highest_scores(results: dict):
    scores = torch.stack([scores_of(rank, "random") for rank in range(2)])
    highest = scores.flatten().topk(60).indices // 200
    exact = torch.bincount(highest, minlength=2).tolist()
    assert sum(results["free"]) == 60
    assert abs(results["free"][0] - exact[0]) <= 2  # but for the bin where the budget ends
    assert results["free"][1] > results["free"][0] > 0


def test_ranks_take_no_more_than_their_blocks_hold(results: dict):
    assert results["capped"] == [25, 35]
    assert "total must be at most 2 ranks" in results["error"]


def test_ranks_share_equal_scores_evenly(results: dict):
    assert results["equal"] == [31, 30]


def test_ranks_get_all_there_is(results: dict):
    assert results["everything"] == [180, 180]
