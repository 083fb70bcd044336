"""Trains a gate to foretell the scores of KVzip from hidden states (KVzap, arXiv 2601.07891).

    python examples/train_gate.py MODEL --texts /usr/share/common-licenses --out gate.safetensors
    adakv eval MODEL --text book.txt --policies \
        'Gate(file="gate.safetensors") * ModelWide() * TopScore(),kvzip'

KVzip reads a prompt twice, and keeps what the model looks at while it repeats it. A gate says
beforehand what that will be: one small map per layer, from what the layer's attention is fed to the
logarithm of KVzip's scores. It is fitted by least squares, as a line or with a layer of ``--width``
units before it, which also learns which entries are among the best 1/2, 1/4, 1/8 and 1/16 of their
prompt. Give texts like those that the model will read, and no text that quality is measured on.

Differences to the paper: the target is KVzip's score itself, without the sizes of values and hidden
states (KVzip+); the prompt is repeated without an instruction, as ``adakv eval`` does; the loss
knows shares; and there are tens or hundreds of thousands of tokens instead of a million.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
import training
from torch import Tensor
from torch.nn import Parameter

import adakv
from adakv.policy import LayerInputs, ModelWide, Need, Policy, RepeatAttention, TopScore

LEAST = 1e-6  # of a score: what is under it is as good as nothing
SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16)  # of a prompt, which the ranking is learnt for
SOFTNESS = 0.5  # nats about a share's edge in which an entry is neither in it nor out


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


class Samples(NamedTuple):
    """Tokens of prompts, as many of each, prompt by prompt."""

    hidden: Tensor  # [L, n, E] in bfloat16: what attention was fed
    scores: Tensor  # [L, n, Hkv] logarithms
    edges: Tensor  # [n, 4] the scores at which the best SHARES of the token's prompt begin

    def part(self, which: slice) -> Samples:
        return Samples(self.hidden[:, which], self.scores[:, which], self.edges[which])


def samples(
    model: Any, prompts: list[Tensor], per_prompt: int, device: str, seconds: float = math.inf
) -> Samples:
    """``per_prompt`` tokens of each prompt ``[1, T]``, taken by chance, of as many prompts as are
    read within so many ``seconds``, of two at least."""
    parts: list[Samples] = []
    shares = torch.tensor(SHARES)
    end = time.perf_counter() + seconds
    with torch.no_grad(), adakv.attach(model):
        for prompt in prompts:
            if len(parts) > 1 and time.perf_counter() > end:
                break
            teacher = Teacher()
            cache = adakv.Cache(model, Policy(teacher, ModelWide(), TopScore()), ratio=0.5)
            model(prompt, past_key_values=cache, logits_to_keep=1)
            cache.repeat(prompt)
            taken = torch.randperm(prompt.shape[1])[:per_prompt].to(prompt.device)
            scores = torch.stack([y.to(device) for _, y in teacher.seen])
            edges = scores.flatten().quantile(1 - shares.to(scores))
            hidden = [x[taken.to(x.device)].to(device, torch.bfloat16) for x, _ in teacher.seen]
            scores = scores[:, taken.to(scores.device)]
            parts.append(Samples(torch.stack(hidden), scores, edges.expand(scores.shape[1], -1)))
            print(f"\r{len(parts)} of {len(prompts)} prompts", end="", flush=True)
    print()
    hidden, scores, all_edges = zip(*parts, strict=True)
    return Samples(torch.cat(hidden, 1), torch.cat(scores, 1), torch.cat(all_edges))


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


@dataclass(frozen=True)
class Fit:
    """How two layers are fitted.

    ``width`` units between, ``epochs`` times through all samples unless ``seconds`` are over, in
    steps of ``batch`` tokens; ``ranking`` is what the shares count for beside the least squares.
    """

    width: int
    epochs: int = 12
    batch: int = 512
    ranking: float = 1.0
    seconds: float = math.inf
    rate: float = 2e-3

    def loss(self, found: Tensor, wanted: Tensor, edges: Tensor) -> Tensor:
        """Least squares of ``[L, n, Hkv]`` and, for each share, the cross entropy of an entry's
        being in it."""
        loss = F.mse_loss(found, wanted)
        for edge in edges.mT:
            edge = edge[None, :, None]
            chosen = (wanted >= edge).to(found.dtype)
            margin = (found - edge) / SOFTNESS
            loss = loss + self.ranking * F.binary_cross_entropy_with_logits(margin, chosen)
        return loss


class TwoLayers(torch.nn.Module):
    """A GELU between two linear maps ``[E] -> [M] -> [Hkv]`` in each layer, all layers at once."""

    def __init__(self, train: Samples, width: int) -> None:
        super().__init__()
        num_layers, _, size = train.hidden.shape
        heads, device = train.scores.shape[2], train.hidden.device
        moments = [(x.float().mean(0), x.float().std(0) + 1e-6) for x in train.hidden]
        self.mean, self.scale = (torch.stack(x)[:, None] for x in zip(*moments, strict=True))
        self.first = Parameter(torch.randn(num_layers, size, width, device=device) / size**0.5)
        self.last = Parameter(torch.randn(num_layers, width, heads, device=device) / width**0.5)
        self.first_bias = Parameter(torch.zeros(num_layers, 1, width, device=device))
        self.last_bias = Parameter(train.scores.mean(1, keepdim=True))

    def forward(self, hidden: Tensor) -> Tensor:
        """``[L, n, Hkv]`` of ``[L, n, E]``."""
        states = (hidden.float() - self.mean) / self.scale
        return F.gelu(states @ self.first + self.first_bias) @ self.last + self.last_bias

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """As :class:`adakv.policy.Gate` reads them: of hidden states as they are."""
        weights = {}
        for i, scale in enumerate(self.scale):
            into = (self.first[i] / scale.mT).mT  # [M, E]
            weights[f"layers.{i}.0.weight"] = into.contiguous()
            weights[f"layers.{i}.0.bias"] = self.first_bias[i, 0] - into @ self.mean[i, 0]
            weights[f"layers.{i}.2.weight"] = self.last[i].mT.contiguous()
            weights[f"layers.{i}.2.bias"] = self.last_bias[i, 0].clone()
        return weights


def two_layers(train: Samples, held_out: Samples, fit: Fit) -> dict[str, Tensor]:
    """The best on ``held_out`` of all epochs' weights, by AdamW."""
    model = TwoLayers(train, fit.width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=fit.rate, weight_decay=1e-2)
    count, start, lowest, best = train.hidden.shape[1], time.perf_counter(), math.inf, {}
    for epoch in range(fit.epochs):
        batches = torch.randperm(count, device=train.hidden.device).split(fit.batch)
        for number, taken in enumerate(batches):
            spent = (time.perf_counter() - start) / fit.seconds
            done = max((epoch + number / len(batches)) / fit.epochs, min(spent, 1.0))
            for group in optimizer.param_groups:  # up for a tenth of the time, then down to 0
                up = min(10 * done, 1.0)
                group["lr"] = fit.rate * up * (1 + math.cos(math.pi * done)) / 2
            found = model(train.hidden[:, taken])
            loss = fit.loss(found, train.scores[:, taken], train.edges[taken])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            seen = float(fit.loss(model(held_out.hidden), held_out.scores, held_out.edges))
        print(f"\repoch {epoch + 1} of {fit.epochs}: loss {seen:.4f} on other prompts", end="")
        if seen < lowest:
            lowest, best = seen, model.weights()
        if time.perf_counter() - start > fit.seconds:
            break
    print(f", at best {lowest:.4f}", flush=True)
    return best


def foretold(weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """``[L, n, Hkv]`` of ``[L, n, E]``."""
    found = []
    for layer, states in enumerate(hidden.float()):
        name = f"layers.{layer}"
        if f"{name}.0.weight" in weights:
            first = weights[f"{name}.0.weight"], weights[f"{name}.0.bias"]
            states, name = F.gelu(F.linear(states, *first)), f"{name}.2"
        found.append(F.linear(states, weights[f"{name}.weight"], weights[f"{name}.bias"]))
    return torch.stack(found)


def explained(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> float:
    """R squared over samples that were not trained on, mean over layers and heads."""
    missed = (foretold(weights, x) - y).square().mean(1)
    return float((1 - missed / y.var(1, unbiased=False)).mean())


def agreement(weights: dict[str, Tensor], others: Samples, per_prompt: int) -> list[float]:
    """For each of SHARES, how many of a prompt's best entries a gate finds among its own best."""
    layers, _, heads = others.scores.shape
    by_prompt = [
        x.view(layers, -1, per_prompt, heads).transpose(0, 1).flatten(1)
        for x in (foretold(weights, others.hidden), others.scores)
    ]
    found, wanted = (x.argsort(1, descending=True).argsort(1) for x in by_prompt)
    counts = [int(share * found.shape[1]) for share in SHARES]
    return [float(((found < k) & (wanted < k)).sum() / (len(found) * k)) for k in counts]


def main() -> None:
    parser = training.parser(__doc__, "gate.safetensors", prompts=40)
    parser.add_argument("--per-prompt", type=int, default=500, help="tokens that are trained on")
    parser.add_argument("--width", type=int, default=0, help="units between; 0: a line")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=512, help="tokens of a step")
    parser.add_argument("--ranking", type=float, default=1.0, help="weight of the shares")
    parser.add_argument("--chat", action="store_true", help="put every second prompt in a chat")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop in time; 2/3 to read")
    options, start = parser.parse_args(), time.perf_counter()
    if options.prompts < 2:
        parser.error("--prompts must be at least 2, as some are held out")
    model, prompts = training.loaded(options)
    reading = options.seconds * 2 / 3 - (time.perf_counter() - start)
    all_samples = samples(model, prompts, options.per_prompt, options.device, reading)
    read = time.perf_counter()
    per_prompt = min(options.per_prompt, options.length)
    num_prompts = all_samples.hidden.shape[1] // per_prompt
    border = (num_prompts - max(num_prompts // 10, 1)) * per_prompt
    train, held_out = all_samples.part(slice(border)), all_samples.part(slice(border, None))
    if options.width:
        left = options.seconds - (read - start)
        fit = Fit(options.width, options.epochs, options.batch, options.ranking, left)
        weights = two_layers(train, held_out, fit)
    else:
        weights = line(train.hidden, train.scores)
    training.write(weights, options.out)
    end = time.perf_counter()
    share = explained(weights, held_out.hidden, held_out.scores)
    found = ", ".join(f"{x:.2f}" for x in agreement(weights, held_out, per_prompt))
    print(f"{options.out}: {share:.2f} of the variance of other prompts' scores explained")
    print(f"of their best 1/2, 1/4, 1/8 and 1/16 these shares are found: {found}")
    print(f"{read - start:.0f} s to read {num_prompts} prompts twice, {end - read:.0f} s to fit")


if __name__ == "__main__":
    main()
