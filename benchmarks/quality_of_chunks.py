"""What is lost when a prompt in chunks is evicted from while it is read, against one choice at its
end: a password hidden in a text is asked for, and the model is fed the answer.

    python benchmarks/quality_of_chunks.py MODEL TEXT

Both hold the same number of entries at the end, the text's chunks never more than these and one
chunk. KL is the mean over the answer's tokens of KL(full cache || evicted) in nats; "found" is the
share of these tokens that come first.
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


@torch.inference_mode()
def answer_of(model: Any, item: Item, cache: Any, chunk: int) -> Tensor:
    """Logits ``[A, V]`` of the answer's tokens, the prompt read in such chunks."""
    ids = torch.tensor([[*item.prompt, *item.query]])
    for part in ids[:, :-1].split(chunk or ids.shape[1], 1):
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    if chunk == 0 and "repeat" in cache.budget.policy.needs:
        cache.repeat(torch.tensor([item.query]))
    fed = torch.cat([ids[0, -1:], torch.tensor(item.answer[:-1], dtype=torch.int64)])
    logits = [
        model(token.view(1, 1), past_key_values=cache, use_cache=True).logits[0, -1]
        for token in fed
    ]
    return torch.stack(logits)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model", help="a folder, a hub name or a GGUF file")
    options.add_argument("text", help="a file of plain text")
    options.add_argument("--tokens", type=int, default=1000, help="of the text in a prompt")
    options.add_argument("--prompts", type=int, default=8)
    options.add_argument("--budget", type=int, default=128)
    options.add_argument("--chunk", type=int, default=128)
    options.add_argument("--policies", default="citrus,ada_snapkv,snapkv,streaming")
    given = options.parse_args()
    model, tokenizer = load_model(given.model, dtype=torch.float32, device=torch.device("cpu"))
    items = data.needles(given.text, tokenizer, data.Size(given.tokens, given.prompts, 1),
                         aware=False)  # fmt: skip
    runs: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for item in items:
        with adakv.attach(model):
            full = answer_of(model, item, DynamicCache(config=model.config), given.chunk)
            outputs = {("full", 0): full}
            for policy in given.policies.split(","):
                for chunk in (0, given.chunk):
                    chunks = {"chunk_budget": given.budget} if chunk else {}
                    cache = adakv.Cache(model, policy, given.budget, **chunks)
                    if chunk and policy == "citrus":
                        cache.repeat_after_prompt(torch.tensor([item.query]))
                    outputs[policy, chunk] = answer_of(model, item, cache, chunk)
        for run, output in outputs.items():
            answer = torch.tensor(item.answer)
            found = (output.argmax(-1) == answer).float().mean().item()
            runs.setdefault(run, []).append((compare(full, output, answer).kl, found))
    print(f"{'policy':14}{'chunk':>8}{'KL':>8}{'found':>8}")
    for (policy, chunk), results in runs.items():
        kl, found = (sum(column) / len(results) for column in zip(*results, strict=True))
        print(f"{policy:14}{chunk or 'whole':>8}{kl:8.3f}{found:8.2f}")


if __name__ == "__main__":
    main()
