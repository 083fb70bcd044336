"""Ragged rows in shuffled pages, as a decode step on a GPU finds them, for bench_attend.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adakv import ops
from adakv.cache import KVCache

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
    kv_dtype: str = "auto"

    def __str__(self) -> str:
        shape = f"{self.batch}x{self.mean_length}-G{self.group}-D{self.head_dim}"
        return shape + f"-{self.dtype}-skew{self.skew}-{self.kv_dtype}"

    @property
    def entry_bytes(self) -> int:
        """A key and its value, with their scales."""
        groups = -(-self.head_dim // 64)
        if self.kv_dtype == "int4":  # of whole pages, whose 32 keys share 4 bytes a dimension
            return self.head_dim + self.head_dim // 8 + 4 * groups
        codes = 2 * self.head_dim
        scales = {"auto": codes, "int8": 8 * groups, "fp8": 4 * groups}  # 16 bits: twice the codes
        return codes + scales[self.kv_dtype]

    @property
    def num_bytes(self) -> int:
        """Keys and values of a layer."""
        return self.batch * self.mean_length * self.kv_heads * self.entry_bytes

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
        memory = KVCache(
            num_layers=1, num_sequences=1, num_kv_heads=1, head_dim=case.head_dim,
            num_pages=num_used + rows, max_row_pages=1, page_size=case.page_size, dtype=dtype,
            device=device, kv_dtype=case.kv_dtype,
        ).layer(0)  # fmt: skip
        self.pool, self.scales = memory.pages, (memory.key_scales, memory.value_scales)
        shape = (layers, case.batch, case.kv_heads, 2 * case.page_size, case.head_dim)
        tails = torch.randn(shape, device=device).to(dtype) if case.kv_dtype == "int4" else None
        self.tails = tails
        self._fill()
        # Timed calls append to the same layers many times: spare columns for that.
        table = torch.full(
            (*used.shape, int(used.max()) + 64), -1, dtype=torch.int32, device=device
        )
        table[torch.arange(table.shape[-1], device=device) < used[..., None]] = ids[:num_used]
        fresh = ids[num_used:].view(*used.shape, 1)
        self.table, self.fresh = table, fresh
        seen = torch.zeros(layers, case.batch, dtype=torch.int32, device=device)
        self.schedule = ops.plan(self.lengths, table, fresh, page_size=case.page_size)
        held = self.lengths.clone()
        self.layers = [
            ops.Layer(
                self.pool,
                memory.page_positions,
                table[i],
                held[i],
                seen[i],
                fresh[i],
                *self.scales,
                None if self.tails is None else self.tails[i],
            )
            for i in range(layers)
        ]
        shape = (layers, case.batch, case.kv_heads, 1, case.head_dim)
        self.keys, self.values = (torch.randn(shape, device=device).to(dtype) for _ in "kv")
        heads = case.kv_heads * case.group
        queries = torch.randn(layers, case.batch, heads, 1, case.head_dim, device=device)
        self.queries = queries.to(dtype)

    def _fill(self) -> None:
        """Random entries, or codes with the scales and zeros that their format has."""
        kv_dtype = self.case.kv_dtype
        if kv_dtype == "auto":
            for part in self.pool.split(1 << 14):
                part.normal_()
            return
        for codes in self.pool.view(torch.uint8).split(1 << 14):
            codes.random_(0, 0x78)  # of fp8 0 to 240
        for scales in self.scales:
            assert scales is not None
            scales.uniform_(-0.02, 0.02)
            if kv_dtype == "fp8":
                scales.abs_()  # no zeros
            elif kv_dtype == "int4" and scales is self.scales[0]:
                scales[:, 0].abs_()
            else:
                scales[..., ::2].abs_()

    @property
    def num_bytes(self) -> float:
        """Keys and values of a layer, on average; in int4 tails have 16 bits."""
        if self.case.kv_dtype != "int4":
            return self.case.num_bytes
        rest = float((self.lengths % 32).sum()) / len(self.lengths)
        in_pages = float(self.lengths.sum()) / len(self.lengths) - rest
        return in_pages * self.case.entry_bytes + rest * 4 * self.case.head_dim

    def attend(
        self,
        i: int,
        appends: bool = True,
        accumulated: Sequence[Tensor] = (),
        accumulate: ops.Accumulate = "sum",
    ) -> Tensor:
        i %= len(self.layers)
        new: dict[str, Any] = {"keys": self.keys[i], "values": self.values[i]} if appends else {}
        if accumulated:
            new |= {"accumulated": accumulated[i], "accumulate": accumulate}
        step = self.queries[i], self.layers[i], self.schedule[i]
        return ops.attend(*step, prefetch=True, **new)[0]

    def entries(self, layer: int, row: int, appended: bool) -> tuple[Tensor, Tensor]:
        """Keys and values that a row holds."""
        case = self.case
        b, h = divmod(row, case.kv_heads)
        length = int(self.lengths[layer, b, h])
        ids = self.table[layer, b, h, : -(-length // case.page_size)].long()
        held = self.pool[ids].transpose(0, 1)  # [2, pages, P, D]
        if case.kv_dtype == "int4":
            held = torch.stack([held & 15, held >> 4], -1).flatten(-2)
        held = held.double()
        if case.kv_dtype == "int4":
            of_keys, of_values = (x[ids].double() for x in self.scales if x is not None)
            held[0] = held[0] * of_keys[:, :1] + of_keys[:, 1:]
            of_values = of_values.unflatten(-1, (-1, 2)).repeat_interleave(64, -2)
            held[1] = held[1] * of_values[..., 0] + of_values[..., 1]
            assert self.tails is not None
            if length % 32:
                held[:, -1] = self.tails[layer, b, h].double().unflatten(0, (2, 32))
        elif case.kv_dtype != "auto":
            scales = torch.stack([x[ids].double() for x in self.scales if x is not None])
            width = 2 if case.kv_dtype == "int8" else 1
            scales = scales.unflatten(-1, (-1, width)).repeat_interleave(64, -2)
            scales = scales[..., : case.head_dim, :]
            held = held * scales[..., 0] + (scales[..., 1] if width == 2 else 0)
        held = held.reshape(2, -1, case.head_dim)[:, :length]
        if appended:
            new = torch.stack([x[layer, b, h].double() for x in (self.keys, self.values)])
            held = torch.cat([held, new], 1)
        return held[0], held[1]

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
