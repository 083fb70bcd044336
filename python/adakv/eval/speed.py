"""How fast decode attention is on this machine: attend against torch's own on the same entries."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adakv import ops
from adakv.cache import KVCache

#: The shape of a layer of Llama-3.1-8B.
Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
BUFFER_BYTES, MOST_LAYERS = 128 << 20, 8  # layers in turn, so that no cache holds their entries
FLOOR_SHARE = 0.2  # of a head's budget that is even


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the median, and the quartiles around it."""

    median_us: float
    low_us: float
    high_us: float
    rounds: int


def measure(
    variants: Mapping[str, Callable[[int], object]], *, rounds: int = 20, warmup: int = 3
) -> dict[str, Timing]:
    """Times every variant once a round, until the device is done with it."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(warmup + rounds):
        for name, run in variants.items():
            wait()
            begin = time.perf_counter()
            run(i)
            wait()
            if i >= warmup:
                times[name].append((time.perf_counter() - begin) * 1e6)
    return {name: timing(samples) for name, samples in times.items()}


def timing(samples_us: list[float]) -> Timing:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(samples_us * (1 + (len(samples_us) == 1)), n=4)
    return Timing(round(median, 2), round(low, 2), round(high, 2), len(samples_us))


def uneven_lengths(mean: int, shape: tuple[int, ...]) -> Tensor:
    """Entries of kv heads ``[..., Hkv]`` int32, as Ada-KV shares a budget out: a floor of 0.2 of
    the mean, and the rest by a Dirichlet draw over the heads of a sequence."""
    draw = torch.distributions.Dirichlet(torch.ones(shape[-1])).sample(shape[:-1]) * shape[-1]
    return ((FLOOR_SHARE + (1 - FLOOR_SHARE) * draw) * mean).int()


@dataclass(frozen=True)
class Attended:
    """One new token of one sequence attends to the entries of one layer."""

    entries: int  #: of a kv head, on average
    heads: str  #: "even": each has as many; "uneven": as Ada-KV gives them, and torch pads
    adakv: Timing
    torch: Timing

    @property
    def speedup(self) -> float:
        """How much faster adakv is."""
        return self.torch.median_us / self.adakv.median_us


class Layers:
    """The same random entries of some layers in adakv's pages and in dense tensors.

    Parameters
    ----------
    entries : int
        Of a kv head, on average.
    is_even : bool
        Whether each kv head has as many.
    """

    def __init__(
        self, entries: int, *, is_even: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        layer_bytes = 2 * KV_HEADS * entries * HEAD_DIM * dtype.itemsize
        num_layers = max(2, min(MOST_LAYERS, BUFFER_BYTES // layer_bytes))
        shape = num_layers, 1, KV_HEADS
        lengths = torch.full(shape, entries) if is_even else uneven_lengths(entries, shape)
        lengths = lengths.clamp(min=1)
        longest = int(lengths.max())
        dense = num_layers, 2, 1, KV_HEADS, longest, HEAD_DIM
        self._dense = torch.randn(dense, dtype=dtype, device=device)
        self._queries = torch.randn(1, Q_HEADS, 1, HEAD_DIM, dtype=dtype, device=device)
        seen = torch.arange(longest) < lengths[..., None, None]  # [L, 1, Hkv, 1, T]
        self._masks = None if is_even else seen.to(device)
        pages = [KVCache.pages_for(int(n.sum()), 0, num_kv_heads=KV_HEADS) for n in lengths]
        kv = KVCache(
            num_layers=num_layers,
            num_sequences=1,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            num_pages=sum(pages),
            max_row_pages=-(-longest // 16) + 1,
            dtype=dtype,
            device=device,
        )
        for layer, rows in enumerate(lengths.flatten(1)):
            ends = F.pad(rows.cumsum(0), (1, 0)).int()
            positions = torch.arange(int(ends[-1])) - ends[:-1].repeat_interleave(rows)
            kept = ops.Kept(positions.int().to(device), ends.to(device))
            ids, indptr = kv.begin(layer, [int(ends[-1])], [longest])
            keys, values = self._dense[layer]
            ops.compact(keys, values, kept, kv.layer(layer), ids, indptr)
        self._kv = kv
        self._schedules = ops.plan(*kv.plan_inputs, new_tokens=0).unbind()

    def adakv(self, i: int) -> Tensor:
        """The next layer in turn, ``[1, Hq, 1, D]``."""
        i %= len(self._schedules)
        out, _ = ops.attend(self._queries, self._kv.layer(i), self._schedules[i])
        return out

    def torch(self, i: int) -> Tensor:
        """The same by torch; uneven heads are padded to the longest.

        The q heads of a group are queries of their kv head, which is several times as fast as
        ``enable_gqa`` on a CPU.
        """
        i %= len(self._schedules)
        mask = None if self._masks is None else self._masks[i]
        queries = self._queries.unflatten(1, (KV_HEADS, -1))[..., 0, :]  # [1, Hkv, G, D]
        keys, values = self._dense[i]
        return F.scaled_dot_product_attention(queries, keys, values, mask).view_as(self._queries)


def attend(
    entries: int, *, is_even: bool, dtype: torch.dtype, device: torch.device, rounds: int = 20
) -> Attended:
    """Times both ways in turn, layer after layer."""
    torch.manual_seed(0)
    layers = Layers(entries, is_even=is_even, dtype=dtype, device=device)
    times = measure({"adakv": layers.adakv, "torch": layers.torch}, rounds=rounds)
    return Attended(entries, "even" if is_even else "uneven", times["adakv"], times["torch"])
