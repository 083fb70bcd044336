"""Runs every verb on a GPU once or twice on small shapes: what the sanitizers watch.

Inputs are made on the CPU, so that hardly any kernels run but ours.
"""

from __future__ import annotations

import itertools

import torch

import cases
from adakv import ops


def decode(
    dtype: torch.dtype,
    head_dim: int,
    page_size: int,
    tokens: int,
    fused: bool,
    kv_dtype: str = "auto",
) -> None:
    options = {"dtype": dtype, "head_dim": head_dim, "page_size": page_size, "kv_dtype": kv_dtype}
    lengths = [[37, 300, 1], [16, 0, 64]]
    layer = cases.paged_layer(lengths, new_tokens=tokens, device="cuda", **options)
    shape = (2, 3, tokens, head_dim)
    keys, values = (torch.randn(shape).to(dtype).cuda() for _ in "kv")
    queries = torch.randn(2, 12, tokens, head_dim).to(dtype).cuda()
    inputs = (x[None] for x in (layer.lengths, layer.block_table, layer.fresh_pages))
    page_size = layer.page_positions.shape[1]
    schedule = ops.plan(*inputs, new_tokens=tokens, page_size=page_size)[0]
    if fused:
        ops.attend(queries, layer, schedule, keys=keys, values=values, softcap=20.0)
    else:
        ops.append(keys, values, layer)
        ops.attend(queries, layer, schedule)
        ops.attend(queries, layer, schedule, prefetch=True)


def prefill(dtype: torch.dtype, head_dim: int, kv_dtype: str = "auto") -> None:
    prompt = cases.Prompt(dtype=dtype, head_dim=head_dim, seq_lens=(100, 61))
    device = torch.device("cuda")
    keys, values = prompt.entries(device), prompt.entries(device)
    seq_lens = prompt.lengths(device)
    queries = prompt.queries(device)
    scores = ops.score(queries, keys, seq_lens=seq_lens)
    norms = ops.value_norm(values, prompt.w_o(device), seq_lens=seq_lens)
    budgets = ops.allocate(scores, 30, window=prompt.window, seq_lens=seq_lens)
    kept = ops.select(
        scores, budgets, window=prompt.window, seq_lens=seq_lens, norms=norms, total=120
    )
    sizes = {"num_pages": 40, "columns": 12, "head_dim": head_dim, "dtype": dtype}
    layer = cases.empty_layer(2, 2, **sizes, device=device, kv_dtype=kv_dtype)
    page_ids = torch.arange(40, dtype=torch.int32, device=device)
    page_indptr = cases.int32([0, 20, 40], device)
    ops.compact(keys, values, kept, layer, page_ids, page_indptr, seq_lens=seq_lens)
    if cases.has_tails(kv_dtype):  # whose rows are written anew instead
        return
    held = layer.lengths.flatten()
    scores = ops.score(queries, None, layer, int(held.max())).flatten(0, 1)[:, None]
    budgets = torch.full_like(held, 8)[:, None]
    kept = ops.select(scores, budgets, window=4, seq_lens=held, total=48)
    ops.compact(None, None, kept, layer, page_ids, page_indptr)


def main() -> None:
    for dtype, head_dim in ((torch.bfloat16, 128), (torch.float16, 80), (torch.float32, 64)):
        prefill(dtype, head_dim)
        for tokens, fused in itertools.product((1, 5), (False, True)):
            decode(dtype, head_dim, 16, tokens, fused)
    decode(torch.bfloat16, 64, 64, 2, True)
    decode(torch.bfloat16, 256, 8, 1, True)
    for kv_dtype, head_dim in itertools.product(("int8", "fp8", "int4", "int2"), (64, 128)):
        prefill(torch.bfloat16, head_dim, kv_dtype)
        for tokens, fused in itertools.product((1, 5), (False, True)):
            decode(torch.bfloat16, head_dim, 16, tokens, fused, kv_dtype)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
