"""Trains a scorer for texts by golden eviction (ForesightKV, arXiv 2602.03203).

    python examples/train_learned.py MODEL --texts /usr/share/common-licenses
    adakv generate MODEL prompt.txt --decode-budget 256 --every 32 \
        --decode-policy 'LearnedScorer(file="learned.safetensors") * Uniform() * TopScore()'

Of a text that is there already it is known what each entry will be needed for: its golden score is
the most that any later window of queries gives it, mean over the window and the group. The text is
read once; then each layer goes through it window by window, evicts what has the lowest golden
score, and writes down what a scorer would have known of the entries that competed. The scorer is
fitted to put them in the same order: for each pair a hinge with a margin of 0.01.

What of the paper isn't here: its second stage, which trains further by GRPO on the model's loss,
and drawing what leaves by chance, which that stage needs. Features are standardised while the
scorer is fitted, which its weights then take in; budgets differ from prompt to prompt; the texts
are any, and not the model's own answers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
import training
from torch import Tensor

from adakv.policy import LayerInputs, Need
from adakv.policy.attention import attention
from adakv.policy.learned import NUM_STATISTICS, features

MARGIN = 0.01
SUM_SO_FAR = -2  # of the eight statistics: what H2O goes by


class Choices(NamedTuple):
    """Entries that competed, n of each choice, taken by chance."""

    known: Tensor  # [Hkv, C, n, F] bfloat16
    golden: Tensor  # [Hkv, C, n] float32


@dataclass(frozen=True)
class Teacher:
    """A scorer whose layers write down what there was to choose, and what was right."""

    window: int
    budget: int
    per_choice: int
    seen: list[Choices] = field(default_factory=list)
    pinned: int = 0
    needs: ClassVar[frozenset[Need]] = frozenset({"all_queries"})

    def score(self, inputs: LayerInputs) -> Tensor:
        self.seen.append(choices(inputs, self.window, self.budget, self.per_choice))
        return torch.zeros(inputs.shape, device=inputs.device)


def golden_scores(inputs: LayerInputs, window: int) -> Tensor:
    """``[Hkv, T / window, T]``: the most that an entry is given by a window behind the i-th, mean
    over the window's queries and the group; 0 behind the last."""
    means = []
    for start in range(0, inputs.length - window + 1, window):
        p = attention(inputs, slice(start, start + window))[0]  # [Hkv, G, W, T]
        means.append(p.mean((1, 2)))
    later = torch.stack(means).flip(0).cummax(0).values.flip(0)  # of this window and later ones
    return torch.cat([later[1:], torch.zeros_like(later[:1])]).transpose(0, 1)


def choices(inputs: LayerInputs, window: int, budget: int, per_choice: int) -> Choices:
    """What there is to choose while a prompt ``[1, ...]`` is taken for a text, window by window,
    and evicted from by golden scores."""
    golden = golden_scores(inputs, window)
    heads, device = inputs.num_kv_heads, inputs.device
    held = torch.empty(heads, 0, dtype=torch.int64, device=device)  # positions, ascending
    carried, known, scores = None, [], []
    for number in range(golden.shape[1] - 1):
        start = number * window
        new = torch.arange(start, start + window, device=device).expand(heads, -1)
        held = torch.cat([held, new], 1)
        index = held[None, :, :, None]
        rows = LayerInputs(
            inputs.queries[:, :, start : start + window],
            *(x.take_along_dim(index, 2) for x in (inputs.keys, inputs.values)),
            None,
            (held.shape[1],),
            0,
            1,
            attention=inputs.attention,
            carried=None if carried is None else F.pad(carried, (0, 0, 0, 0, 0, window)),
        )
        found, carried = features(rows, window)
        if held.shape[1] <= budget:
            continue
        rivals = golden[:, number].take_along_dim(held[:, :-window], 1)  # [Hkv, n]
        taken = torch.randperm(rivals.shape[1], device=device)[:per_choice]
        known.append(found[0, :, taken].bfloat16())
        scores.append(rivals[:, taken])
        stay = rivals.topk(budget - window, 1).indices.sort(1).values
        newest = torch.arange(-window, 0, device=device).expand(heads, -1) + held.shape[1]
        stay = torch.cat([stay, newest], 1)
        held = held.take_along_dim(stay, 1)
        carried = carried.take_along_dim(stay[None, :, :, None, None], 2)
    return Choices(torch.stack(known, 1), torch.stack(scores, 1))


def collected(model: Any, prompts: list[Tensor], window: int, per_choice: int) -> Choices:
    """Those of all layers ``[L * Hkv, C, n, ...]``, of some prompts ``[1, T]``."""
    # budgets between an eighth and a half of the text
    parts = [prompt.shape[1] * (1 + number % 4) // 8 for number, prompt in enumerate(prompts)]
    budgets = [max(part // window, 2) * window for part in parts]
    teachers = [Teacher(window, x, min(per_choice, x - window)) for x in budgets]
    training.read(model, prompts, teachers, budgets)
    of_prompts = [
        Choices(*(torch.cat([*x]) for x in zip(*teacher.seen, strict=True))) for teacher in teachers
    ]
    return Choices(*(torch.cat([*x], 1) for x in zip(*of_prompts, strict=True)))


def fitted(given: Choices, middle: int, steps: int, rate: float = 1e-2) -> list[Tensor]:
    """``fc1`` ``[H, F, M]`` and its bias ``[H, M]``, ``fc2`` ``[H, M, 1]`` and ``[H, 1]`` of H
    heads, by Adam; what they give is larger where a golden score is smaller."""
    heads, count, _, width = given.known.shape
    device = given.known.device
    sample = given.known[:, ::4].float().flatten(1, 2)
    mean, scale = sample.mean(1, keepdim=True), sample.std(1, keepdim=True) + 1e-6
    fc1 = torch.randn(heads, width, middle, device=device) / width**0.5
    fc2 = torch.randn(heads, middle, 1, device=device) / middle**0.5
    biases = [torch.zeros(heads, 1, n, device=device) for n in (middle, 1)]
    parameters = [fc1, biases[0], fc2, biases[1]]
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        taken = torch.randint(count, (8,), device=device)
        golden = given.golden[:, taken]
        x = (given.known[:, taken].float() - mean[:, None]) / scale[:, None]
        x = x.flatten(1, 2)  # [H, 8 * n, F]
        leaves = (F.gelu(x @ fc1 + biases[0]) @ fc2 + biases[1]).view_as(golden)
        loss = hinge(leaves, golden)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        into = fc1 / scale.mT  # features as they are
        return [into, (biases[0] - mean @ into)[:, 0], fc2.detach(), biases[1][:, 0].detach()]


def hinge(leaves: Tensor, golden: Tensor) -> Tensor:
    """The loss of pairs of entries ``[..., n]``: the less needed should leave by a margin."""
    is_pair = golden[..., :, None] < golden[..., None, :]
    apart = leaves[..., :, None] - leaves[..., None, :]
    return (MARGIN - apart).clamp(min=0).where(is_pair, 0).sum() / is_pair.sum().clamp(min=1)


def in_order(leaves: Tensor, golden: Tensor) -> float:
    """The share of pairs of entries ``[..., n]`` that are put in the right order."""
    is_pair = golden[..., :, None] < golden[..., None, :]
    return float((leaves[..., :, None] > leaves[..., None, :])[is_pair].float().mean())


def left(weights: list[Tensor], known: Tensor) -> Tensor:
    """``[H, C, n]``: what a scorer says of features ``[H, C, n, F]``."""
    fc1, bias1, fc2, bias2 = (x[:, None] for x in weights)
    return (F.gelu(known.float() @ fc1 + bias1[:, None]) @ fc2 + bias2[:, None])[..., 0]


def main() -> None:
    parser = training.parser(__doc__, "learned.safetensors", prompts=24)
    parser.add_argument("--window", type=int, default=32, help="tokens from choice to choice")
    parser.add_argument("--per-choice", type=int, default=24, help="entries that are trained on")
    parser.add_argument("--width", type=int, default=16, help="units between the two maps")
    parser.add_argument("--steps", type=int, default=1000)
    options, start = parser.parse_args(), time.perf_counter()
    model, prompts = training.loaded(options)
    sets = [
        collected(model, some, options.window, options.per_choice)
        for some in training.held_out(prompts)
    ]
    read = time.perf_counter()
    weights = fitted(sets[0], options.width, options.steps)
    layers = range(model.config.num_hidden_layers)
    by_layer = [x.chunk(len(layers)) for x in weights]
    names = "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"
    tensors = {
        f"layers.{n}.{name}": x[n] for n in layers for name, x in zip(names, by_layer, strict=True)
    }
    training.write({"window": torch.tensor(options.window), **tensors}, options.out)
    end = time.perf_counter()
    known, golden = sets[1]
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    statistics = known[..., -NUM_STATISTICS * group :].float().unflatten(-1, (-1, group))
    so_far = statistics[..., SUM_SO_FAR, :].sum(-1)
    right, by_sum = in_order(left(weights, known), golden), in_order(-so_far, golden)
    print(f"{options.out}: of pairs of other prompts' entries {right:.3f} are in the right order")
    print(f"(by the sum of attention so far {by_sum:.3f}); {read - start:.0f} s to read, ", end="")
    print(f"{end - read:.0f} s to fit")


if __name__ == "__main__":
    main()
