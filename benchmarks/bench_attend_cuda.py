"""attend on a GPU, the new token's append included, against FlashInfer and torch (--peers).

Lengths are as Ada-KV gives them: a floor of 0.2 of the mean budget, the rest by a Dirichlet draw
over the heads of a sequence.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import harness
from adakv import ops
from cuda_timing import graph_times, launch_times

ENOUGH_BYTES = 2.2e9  # of all layers, far more than the L2 cache


@dataclass(frozen=True)
class Case:
    batch: int = 1
    mean_length: int = 1024
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    page_size: int = 16
    dtype: str = "bfloat16"
    skew: float = 0.7  # of the Dirichlet draw; less is more unequal

    def __str__(self) -> str:
        shape = f"{self.batch}x{self.mean_length}-G{self.group}-D{self.head_dim}"
        return shape + f"-{self.dtype}-skew{self.skew}"

    @property
    def num_bytes(self) -> int:
        """Keys and values of a layer."""
        return self.batch * self.mean_length * self.kv_heads * self.head_dim * 4

    def lengths(self, layers: int) -> Tensor:
        """``[L, B, Hkv]`` int32."""
        floor = int(0.2 * self.mean_length)
        rest = (self.mean_length - floor) * self.kv_heads
        share = torch.distributions.Dirichlet(torch.full((self.kv_heads,), self.skew))
        lengths = floor + (share.sample((layers, self.batch)) * rest).int()
        lengths[..., 0] += self.mean_length * self.kv_heads - lengths.sum(-1)
        return lengths.clamp(min=1).int()


BARS = [
    Case(batch=batch, mean_length=mean)
    for batch, mean in ((1, 1024), (1, 4096), (4, 1024), (8, 1024), (16, 1024), (32, 1024),
                        (64, 1024), (8, 8192), (32, 4096), (256, 512))
]  # fmt: skip
SHAPES = [
    *(Case(batch=8, group=g, kv_heads=8) for g in (1, 2, 8, 16)),
    *(Case(batch=8, head_dim=d) for d in (64, 80, 96, 256)),
    *(Case(batch=1, head_dim=d) for d in (64, 256)),
    Case(batch=8, group=16, head_dim=256),
    Case(batch=8, dtype="float16"),
    Case(batch=8, skew=0.1),
    Case(batch=1, mean_length=4096, skew=0.05),
]


class Layers:
    """Layers of a case in one pool of shuffled pages, and a step's inputs."""

    def __init__(self, case: Case) -> None:
        self.case = case
        layers = 32
        while layers > 4 and layers * case.num_bytes > ENOUGH_BYTES:
            layers //= 2
        dtype = getattr(torch, case.dtype)
        self.lengths = case.lengths(layers).cuda()
        used = -(-self.lengths // case.page_size)
        num_used, rows = int(used.sum()), self.lengths.numel()
        ids = torch.randperm(num_used + rows, device="cuda").int()
        self.pool = torch.empty(
            num_used + rows, 2, case.page_size, case.head_dim, dtype=dtype, device="cuda"
        )
        for part in self.pool.split(1 << 14):
            part.normal_()
        # Timed calls append to the same layers many times: spare columns for that.
        table = torch.full(
            (*used.shape, int(used.max()) + 64), -1, dtype=torch.int32, device="cuda"
        )
        table[torch.arange(table.shape[-1], device="cuda") < used[..., None]] = ids[:num_used]
        fresh = ids[num_used:].view(*used.shape, 1)
        positions = torch.zeros(len(self.pool), case.page_size, dtype=torch.int32, device="cuda")
        self.table, self.fresh = table, fresh
        seen = torch.zeros(layers, case.batch, dtype=torch.int32, device="cuda")
        self.schedule = ops.plan(self.lengths, table, fresh, page_size=case.page_size)
        held = self.lengths.clone()
        self.layers = [
            ops.Layer(self.pool, positions, table[i], held[i], seen[i], fresh[i])
            for i in range(layers)
        ]
        shape = (layers, case.batch, case.kv_heads, 1, case.head_dim)
        self.keys, self.values = (torch.randn(shape, device="cuda").to(dtype) for _ in "kv")
        heads = case.kv_heads * case.group
        queries = torch.randn(layers, case.batch, heads, 1, case.head_dim, device="cuda")
        self.queries = queries.to(dtype)

    def attend(self, i: int, appends: bool = True) -> Tensor:
        i %= len(self.layers)
        new = {"keys": self.keys[i], "values": self.values[i]} if appends else {}
        return ops.attend(self.queries[i], self.layers[i], self.schedule[i], prefetch=True, **new)[
            0
        ]

    def entries(self, layer: int, row: int, appended: bool) -> tuple[Tensor, Tensor]:
        """Keys and values that a row holds."""
        case = self.case
        b, h = divmod(row, case.kv_heads)
        length = int(self.lengths[layer, b, h])
        ids = self.table[layer, b, h, : -(-length // case.page_size)].long()
        held = self.pool[ids].transpose(0, 1).reshape(2, -1, case.head_dim)[:, :length]
        if appended:
            new = torch.stack([x[layer, b, h] for x in (self.keys, self.values)])
            held = torch.cat([held, new], 1)
        return held[0].double(), held[1].double()

    def error(self, out: Tensor, layer: int, appended: bool = True) -> float:
        """Largest relative error of a row, against float64."""
        case, worst = self.case, 0.0
        out = out.view(-1, case.group, case.head_dim)
        queries = self.queries[layer].view(out.shape).double()
        for row in range(len(out)):
            keys, values = self.entries(layer, row, appended)
            wanted = (queries[row] @ keys.T / case.head_dim**0.5).softmax(-1) @ values
            worst = max(worst, float((out[row].double() - wanted).norm() / wanted.norm()))
        return worst


@dataclass
class Peer:
    """FlashInfer over all layers of a case, one token shorter: without the appended ones."""

    layers: Layers
    tensor_cores: bool
    decodes: list = field(default_factory=list)

    def __post_init__(self) -> None:
        sys.path.insert(0, str(Path(__file__).parent / "peers"))
        from flashinfer_decode import FlashInferDecode

        data, case = self.layers, self.layers.case
        self.pages = data.pool.unsqueeze(3)
        self.queries = data.queries.reshape(len(data.layers), -1, case.group, case.head_dim)
        self.out = torch.empty_like(self.queries)
        for i in range(len(data.layers)):
            workspace = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
            decode = FlashInferDecode(
                data.table[i], data.lengths[i], case.page_size, case.group, case.head_dim,
                data.pool.dtype, self.tensor_cores, workspace,
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


class TorchPeer:
    """One of torch's attentions over all layers of a case, one token shorter."""

    def __init__(self, layers: Layers, kind: str) -> None:
        sys.path.insert(0, str(Path(__file__).parent / "peers"))
        from torch_decode import PaddedAttention, VarlenAttention, packed

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


def peers_of(layers: Layers, wanted: bool) -> dict[str, Peer | TorchPeer]:
    """Those that there are for the case."""
    peers: dict[str, Peer | TorchPeer] = {}
    if not wanted:
        return peers
    for kind in ("varlen", "sdpa"):
        try:
            peers[f"torch_{kind}"] = peer = TorchPeer(layers, kind)
            peer.run(0)
        except Exception as error:
            peers.pop(f"torch_{kind}", None)
            sys.stderr.write(f"{layers.case}: no {kind} of torch: {error}\n")
    if layers.case.head_dim not in (64, 128, 256):
        return peers
    for kernel in ("cuda", "tensor_cores"):
        try:
            peer = Peer(layers, kernel == "tensor_cores")
            peer.run(0)
            peers[f"flashinfer_{kernel}"] = peer
        except Exception as error:
            sys.stderr.write(f"{layers.case}: no {kernel} kernel of FlashInfer: {error}\n")
    return peers


def run(case: Case, options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    layers = Layers(case)
    count = len(layers.layers)
    error = layers.error(layers.attend(0), 0)
    peers = peers_of(layers, options.peers)
    calls: dict[str, Callable[[int], object]] = {
        "adakv": layers.attend,
        "adakv_no_append": functools.partial(layers.attend, appends=False),
        **{name: peer.run for name, peer in peers.items()},
    }
    timings = {f"{n}_launch": t for n, t in launch_times(calls).items()}
    in_graph = {
        name: [functools.partial(call, i) for i in range(count)] for name, call in calls.items()
    }
    timings |= {f"{n}_graph": t for n, t in graph_times(in_graph).items()}
    derived = {"error": error, "layers": count, "MB": case.num_bytes / 1e6}
    derived["graph_TB_per_s"] = case.num_bytes / timings["adakv_graph"].median_us / 1e6
    for name, peer in peers.items():
        derived[f"{name}_error"] = layers.error(peer.run(0), 0, appended=False)
        if isinstance(peer, Peer):
            derived[f"{name}_plan_us"] = peer.plan_us()
    harness.report("attend", vars(case), timings, derived, options.save)


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("--peers", action="store_true", help="FlashInfer and torch, too")
    options.add_argument("--only", default="", help="cases whose name contains this")
    chosen = options.parse_args()
    if chosen.device != "cuda":
        return
    for case in [*BARS, *SHAPES]:
        if chosen.only in str(case):
            run(case, chosen)


if __name__ == "__main__":
    main()
