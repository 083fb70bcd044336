"""What all parts share: the model under test, its sizes in bytes, and how results are reported."""

from __future__ import annotations

import argparse
import functools
import gc
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import harness
from adakv.formats import page_size_for

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 1 << 18,
    "rope_theta": 500000.0,
}
NEW_TOKENS = 256  # that pages are made for
STEPS = 20  # that are timed
SPARE_BYTES = 3 << 30  # for activations, graphs and the allocator


def random_model(dtype: torch.dtype, num_layers: int) -> LlamaForCausalLM:
    """Llama-3.1-8B's shape, made on the device."""
    config = LlamaConfig(**{**LLAMA_8B, "num_hidden_layers": num_layers})
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def free_memory() -> int:
    """Bytes that are free on the device, when torch has given back what it doesn't use."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


@dataclass
class Bench:
    """The model under test and how results are reported."""

    model: Any
    args: argparse.Namespace
    bandwidth: float
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def config(self) -> Any:
        return self.model.config

    @functools.cached_property
    def head_dim(self) -> int:
        config = self.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @functools.cached_property
    def weight_bytes(self) -> int:
        """What a step reads of the weights: all but the embedding, of which it reads a few rows."""
        parameters = {p.data_ptr(): p.nbytes for p in self.model.parameters()}
        embedding = self.model.get_input_embeddings().weight
        if embedding.data_ptr() != self.model.get_output_embeddings().weight.data_ptr():
            del parameters[embedding.data_ptr()]
        return sum(parameters.values())

    @property
    def entry_bytes(self) -> int:
        """Bytes of one token in 16 bits, over all layers."""
        entry = 2 * self.config.num_key_value_heads * self.head_dim * self.model.dtype.itemsize
        return entry * int(self.config.num_hidden_layers)

    @property
    def page_size(self) -> int:
        """Entries of a page."""
        return page_size_for(self.args.kv_dtype, None)

    def report(
        self, part: str, sizes: dict[str, Any], times: dict[str, list[float]], **derived: float
    ) -> None:
        sizes = {
            "part": part,
            "model": self.args.model or f"random Llama, {self.config.num_hidden_layers} layers",
            "dtype": str(self.model.dtype).removeprefix("torch."),
            **sizes,
        }
        timings = {name: harness.timing(samples) for name, samples in times.items()}
        self.records.append(
            harness.report("end_to_end_cuda", sizes, timings, derived, self.args.save)
        )
        sys.stdout.flush()

    def prompt(self, length: int) -> Tensor:
        return torch.randint(self.config.vocab_size, (1, length), device="cuda")
