"""Ragged rows in shuffled pages, as a decode step on a GPU finds them, for bench_attend.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adakv import ops

ENOUGH_BYTES = 2.2e9  # of all layers, far more than the L2 cache


@dataclass(frozen=True)
class GpuCase:
    """Sizes of attend in a decode step of one token."""

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


class Layers:
    """Layers of a case in one pool of shuffled pages, and a step's inputs."""

    def __init__(self, case: GpuCase, device: str) -> None:
        self.case = case
        layers = 32
        while layers > 4 and layers * case.num_bytes > ENOUGH_BYTES:
            layers //= 2
        dtype = getattr(torch, case.dtype)
        self.lengths = case.lengths(layers).to(device)
        used = -(-self.lengths // case.page_size)
        num_used, rows = int(used.sum()), self.lengths.numel()
        ids = torch.randperm(num_used + rows, device=device).int()
        self.pool = torch.empty(
            num_used + rows, 2, case.page_size, case.head_dim, dtype=dtype, device=device
        )
        for part in self.pool.split(1 << 14):
            part.normal_()
        # Timed calls append to the same layers many times: spare columns for that.
        table = torch.full(
            (*used.shape, int(used.max()) + 64), -1, dtype=torch.int32, device=device
        )
        table[torch.arange(table.shape[-1], device=device) < used[..., None]] = ids[:num_used]
        fresh = ids[num_used:].view(*used.shape, 1)
        positions = torch.zeros(len(self.pool), case.page_size, dtype=torch.int32, device=device)
        self.table, self.fresh = table, fresh
        seen = torch.zeros(layers, case.batch, dtype=torch.int32, device=device)
        self.schedule = ops.plan(self.lengths, table, fresh, page_size=case.page_size)
        held = self.lengths.clone()
        self.layers = [
            ops.Layer(self.pool, positions, table[i], held[i], seen[i], fresh[i])
            for i in range(layers)
        ]
        shape = (layers, case.batch, case.kv_heads, 1, case.head_dim)
        self.keys, self.values = (torch.randn(shape, device=device).to(dtype) for _ in "kv")
        heads = case.kv_heads * case.group
        queries = torch.randn(layers, case.batch, heads, 1, case.head_dim, device=device)
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
