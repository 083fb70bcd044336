# What bindings/ defines. Public descriptions are in ops.py and cache.py.
from collections.abc import Sequence

from torch import Tensor

__version__: str

class Error(RuntimeError): ...

def cuda_unavailable_reason() -> str | None: ...
def cpu_instruction_set() -> str: ...

class KVCache:
    def __init__(
        self,
        *,
        num_layers: int,
        num_sequences: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        num_pages: int,
        max_row_pages: int,
        dtype: str,
        device_type: str,
        device_index: int,
    ) -> None: ...
    def layer(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]: ...
    def all_layers(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]: ...
    def reserve(self, num_pages: int, max_row_pages: int) -> None: ...
    def begin(
        self,
        layer: int,
        first_sequence: int,
        num_kept: Sequence[int],
        longest_row: Sequence[int],
    ) -> tuple[list[int], list[int]]: ...
    def grow(self, num_new: Sequence[int], num_columns: int) -> int: ...
    def pages_to_grow(self, num_new: Sequence[int]) -> int: ...
    def row_pages_to_grow(self, num_new: Sequence[int]) -> int: ...
    def remove(self, sequence: int) -> None: ...
    @staticmethod
    def pages_for(num_kept: int, num_new: int, num_kv_heads: int, page_size: int) -> int: ...
    def num_pages(self, layer: int, sequence: int) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def num_free(self) -> int: ...
    @property
    def num_used(self) -> int: ...

def score(
    queries: Tensor,
    keys: Tensor,
    seq_lens: Tensor | None,
    sink_logits: Tensor | None,
    lse: Tensor | None,
    scale: float,
    softcap: float,
    window_reduce: str,
    group_reduce: str,
    order: str,
    pool: str,
    pool_width: int,
    window: int,
    stride: int,
    distance: int,
    scores: Tensor,
    /,
) -> None: ...
def value_norm(
    values: Tensor, w_o: Tensor, seq_lens: Tensor | None, norm: str, norms: Tensor, /
) -> None: ...
def allocate(
    scores: Tensor,
    budget: int,
    window: int,
    seq_lens: Tensor | None,
    floor: float,
    safeguard: str,
    budgets: Tensor,
    /,
) -> None: ...
def select(
    scores: Tensor,
    budgets: Tensor,
    window: int,
    seq_lens: Tensor | None,
    norms: Tensor | None,
    first: float,
    eps: float,
    positions: Tensor,
    indptr: Tensor,
    /,
) -> None: ...
def compact(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    indptr: Tensor,
    pages: Tensor,
    page_positions: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    seen: Tensor,
    fresh_pages: Tensor,
    page_ids: Tensor,
    page_indptr: Tensor,
    seq_lens: Tensor | None,
    /,
) -> None: ...
def append(
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    page_positions: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    seen: Tensor,
    fresh_pages: Tensor,
    num_new: Tensor | None,
    /,
) -> None: ...
def plan(
    lengths: Tensor,
    block_table: Tensor,
    fresh_pages: Tensor,
    new_tokens: int,
    num_new: Tensor | None,
    page_size: int,
    num_workers: int,
    schedule: Tensor,
    /,
) -> None: ...
def attend(
    queries: Tensor,
    pages: Tensor,
    page_positions: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    seen: Tensor,
    fresh_pages: Tensor,
    schedule: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    num_new: Tensor | None,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
    num_workers: int,
    prefetch: bool,
    out: Tensor,
    lse: Tensor,
    /,
) -> None: ...
def schedule_size(num_rows: int, num_workers: int, /) -> int: ...
def default_num_workers(device_type: str, index: int, /) -> int: ...
