"""What the trainers share: their options, the model, and the texts that it reads."""

from __future__ import annotations

import argparse
import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import adakv
from adakv.policy import Policy, Scorer, TopScore, Uniform


def parser(docstring: str | None, out: str, *, prompts: int) -> argparse.ArgumentParser:
    """Options that all trainers have; ``out`` is the file that they write unless told otherwise."""
    options = argparse.ArgumentParser(description=(docstring or "").partition("\n")[0])
    options.add_argument("model", help="a folder or a name on the Hugging Face hub")
    options.add_argument("--texts", type=Path, nargs="+", required=True, help="files and folders")
    options.add_argument("--out", type=Path, default=Path(out))
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--prompts", type=int, default=prompts)
    options.add_argument("--length", type=int, default=1000, help="tokens of a prompt")
    return options


def loaded(options: argparse.Namespace) -> tuple[Any, list[Tensor]]:
    """The model and the prompts ``[1, length]`` on its device; chance is the same every time."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    model = model.to(options.device).eval()
    prompts = stretches(options.texts, tokenizer, options.length, options.prompts)
    if getattr(options, "chat", False):
        before = opening(tokenizer)
        for i in range(1, len(prompts), 2):
            prompts[i] = torch.cat([before, prompts[i]], 1)[:, : options.length]
    return model, [prompt.to(model.device) for prompt in prompts]


def opening(tokenizer: Any) -> Tensor:
    """``[1, n]``: what the tokenizer's chat template puts before a message."""
    if not tokenizer.chat_template:
        raise SystemExit("--chat needs a tokenizer with a chat template")
    text = "<the text>"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
    before, found, _ = chat.partition(text)
    if not found:
        raise SystemExit("--chat needs a chat template that repeats a message as it is")
    tokens: Tensor = tokenizer(before, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return tokens


def stretches(paths: list[Path], tokenizer: Any, length: int, count: int) -> list[Tensor]:
    """``[1, length]`` tokens each, of files that chance puts in order, at most three of a file."""
    found: list[Tensor] = []
    for text in _texts(paths):
        tokens = tokenizer(text[: 40 * length], return_tensors="pt", verbose=False)["input_ids"]
        found += [part for part in tokens.split(length, 1)[:3] if part.shape[1] == length]
        if len(found) >= count:
            return found[:count]
    raise SystemExit(f"--texts hold {len(found)} stretches of {length} tokens, not {count}")


def _texts(paths: list[Path]) -> Iterator[str]:
    """Files in UTF-8, in folders too, each once."""
    inside = (file for path in paths for file in ([path] if path.is_file() else path.rglob("*")))
    files = sorted({file.resolve() for file in inside if file.is_file()})
    random.Random(0).shuffle(files)
    for file in files:
        with contextlib.suppress(UnicodeDecodeError):
            yield file.read_text(encoding="utf-8")


def write(weights: dict[str, Tensor], out: Path) -> None:
    """Tensors into a safetensors file."""
    save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, out)


def held_out(prompts: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those to train on, and an eighth of all to see what was learnt."""
    count = max(len(prompts) // 8, 1)
    return prompts[:-count], prompts[-count:]


def read(model: Any, prompts: list[Tensor], teachers: list[Scorer], budgets: list[int]) -> None:
    """Shows each prompt ``[1, T]`` to a teacher, a scorer that writes down what it sees, of which
    the model's cache keeps so many entries. It says how far it has come."""
    with torch.no_grad(), adakv.attach(model):
        for number, prompt in enumerate(prompts):
            policy = Policy(teachers[number], Uniform(), TopScore())
            cache = adakv.Cache(model, policy, budget=budgets[number])
            model(prompt, past_key_values=cache, logits_to_keep=1)
            print(f"\r{number + 1} of {len(prompts)} prompts", end="", flush=True)
    print()
