"""The order of scores, and whole numbers of shares: a part of ``reference.py``."""

from __future__ import annotations

import numpy as np

INF = float("inf")


def ranked(values: np.ndarray) -> np.ndarray:
    """Flat indices of ``[H, n]``, best first: by value (NaN as -inf), then position, then head."""
    values = np.where(np.isnan(values), -INF, values)
    head, position = np.indices(values.shape)
    return np.lexsort((head.ravel(), position.ravel(), -values.ravel()))


def largest_remainder(shares: list[float], total: int) -> list[int]:
    """Whole numbers that sum to ``total``, from shares rounded to 9 decimals.

    What is left after rounding down goes to the larger remainder first, then to the lower index.
    """
    nanos = [round(share * 1e9) for share in shares]
    whole = [x // 10**9 for x in nanos]
    by_remainder = sorted(range(len(shares)), key=lambda i: (-(nanos[i] % 10**9), i))
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole
