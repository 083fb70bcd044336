"""Verbs in two streams at once, and what they must not share: a schedule, which ``attend`` counts
in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adakv import ops
from lockstep import GROUP, KV_HEADS, LAYERS, SEQUENCES, Lockstep, entries

pytestmark = pytest.mark.gpu


def test_two_streams_with_a_schedule_each_give_what_one_stream_does() -> None:
    both = Lockstep()
    for sequence, length in enumerate((600, 600, 600)):  # rows that several workers share
        both.prefill(sequence, length, most=length)
    cache = both.cuda
    queries = [entries(SEQUENCES, 1, KV_HEADS * GROUP).cuda() for _ in range(2)]
    schedules = [ops.plan(*cache.plan_inputs, new_tokens=0) for _ in range(2)]
    planned = [schedule.clone() for schedule in schedules]
    assert schedules[0][:, -8 * SEQUENCES * KV_HEADS :].view(LAYERS, -1, 8)[:, :, 4].max() > 1

    def attend(which: int, layer: int) -> tuple[Tensor, Tensor]:
        return ops.attend(queries[which], cache.layer(layer), schedules[which][layer])

    expected = [[attend(which, layer) for layer in range(LAYERS)] for which in range(2)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for i in range(200):
        for which, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[which].append(attend(which, i % LAYERS))
    torch.cuda.synchronize()
    for which in range(2):
        for i, (out, lse) in enumerate(results[which]):
            assert torch.equal(out, expected[which][i % LAYERS][0])
            assert torch.equal(lse, expected[which][i % LAYERS][1])
        assert torch.equal(schedules[which], planned[which])  # they serve again
