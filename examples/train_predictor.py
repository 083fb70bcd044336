"""Trains a network to foretell which pages a step will look at (AttentionPredictor, arXiv
2502.04077).

    python examples/train_predictor.py MODEL --texts /usr/share/common-licenses
    adakv generate MODEL prompt.txt --policy full \
        --read 'AttentionPredictor(file="predictor.safetensors", share=0.25)'

Texts are read once. Of each token, q head and page the largest attention that an entry got is kept;
one small network for all heads and layers is fitted by least squares to say what it will be for the
next token, from what it was for the last ones.

Differences to the paper: the texts are any, and not the model's answers to tasks; and the authors'
loss and data are not known here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import training
from torch import Tensor

from adakv.policy import LayerInputs, Need
from adakv.policy.attention import attention
from adakv.policy.predictor import SHAPES, Network

PAGE, FIRST, NEWEST = 16, 4, 4  # entries of a page; pages that are read always
ROWS = 64  # queries whose attention is there at a time


@dataclass(frozen=True)
class Teacher:
    """A scorer whose layers write down what each token looked at."""

    seen: list[Tensor] = field(default_factory=list)  # [Hq, T, m] float16, by layer
    window: int = 1
    pinned: int = 0
    needs: ClassVar[frozenset[Need]] = frozenset({"all_queries"})

    def score(self, inputs: LayerInputs) -> Tensor:
        self.seen.append(looked_at(inputs))
        return torch.zeros(inputs.shape, device=inputs.device)


def looked_at(inputs: LayerInputs) -> Tensor:
    """``[Hq, T, m]`` float16: the most that a token of a prompt ``[1, ...]`` gave to an entry of
    each page."""
    length = inputs.length
    rows = []
    for start in range(0, length, ROWS):
        p = attention(inputs, slice(start, start + ROWS))[0].flatten(0, 1)  # [Hq, R, T]
        p = F.pad(p, (0, -length % PAGE))
        rows.append(p.view(*p.shape[:2], -1, PAGE).amax(-1).half())
    return torch.cat(rows, 1)


def collected(model: Any, prompts: list[Tensor]) -> Tensor:
    """``[N, T, m]``: what the tokens of some prompts ``[1, T]`` looked at, in all layers and q
    heads."""
    teachers = [Teacher() for _ in prompts]
    training.read(model, prompts, teachers, [prompt.shape[1] // 2 for prompt in prompts])
    return torch.cat([looked for teacher in teachers for looked in teacher.seen])


def samples(looked: Tensor, count: int, history: int) -> tuple[Tensor, Tensor, Tensor]:
    """Histories ``[n, H, m]``, how many pages between the first and the newest there are ``[n]``,
    and what the next token looked at ``[n, m]``, taken by chance."""
    least = max(history, PAGE * (FIRST + NEWEST + 4))
    row = torch.randint(len(looked), (count,))
    token = torch.randint(least, looked.shape[1], (count,))
    steps = token[:, None] + torch.arange(-history, 0)
    middle = looked[..., FIRST:]
    there = token // PAGE + 1 - FIRST - NEWEST
    return middle[row[:, None], steps].float(), there.to(looked.device), middle[row, token].float()


def fitted(looked: Tensor, *, history: int, steps: int, batch: int) -> dict[str, Tensor]:
    """A network's weights, by Adam."""
    weights = {}
    for name, shape in SHAPES.items():
        bound = SHAPES[name.replace("bias", "weight")][1:]
        scale = torch.tensor(bound).prod() ** -0.5
        weights[name] = ((torch.rand(shape) * 2 - 1) * scale).to(looked.device).requires_grad_()
    optimizer = torch.optim.Adam([*weights.values()], lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        past, there, wanted = samples(looked, batch, history)
        found = Network(*weights.values())(past, there)
        is_there = found.isfinite()
        loss = (found - wanted).masked_fill(~is_there, 0).square().sum() / is_there.sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return {name: weight.detach() for name, weight in weights.items()}


def shares_of_best(looked: Tensor, weights: dict[str, Tensor], history: int) -> tuple[float, float]:
    """How much of what the best quarter of pages gets is got by those that are foretold, and by
    those of the last step."""
    past, there, wanted = samples(looked, 500, history)
    found = Network(*weights.values())(past, there)
    is_there = found.isfinite()
    rank = torch.arange(found.shape[1], device=found.device) < (there[:, None] + 3) // 4

    def got(by: Tensor) -> Tensor:
        order = by.masked_fill(~is_there, -torch.inf).argsort(1, descending=True)
        return (wanted.gather(1, order) * rank).sum()

    best = got(wanted)
    return float(got(found) / best), float(got(past[:, -1]) / best)


def main() -> None:
    parser = training.parser(__doc__, "predictor.safetensors", prompts=8)
    parser.add_argument("--history", type=int, default=64, help="steps that are looked back upon")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64)
    options, start = parser.parse_args(), time.perf_counter()
    model, prompts = training.loaded(options)
    trained, other = (collected(model, some) for some in training.held_out(prompts))
    read = time.perf_counter()
    how = {"history": options.history, "steps": options.steps, "batch": options.batch}
    weights = fitted(trained, **how)
    training.write(weights, options.out)
    end = time.perf_counter()
    ours, last = shares_of_best(other, weights, options.history)
    print(f"{options.out}: of what the best quarter of pages of other prompts gets, {ours:.3f}")
    print(f"(by what the last step looked at {last:.3f}); {read - start:.0f} s to read, ", end="")
    print(f"{end - read:.0f} s to fit")


if __name__ == "__main__":
    main()
