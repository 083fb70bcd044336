"""What a cache holds of a prompt that comes in chunks, on a GPU; random weights, bfloat16.

    python benchmarks/chunked_prefill.py

An 8B Llama's shape with 16 layers reads 32k tokens in chunks of 2k. Memory is torch's, above the
model's, in units of the prompt's keys and values.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import adakv
import harness

LAYERS, TOKENS, CHUNK = 16, 32768, 2048
ENTRIES = LAYERS * 2 * 8 * 128 * 2 * TOKENS  # bytes of keys and values


@torch.no_grad()
def measure(model: LlamaForCausalLM, policy: str, ids: torch.Tensor) -> None:
    """Prints one line: policy, held, peak, seconds."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    cache = (
        DynamicCache(config=model.config)
        if policy == "transformers"
        else adakv.Cache(model, policy, ratio=0.1, chunked_prefill=True)
    )
    torch.cuda.synchronize()
    start = time.perf_counter()
    for chunk in ids.split(CHUNK, dim=1):
        model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    held = torch.cuda.memory_allocated() - base
    model(ids[:, :1], past_key_values=cache, use_cache=True)
    peak = torch.cuda.max_memory_allocated() - base
    print(f"{policy:22}{held / ENTRIES:8.3f}{peak / ENTRIES:8.3f}{seconds:8.2f}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", default="cuda", type=harness.device, choices=["cuda"])
    options.parse_args()
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=LAYERS, vocab_size=32000,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=2 * TOKENS,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
        ids = torch.randint(32000, (1, TOKENS))
    print(f"{'cache':22}{'held':>8}{'peak':>8}{'seconds':>8}")
    with adakv.attach(model):
        for policy in ("transformers", "model_column_max", "critical_ada_snapkv", "ada_snapkv"):
            measure(model, policy, ids)


if __name__ == "__main__":
    main()
