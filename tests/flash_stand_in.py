"""What FlashAttention's paged kernels do, in plain torch: as strict about what they are given."""

from __future__ import annotations

import torch
from torch import Tensor

from adakv.vllm.prompt_attention import FlashAttention, write_by_torch


def read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor | None,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    seqused_k: Tensor,
    max_seqlen_k: int,
    block_table: Tensor,
    causal: bool,
    softmax_scale: float | None,
    softcap: float,
    s_aux: Tensor | None,
    return_softmax_lse: bool,
    fa_version: int,
) -> Tensor | tuple[Tensor, Tensor]:
    """``flash_attn_varlen_func``: queries ``[n, Hq, D]``, keys, values ``[blocks, P, Hkv, D]``."""
    assert fa_version == 3 and causal and s_aux is None and softcap == 0
    for numbers in (cu_seqlens_q, seqused_k, block_table):
        assert numbers.dtype == torch.int32 and numbers.stride(-1) == 1
    requests = len(seqused_k)
    assert cu_seqlens_q.shape == (requests + 1,) and len(block_table) == requests
    assert all(x.stride(-1) == 1 and x.shape == k.shape for x in (k, v))
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()  # views
    counts = cu_seqlens_q.diff().tolist()
    assert cu_seqlens_q[0] == 0 and cu_seqlens_q[-1] == len(q) and max(counts) == max_seqlen_q
    assert int(seqused_k.max()) <= max_seqlen_k
    group, block_size = q.shape[1] // k.shape[2], k.shape[1]
    result = torch.empty_like(q) if out is None else out
    lse = q.new_empty((q.shape[1], len(q)), dtype=torch.float32)
    for i, (begin, count) in enumerate(zip(cu_seqlens_q.tolist(), counts, strict=False)):
        length, new = int(seqused_k[i]), slice(begin, begin + count)
        blocks = block_table[i, : -(-length // block_size)].long()
        keys, values = (
            x[blocks].flatten(0, 1)[:length].repeat_interleave(group, 1) for x in (k, v)
        )
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        logits = torch.einsum("qhd,khd->hqk", q[new].float(), keys.float()) * scale
        unseen = torch.ones(count, length, dtype=torch.bool).triu(length - count + 1)
        logits = logits.masked_fill(unseen, -torch.inf)
        lse[:, new] = logits.logsumexp(-1)
        attended = torch.einsum("hqk,khd->qhd", logits.softmax(-1), values.float())
        result[new] = attended.to(q.dtype)
    return (result, lse) if return_softmax_lse else result


FLASH = FlashAttention(read, write_by_torch)
