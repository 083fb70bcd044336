"""Trains a gate to foretell the scores of KVzip from hidden states (KVzap, arXiv 2601.07891).

    python examples/train_gate.py MODEL --texts /usr/share/common-licenses --out gate.safetensors
    adakv eval MODEL --text book.txt --policies \
        'Gate(file="gate.safetensors") * ModelWide() * TopScore(),kvzip'

KVzip reads a prompt twice, and keeps what the model looks at while it repeats it. A gate says
beforehand what that will be: one small map per layer, from what the layer's attention is fed to the
logarithm of KVzip's scores. It is fitted by least squares, as a line or with a layer of ``--width``
units before it. Give texts like those that the model will read, and no text that quality is
measured on.

Differences to the paper: the target is KVzip's score itself, without the sizes of values and hidden
states (KVzip+); the prompt is repeated without an instruction, as ``adakv eval`` does; and there
are a few tens of thousands of tokens in the place of a million.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import training
from torch import Tensor

import adakv
from adakv.policy import LayerInputs, ModelWide, Need, Policy, RepeatAttention, TopScore

LEAST = 1e-6  # of a score: what is under it is as good as nothing


@dataclass(frozen=True)
class Teacher:
    """A scorer whose scores are written down, with the hidden states that they belong to."""

    scorer: RepeatAttention = field(default_factory=lambda: RepeatAttention(pinned=0))
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # [T, E] and [T, Hkv], by layer
    window: int = 1
    pinned: int = 0
    needs: ClassVar[frozenset[Need]] = frozenset({"repeat", "hidden"})

    def score(self, inputs: LayerInputs) -> Tensor:
        scores = self.scorer.score(inputs)
        assert inputs.hidden is not None
        self.seen.append((inputs.hidden[0], scores[0].clamp(min=LEAST).log().mT))
        return scores


def samples(
    model: Any, prompts: list[Tensor], per_prompt: int, device: str
) -> tuple[Tensor, Tensor]:
    """Hidden states ``[L, n, E]`` in bfloat16 and logarithms of scores ``[L, n, Hkv]``, of
    ``per_prompt`` tokens of each prompt ``[1, T]``, taken by chance."""
    hidden, targets = [], []
    with torch.no_grad(), adakv.attach(model):
        for number, prompt in enumerate(prompts):
            teacher = Teacher()
            cache = adakv.Cache(model, Policy(teacher, ModelWide(), TopScore()), ratio=0.5)
            model(prompt, past_key_values=cache, logits_to_keep=1)
            cache.repeat(prompt)
            taken = torch.randperm(prompt.shape[1])[:per_prompt].to(prompt.device)
            hidden.append(torch.stack([x[taken.to(x.device)].bfloat16() for x, _ in teacher.seen]))
            targets.append(torch.stack([y[taken.to(y.device)] for _, y in teacher.seen]))
            print(f"\r{number + 1} of {len(prompts)} prompts", end="", flush=True)
    print()
    return torch.cat(hidden, 1).to(device), torch.cat(targets, 1).to(device)


def line(x: Tensor, y: Tensor, ridge: float = 0.1) -> dict[str, Tensor]:
    """Least squares ``[E] -> [Hkv]`` in each layer; ``ridge`` times the mean square is added."""
    weights = {}
    for layer, (states, wanted) in enumerate(zip(x, y, strict=True)):
        states, wanted = states.double(), wanted.double()
        means, mean = states.mean(0), wanted.mean(0)
        centred = states - means
        moments = centred.mT @ centred
        moments.diagonal().add_(ridge * moments.diagonal().mean())
        slope = torch.linalg.solve(moments, centred.mT @ (wanted - mean)).mT
        weights[f"layers.{layer}.weight"] = slope.float()
        weights[f"layers.{layer}.bias"] = (mean - slope @ means).float()
    return weights


def two_layers(x: Tensor, y: Tensor, width: int, epochs: int) -> dict[str, Tensor]:
    """A GELU between two linear maps in each layer, all layers at once, by AdamW."""
    num_layers, count, size = x.shape
    mean, scale = x.float().mean(1, keepdim=True), x.float().std(1, keepdim=True) + 1e-6
    middle = y.mean(1, keepdim=True)
    first = torch.randn(num_layers, size, width, device=x.device) / size**0.5
    last = torch.randn(num_layers, width, y.shape[2], device=x.device) / width**0.5
    biases = [torch.zeros(num_layers, 1, n, device=x.device) for n in (width, y.shape[2])]
    parameters = [first, biases[0], last, biases[1]]
    for parameter in parameters:
        parameter.requires_grad_()
    batch = 512
    steps = epochs * (count // batch)
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 1))
    for _ in range(epochs):
        for taken in torch.randperm(count, device=x.device).split(batch)[: count // batch]:
            states = (x[:, taken].float() - mean) / scale
            found = F.gelu(states @ first + biases[0]) @ last + biases[1]
            loss = F.mse_loss(found, y[:, taken] - middle)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    weights = {}
    with torch.no_grad():
        for i in range(num_layers):
            into = (first[i] / scale[i].mT).mT  # [M, E]: hidden states as they are
            weights[f"layers.{i}.0.weight"] = into.contiguous()
            weights[f"layers.{i}.0.bias"] = biases[0][i, 0] - into @ mean[i, 0]
            weights[f"layers.{i}.2.weight"] = last[i].mT.contiguous()
            weights[f"layers.{i}.2.bias"] = biases[1][i, 0] + middle[i, 0]
    return weights


def explained(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> float:
    """R squared over samples that were not trained on, mean over layers and heads."""
    shares = []
    for layer, (states, wanted) in enumerate(zip(x.float(), y, strict=True)):
        name = f"layers.{layer}"
        if f"{name}.0.weight" in weights:
            first = weights[f"{name}.0.weight"], weights[f"{name}.0.bias"]
            states, name = F.gelu(F.linear(states, *first)), f"{name}.2"
        found = F.linear(states, weights[f"{name}.weight"], weights[f"{name}.bias"])
        shares.append(1 - (found - wanted).square().mean(0) / wanted.var(0, unbiased=False))
    return float(torch.stack(shares).mean())


def main() -> None:
    parser = training.parser(__doc__, "gate.safetensors", prompts=40)
    parser.add_argument("--per-prompt", type=int, default=500, help="tokens that are trained on")
    parser.add_argument("--width", type=int, default=0, help="units between; 0: a line")
    parser.add_argument("--epochs", type=int, default=12)
    options, start = parser.parse_args(), time.perf_counter()
    model, prompts = training.loaded(options)
    x, y = samples(model, prompts, options.per_prompt, options.device)
    read = time.perf_counter()
    held_out = max(len(prompts) // 10, 1) * options.per_prompt
    trained = x[:, :-held_out], y[:, :-held_out]
    if options.width:
        weights = two_layers(*trained, options.width, options.epochs)
    else:
        weights = line(*trained)
    share = explained(weights, x[:, -held_out:], y[:, -held_out:])
    training.write(weights, options.out)
    end = time.perf_counter()
    print(f"{options.out}: {share:.2f} of the variance of other prompts' scores explained")
    print(f"{read - start:.0f} s to read {len(prompts)} prompts twice, {end - read:.0f} s to fit")


if __name__ == "__main__":
    main()
