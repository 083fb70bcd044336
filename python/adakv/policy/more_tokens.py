"""More tokens in fewer bits (arXiv 2412.12706): a budget of entries spent on more of them."""

from __future__ import annotations

from dataclasses import dataclass

from adakv.policy.inputs import check_settings
from adakv.tiers import Tiers


@dataclass(frozen=True)
class MoreTokens:
    """A policy's budget is counted in bytes.

    ``budget`` and ``ratio`` say how many entries there would be in plain pages, as the model has
    keys and values; the cache takes the same bytes and holds as many entries as have room in pages
    of ``kv_dtype``, or in tiers (:class:`adakv.tiers.Tiers`). Without it the format is chosen as
    for ``budget_bytes``: the most bits in which nothing has to be evicted, else those that hold the
    most entries.
    """

    kv_dtype: str | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        if self.kv_dtype is not None:
            object.__setattr__(self, "kv_dtype", str(Tiers.given(self.kv_dtype)))
