"""allocate of one layer, against the same top-k in plain torch; and how allocators between layers
share a budget out among all layers of a model, once a prompt. With --model DIR that is the shape of
a real one, beside its prefill of as many tokens.

On a GPU the sizes are those of Llama-3.1-8B's layers. It is timed in a graph of many calls over
rotating buffers, and launch by launch with the L2 cache flushed. Its peer there is that of
bench_select.py, which makes budgets and positions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import harness
from adakv import ops
from adakv.policy import Allocator, LayerEntropy, LayerInputs, MassShare, ModelWide, StrengthSkew
from cuda_timing import call_times

GPU_HEADS, GPU_WINDOW = 8, 32


@dataclass(frozen=True)
class Case:
    batch: int = 1
    kv_heads: int = 3
    length: int = 7000
    budget: int = 700
    window: int = 32


@dataclass(frozen=True)
class LayersCase:
    layers: int = 24
    kv_heads: int = 2
    length: int = 2000
    budget: int = 250
    window: int = 32
    model: str | None = None


BETWEEN_LAYERS: dict[str, Allocator] = {
    "model_wide": ModelWide(),
    "layer_entropy": LayerEntropy(),
    "mass_share": MassShare(),
    "strength_skew": StrengthSkew(),
}


@dataclass(frozen=True)
class GpuCase:
    length: int
    scores: str  # of scores_like
    budget: int


def plain_torch(scores: Tensor, case: Case) -> Tensor:
    candidates = scores[..., : case.length - case.window]
    total = case.kv_heads * (case.budget - case.window)
    best = candidates.flatten(1).topk(total).indices // candidates.shape[-1]
    return torch.stack([torch.bincount(heads, minlength=case.kv_heads) for heads in best])


def run(case: Case, options: argparse.Namespace) -> None:
    scores = torch.rand(case.batch, case.kv_heads, case.length)
    variants = {
        "adakv": lambda _: ops.allocate(scores, case.budget, window=case.window),
        "torch": lambda _: plain_torch(scores, case),
    }
    timings = harness.measure(variants, rounds=options.rounds)
    derived = {"speedup": timings["torch"].median_us / timings["adakv"].median_us}
    harness.report("allocate", vars(case), timings, derived, options.save)


def run_between_layers(case: LayersCase, options: argparse.Namespace) -> None:
    if options.model:
        case, prefill = shape_and_prefill(options.model, case)
    scores = torch.rand(1, case.layers * case.kv_heads, case.length) ** 4
    entries = torch.zeros(1, case.kv_heads, case.length, 8)
    queries = torch.zeros(1, case.kv_heads, case.window, 8)
    inputs = LayerInputs(queries, entries, entries, None, (case.length,), 0, case.layers)

    def of(allocator: Allocator) -> Callable[[int], object]:
        return lambda _: allocator.allocate(scores, inputs, (case.budget,), window=case.window)

    variants = {name: of(allocator) for name, allocator in BETWEEN_LAYERS.items()}
    if options.model:
        variants["prefill"] = prefill
    timings = harness.measure(variants, rounds=options.rounds)
    derived = {}
    if options.model:
        whole = timings["prefill"].median_us
        derived = {
            f"percent_of_prefill_{name}": 100 * timings[name].median_us / whole
            for name in BETWEEN_LAYERS
        }
    harness.report("allocate", vars(case), timings, derived, options.save)


def shape_and_prefill(folder: str, case: LayersCase) -> tuple[LayersCase, Callable[[int], object]]:
    """A model's layers and kv heads, and its forward over as many tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ids = torch.randint(1000, 2000, (1, case.length))

    @torch.no_grad()
    def prefill(_: int) -> object:
        return model(ids, use_cache=True, logits_to_keep=1)

    config = model.config
    shape = {"layers": config.num_hidden_layers, "kv_heads": config.num_key_value_heads}
    return replace(case, **shape, model=Path(folder).name), prefill


def scores_like(kind: str, length: int) -> Tensor:
    """Pooled probabilities, sharper from head to head; those of bfloat16; or all equal."""
    if kind == "equal":
        return torch.full((1, GPU_HEADS, length), 0.25)
    sharpness = torch.linspace(1, 4, GPU_HEADS)[:, None]
    scores = (torch.randn(1, GPU_HEADS, length) * sharpness).softmax(-1)
    if kind == "bfloat16":
        return scores.bfloat16().float()
    return torch.nn.functional.max_pool1d(scores, 7, 1, 3)


def run_on_gpu(case: GpuCase, options: argparse.Namespace) -> None:
    with torch.device(options.device):
        scores = [scores_like(case.scores, case.length) for _ in range(4)]

    def allocate(i: int) -> Tensor:
        return ops.allocate(scores[i % 4], case.budget, window=GPU_WINDOW)

    timings = call_times({"allocate": allocate}, {})
    harness.report("choose", vars(case), timings, {}, options.save)


CASES = [Case(), Case(kv_heads=8, length=32768, budget=4096)]
GPU_CASES = [
    GpuCase(length, scores, budget)
    for length in (4096, 32768, 131072)
    for scores, budget in (
        ("float32", 1024),
        ("bfloat16", 1024),
        ("equal", 1024),
        ("float32", length // 5),
    )
]

if __name__ == "__main__":
    parser = harness.parser(__doc__)
    parser.add_argument("--model", metavar="DIR", help="whose prefill is timed beside allocators")
    between = [LayersCase()], run_between_layers
    harness.run_cases(parser, cpu=[(CASES, run), between], cuda=[(GPU_CASES, run_on_gpu)])
