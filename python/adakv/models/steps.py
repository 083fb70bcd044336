"""How a decoder's steps are run: as they are, compiled, or replayed from CUDA graphs.

A model's forward in PyTorch takes the host milliseconds, a replay microseconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from adakv.models.decode import Decoder


class Steps:
    """Runs the steps of a decoder.

    Parameters
    ----------
    decoder : :class:`adakv.models.decode.Decoder`
    cuda_graph : bool
        On CUDA, record the step of each width once and replay it.
    compile : bool
        Let ``torch.compile`` fuse the step before: a minute or more for the first one.
    """

    def __init__(self, decoder: Decoder, *, cuda_graph: bool = True, compile: bool = False) -> None:
        self._decoder = decoder
        self._compiles = compile
        self._records = cuda_graph and decoder.slots.tokens.is_cuda
        self._runs: dict[int, Callable[[], object]] = {}

    def run(self, num_slots: int) -> None:
        """A step of the first slots, of so many at least, after :meth:`Decoder.grow`."""
        width = self._width(num_slots)
        if width not in self._runs:
            self._runs[width] = self._prepare(width)
        self._runs[width]()

    def _width(self, num_slots: int) -> int:
        """All slots if compiled; of those that are recorded 1, 2, 4, 8, 16, 24 and so on."""
        most = len(self._decoder.slots.tokens)
        if self._compiles:
            return most
        if not self._records:
            return num_slots
        if num_slots > 8:
            return min(most, -(-num_slots // 8) * 8)
        return min(most, 1 << (num_slots - 1).bit_length())

    def _prepare(self, width: int) -> Callable[[], object]:
        step: Callable[[], object] = self._decoder.step(width)
        if self._compiles:
            step = torch.compile(step, fullgraph=True, dynamic=False)
        if not self._records:
            return step
        with self._decoder.idle():
            side = _side_stream(torch.cuda.current_device())
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # torch asks for this before recording
                for _ in range(2):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                step()
        return graph.replay


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """Where steps are recorded: one for all, as cuBLAS keeps a workspace for each it has seen."""
    return torch.cuda.Stream(device)
