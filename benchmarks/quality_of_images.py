"""What policies that read classes keep of a text that stands for an image: a password is hidden in
it, a question behind it asks for that one, and the model is fed the answer.

    python benchmarks/quality_of_images.py MODEL TEXT

No image is read: the text's tokens are given as an image's, and those of the question are words. So
this says whether the rules find what a question asks for, not what a model needs of a picture. KL
is the mean over the answer's tokens of KL(full cache || evicted) in nats; "found" is the share of
these tokens that come first.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import adakv
from adakv.cli.inputs import load_model
from adakv.eval import data
from adakv.eval.metrics import Item, compare

POLICIES = "model_rank_fusion,ada_snapkv,csp,aircache,hae,random"


@torch.inference_mode()
def answer_of(model: Any, item: Item, cache: Any) -> Tensor:
    """Logits ``[A, V]`` of the answer's tokens, behind text and question."""
    ids = torch.tensor([[*item.prompt, *item.query]])
    model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    fed = torch.cat([ids[0, -1:], torch.tensor(item.answer[:-1], dtype=torch.int64)])
    read = model(fed[None], past_key_values=cache, use_cache=True)
    logits: Tensor = read.logits[0]
    return logits


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model", help="a folder, a hub name or a GGUF file")
    options.add_argument("text", help="a file of plain text")
    options.add_argument("--tokens", type=int, default=800, help="of the text in a prompt")
    options.add_argument("--prompts", type=int, default=8)
    options.add_argument("--ratio", type=float, default=0.25)
    options.add_argument("--policies", default=POLICIES)
    given = options.parse_args()
    model, tokenizer = load_model(given.model, dtype=torch.float32, device=torch.device("cpu"))
    size = data.Size(given.tokens, given.prompts, 1)
    runs: dict[str, list[tuple[float, float, float]]] = {}
    for item in data.needles(given.text, tokenizer, size, aware=False):
        classes = {"image": [(0, len(item.prompt))]}
        with adakv.attach(model):
            full = answer_of(model, item, DynamicCache(config=model.config))
            for policy in given.policies.split(","):
                cache = adakv.Cache(model, policy, ratio=given.ratio, classes=classes)
                output = answer_of(model, item, cache)
                answer = torch.tensor(item.answer)
                found = (output.argmax(-1) == answer).float().mean().item()
                held = cache.stats()["lengths"].float().mean().item() / cache.seen[0]
                runs.setdefault(policy, []).append((compare(full, output, answer).kl, found, held))
    print(f"{'policy':20}{'KL':>8}{'found':>8}{'held':>8}")
    for policy, results in runs.items():
        kl, found, held = (sum(column) / len(results) for column in zip(*results, strict=True))
        print(f"{policy:20}{kl:8.3f}{found:8.2f}{held:8.3f}")


if __name__ == "__main__":
    main()
