"""The peers of attend over all layers of a case of bench_attend.py."""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peers.flashinfer_decode import FlashInferDecode
from peers.torch_decode import PaddedAttention, VarlenAttention, packed
from ragged_layers import Layers


@dataclass
class FlashInfer:
    """FlashInfer over all layers of a case, one token shorter: without the appended ones."""

    layers: Layers
    tensor_cores: bool
    decodes: list = field(default_factory=list)

    def __post_init__(self) -> None:
        data, case = self.layers, self.layers.case
        self.pages = data.pool.unsqueeze(3)
        self.queries = data.queries.reshape(len(data.layers), -1, case.group, case.head_dim)
        self.out = torch.empty_like(self.queries)
        for i in range(len(data.layers)):
            workspace = torch.empty(64 << 20, dtype=torch.uint8, device=data.pool.device)
            decode = FlashInferDecode(
                data.table[i], data.lengths[i], case.page_size, case.group, case.head_dim,
                dtype=data.queries.dtype, kv_dtype=data.pool.dtype,
                tensor_cores=self.tensor_cores, workspace=workspace,
            )  # fmt: skip
            decode.plan()
            self.decodes.append(decode)

    def run(self, i: int) -> Tensor:
        i %= len(self.decodes)
        return self.decodes[i].run(self.queries[i], self.pages, self.out[i])

    def plan_us(self) -> float:
        """Its plan, on the host."""
        times = []
        for _ in range(7):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            self.decodes[0].plan()
            times.append((time.perf_counter() - begin) * 1e6)
        return statistics.median(times)


class TorchAttention:
    """One of torch's attentions over all layers of a case, one token shorter."""

    def __init__(self, layers: Layers, kind: str) -> None:
        case = layers.case
        self.queries = layers.queries.reshape(len(layers.layers), -1, case.group, case.head_dim)
        self.decodes: list = []
        for table, lengths in zip(layers.table, layers.lengths, strict=True):
            keys, values = packed(table, lengths, layers.pool, case.page_size)
            self.decodes.append(
                VarlenAttention(keys, values, lengths, case.group)
                if kind == "varlen"
                else PaddedAttention(keys, values, lengths)
            )

    def run(self, i: int) -> Tensor:
        i %= len(self.decodes)
        return self.decodes[i].run(self.queries[i])


def peers_of(layers: Layers) -> dict[str, FlashInfer | TorchAttention]:
    """Those that there are for the case: of codes FlashInfer reads fp8, torch none."""
    peers: dict[str, FlashInfer | TorchAttention] = {}
    if layers.case.kv_dtype in ("int8", "int4"):
        return peers
    for kind in ("varlen", "sdpa") if layers.case.kv_dtype == "auto" else ():
        try:
            peers[f"torch_{kind}"] = peer = TorchAttention(layers, kind)
            peer.run(0)
        except Exception as error:
            peers.pop(f"torch_{kind}", None)
            sys.stderr.write(f"{layers.case}: no {kind} of torch: {error}\n")
    if layers.case.head_dim not in (64, 128, 256):
        return peers
    for kernel in ("cuda", "tensor_cores"):
        try:
            peer = FlashInfer(layers, kernel == "tensor_cores")
            peer.run(0)
            peers[f"flashinfer_{kernel}"] = peer
        except Exception as error:
            sys.stderr.write(f"{layers.case}: no {kernel} kernel of FlashInfer: {error}\n")
    return peers
