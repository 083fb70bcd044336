"""From vLLM's description of a step to ours. Looks at attributes only: imports nothing of it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from adakv.vllm.steps import Batch


def batch_of(metadata: Any) -> Batch:
    """A step, from vLLM's ``CommonAttentionMetadata``.

    Host values are exact where they are read: ``seq_lens_cpu_upper_bound`` is so for all requests
    that read a prompt or have just read it, also while drafts are in flight.
    """
    m = metadata
    host = m.seq_lens
    if host.is_cuda and m.seq_lens_cpu_upper_bound is not None:
        host = m.seq_lens_cpu_upper_bound
    seq_lens, query_start = host.tolist(), m.query_start_loc_cpu.tolist()
    counts = [end - begin for begin, end in pairwise(query_start)]
    return Batch(
        query_start=query_start,
        computed=[length - count for length, count in zip(seq_lens, counts, strict=True)],
        is_prefilling=_is_prefilling(m),
        seq_lens=m.seq_lens,
        block_table=m.block_table_tensor,
        max_seq_len=max(seq_lens),
        slots=m.slot_mapping,
        requests=_requests(m),
    )


def is_decode(metadata: Any) -> bool:
    """Whether each request of a step, padding included, has one token: then it may be replayed from
    a CUDA graph, also if that token is one of a prompt."""
    return bool(metadata.max_query_len == 1 and metadata.num_actual_tokens == metadata.num_reqs)


def decode_batch_of(metadata: Any, max_seq_len: int) -> Batch:
    """A step of one token for each request, some of them padding; nothing depends on which.

    Parameters
    ----------
    metadata : ``CommonAttentionMetadata``
    max_seq_len : int
        At least that of every request.
    """
    m = metadata
    columns = list(range(m.num_reqs + 1))
    host = m.seq_lens if m.seq_lens_cpu_upper_bound is None else m.seq_lens_cpu_upper_bound
    return Batch(
        query_start=columns,
        computed=[length - 1 for length in host.tolist()],
        is_prefilling=_is_prefilling(m),
        seq_lens=m.seq_lens,
        block_table=m.block_table_tensor,
        max_seq_len=min(max_seq_len, max(m.max_seq_len, 1)),
        num_new=m.query_start_loc.diff().int(),
        requests=_requests(m),
    )


def _is_prefilling(metadata: Any) -> list[bool]:
    """As many as requests, padding included, which the second model runner leaves out."""
    flags: list[bool] = [] if metadata.is_prefilling is None else metadata.is_prefilling.tolist()
    return flags + [False] * (metadata.num_reqs - len(flags))


def _requests(metadata: Any) -> list[int] | None:
    """The places of a step's requests in the second model runner's table."""
    if metadata.req_idx is None:
        return None
    places: list[int] = metadata.req_idx.tolist()
    return places + [-1] * (metadata.num_reqs - len(places))
