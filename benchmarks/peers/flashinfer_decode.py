"""FlashInfer's paged decode over ragged heads: every (sequence, kv head) as a request of its own.

That is what a user would build from it: one kv head per request, page 16, the same pages as ours.
Its plan runs on the host and depends on the lengths, so every layer of every step needs one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FlashInferDecode:
    """One layer. ``tensor_cores`` chooses between its two kernels.

    ``kv_dtype`` is the pages', ``dtype`` the queries': fp8 pages have one scale for a whole layer,
    1 here, and not one for each entry as ours.
    """

    def __init__(
        self, table: Tensor, lengths: Tensor, page_size: int, group: int, head_dim: int,
        *, dtype: torch.dtype, kv_dtype: torch.dtype, tensor_cores: bool, workspace: Tensor,
    ) -> None:  # fmt: skip
        import flashinfer

        self.wrapper: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=tensor_cores
        )
        lengths = lengths.flatten()
        pages = -(-lengths // page_size)
        columns = torch.arange(table.shape[-1], device=table.device)
        self.ids = table.flatten(0, 1)[columns < pages[:, None]].contiguous()
        self.indptr = torch.nn.functional.pad(pages.cumsum(0), (1, 0)).int()
        self.last = (lengths - (pages - 1) * page_size).int()
        self.shape = (group, 1, head_dim, page_size)
        self.dtype, self.kv_dtype = dtype, kv_dtype

    def plan(self) -> None:
        self.wrapper.plan(
            self.indptr, self.ids, self.last, *self.shape,
            q_data_type=self.dtype, kv_data_type=self.kv_dtype,
        )  # fmt: skip

    def run(self, queries: Tensor, pages: Tensor, out: Tensor) -> Tensor:
        """``queries`` and ``out`` are ``[B * Hkv, G, D]``, ``pages`` ``[N, 2, P, 1, D]``."""
        return self.wrapper.run(queries, pages, out=out)
