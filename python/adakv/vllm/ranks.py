"""One layer budget for the kv heads of all tensor-parallel ranks.

By itself each rank shares its own budget out among its own heads, and needs no other rank. With
:func:`layer_wide_totals` the ranks first share the layer's budget out among themselves, as Ada-KV
does among heads: by where the layer's highest scores are. Each must still take the same number of
blocks, as the engine's scheduler plans one number for all: so no rank gets more than its blocks
hold, and what one can't take the others get.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce, get_rank, get_world_size

_BITS = 12  # of a score's order-preserving key that the histogram tells apart


def layer_wide_totals(
    scores: Tensor, total: int, most: int, group: ProcessGroup | None = None
) -> list[int]:
    """How many candidates each rank keeps in a layer: ``total`` in sum, from one all-reduce.

    A rank gets as many as it has among the ``total`` highest scores of all ranks. Scores are told
    apart by the first 12 bits of their keys, sign and exponent and three of the fraction; those in
    the bin where the budget ends are shared out in proportion, by largest remainder, lower ranks
    first. All ranks compute the same.

    Parameters
    ----------
    scores : ``[Hkv, T]`` float32
        Of this rank's heads; ``-inf`` where an entry doesn't compete.
    total : int
        Candidates that all ranks keep together.
    most : int
        Candidates that one rank can keep: what its blocks hold.
    group : ProcessGroup, optional

    Returns
    -------
    totals : one int for each rank
        Their sum is ``total``, or what there is, if that is less.

    Raises
    ------
    ValueError
        If the ranks can't hold ``total`` together.
    """
    size = get_world_size(group)
    if total > size * most:
        raise ValueError(f"total must be at most {size} ranks * most = {size * most}, got {total}")
    counts = torch.zeros((size, 1 << _BITS), dtype=torch.int64, device=scores.device)
    counts[get_rank(group)] = _histogram(scores)
    all_reduce(counts, group=group)
    bins: list[list[int]] = counts.T.tolist()  # per bin, of each rank
    totals = [0] * size
    for of_ranks in reversed(bins):
        left = total - sum(totals)
        if left == 0:
            break
        room = [min(n, most - have) for n, have in zip(of_ranks, totals, strict=True)]
        for rank, count in enumerate(_in_proportion(room, left)):
            totals[rank] += count
    return totals


def _histogram(scores: Tensor) -> Tensor:
    """How many scores lie in each bin, the lowest first; ``-inf`` and NaN in none."""
    bits = scores[scores > -torch.inf].float().view(torch.int32)
    key = torch.where(bits < 0, ~bits, bits | -(1 << 31)).long() & 0xFFFFFFFF
    return torch.bincount(key >> (32 - _BITS), minlength=1 << _BITS)


def _in_proportion(room: list[int], count: int) -> list[int]:
    """``count``, or all there is, in parts of at most and in proportion to ``room``."""
    whole = sum(room)
    if whole <= count:
        return room
    parts = [n * count // whole for n in room]
    by_remainder = sorted(range(len(room)), key=lambda i: -(room[i] * count % whole))
    for i in by_remainder[: count - sum(parts)]:
        parts[i] += 1
    return parts
