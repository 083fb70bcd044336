"""Reads a long prompt in chunks and says how much memory that took at most.

    python benchmarks/long_prompt.py 1048576
    python benchmarks/long_prompt.py 524288 --device cuda

Weights are random. On a CPU the model has two small layers, and 4,096 entries of every kv head
stay after each chunk of 2,048 tokens; on a GPU it has the shape of Llama-3.1-8B in bfloat16, and
8,192 stay after each chunk of 8,192.
"""

from __future__ import annotations

import argparse
import resource
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import adakv
from end_to_end_parts.bench import random_model


def small_model(num_tokens: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2 * num_tokens,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def measure(model: Any, num_tokens: int, chunk: int) -> str:
    """The prompt is read and a few tokens are written; what it took, in words."""
    config = model.config
    prompt = torch.randint(3, config.vocab_size, (1, num_tokens), device=model.device)
    begun = time.monotonic()
    with adakv.attach(model):
        cache = adakv.Cache(model, "ada_snapkv", 1024, chunk_budget=max(4096, chunk))
        for part in prompt.split(chunk, 1):
            model(part, past_key_values=cache, logits_to_keep=1)
        for _ in range(4):
            model(prompt[:, :1], past_key_values=cache)
    assert cache.seen == [num_tokens + 4]
    heads = config.num_hidden_layers * config.num_key_value_heads
    assert int(cache.stats()["lengths"].sum()) == heads * (1024 + 4)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.monotonic() - begun
    return f"{num_tokens} tokens, {peak_gib(model):.2f} GiB, {seconds:.0f} s"


def peak_gib(model: Any) -> float:
    """The most memory: of the process, or of the GPU beside the weights."""
    if model.device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    free, total = torch.cuda.mem_get_info()
    weights = sum(x.nbytes for x in model.parameters())
    return (total - free - weights) / 2**30


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("tokens", type=int)
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = options.parse_args()
    torch.manual_seed(0)
    if args.device == "cuda":
        model, chunk = random_model(torch.bfloat16, 32), 8192
    else:
        model, chunk = small_model(args.tokens), 2048
    print(measure(model, args.tokens, chunk))


if __name__ == "__main__":
    main()
