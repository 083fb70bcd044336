"""Reads a long prompt in chunks and says how much memory the process took at most.

    python benchmarks/long_prompt.py 1048576

The model has two layers and random weights; 4096 entries of every kv head stay after each chunk.
"""

from __future__ import annotations

import resource
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import adakv

CHUNK, BUDGET = 2048, 4096


@torch.inference_mode()
def main(num_tokens: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2 * num_tokens,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    prompt = torch.randint(3, 97, (1, num_tokens))
    begun = time.monotonic()
    with adakv.attach(model):
        cache = adakv.Cache(model, "ada_snapkv", 1024, chunk_budget=BUDGET)
        for chunk in prompt.split(CHUNK, 1):
            model(chunk, past_key_values=cache, logits_to_keep=1)
        for _ in range(4):
            model(prompt[:, :1], past_key_values=cache)
    assert cache.seen == [num_tokens + 4]
    assert int(cache.stats()["lengths"].sum()) == 2 * 2 * (1024 + 4)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{num_tokens} tokens, {peak:.2f} GiB, {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]))
