"""What transformers does with caches, and can't do with one that drops entries."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache


class OneWayCache(Cache):
    """A cache whose sequences only grow: what else is asked of it is a ``ValueError``."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise ValueError("beam search is not supported: adakv.Cache can't reorder its sequences")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise ValueError("adakv.Cache can't repeat its sequences")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise ValueError("adakv.Cache can't select from its sequences")

    def __deepcopy__(self, memo: dict[int, Any]) -> OneWayCache:
        raise ValueError("adakv.Cache can't be copied: make another one and read the prompt there")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError("adakv.Cache can't be pickled or saved: its pages belong to this process")

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("assisted decoding is not supported: adakv.Cache can't take tokens back")

    def activate_past_recording(self) -> None:
        self.crop()
