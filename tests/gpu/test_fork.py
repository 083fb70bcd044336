"""Branches of one document on a GPU: 64 questions after one prefill.

The random histories of tests/ops/test_fork.py run on CUDA, too. Larger sizes by the environment:
FORK_LAYERS=32 FORK_TOKENS=32768 is the shape of an 8B model, and prints what it measures.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from typing import Any

import pytest
import torch

import adakv
from adakv.hf.attachment import CACHE

pytestmark = pytest.mark.gpu

LAYERS = int(os.environ.get("FORK_LAYERS", "4"))
TOKENS = int(os.environ.get("FORK_TOKENS", "4096"))
QUESTIONS, QUESTION, ANSWER = 64, 16, 32


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=TOKENS + 1024,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LlamaForCausalLM(config).bfloat16().eval()


def tokens(count: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 32000, (batch, count), device="cuda")


@torch.no_grad()
def read(model: Any, document: torch.Tensor) -> Any:
    cache = adakv.Cache(model, ratio=0.1, max_new_tokens=64)
    model(document, logits_to_keep=1, **{CACHE: cache})
    return cache


@torch.no_grad()
def answer(model: Any, cache: Any, questions: torch.Tensor) -> torch.Tensor:
    """Greedy, by forwards of our own."""
    answers, new = [], questions
    for _ in range(ANSWER):
        logits = model(new, logits_to_keep=1, **{CACHE: cache}).logits
        new = logits[:, -1:].argmax(-1)
        answers.append(new)
    return torch.cat(answers, 1)


def seconds_since(start: float) -> float:
    torch.cuda.synchronize()
    return time.perf_counter() - start


def test_64_questions_on_one_document(model: Any) -> None:
    document, questions = tokens(TOKENS), tokens(QUESTION, QUESTIONS)
    with adakv.attach(model):
        answer(model, read(model, document), questions[:1])  # warms up
        torch.cuda.synchronize()
        start = time.perf_counter()
        expected = [answer(model, read(model, document), questions[i : i + 1]) for i in range(4)]
        alone = seconds_since(start) / 4
        torch.cuda.synchronize()
        start = time.perf_counter()
        cache = read(model, document)
        prefill = seconds_since(start)
        of_document = cache.stats()["bytes"]

        (branch,) = cache.fork()
        for i in range(4):  # one by one: the same launches, so the same tokens
            (branch,) = cache.fork()
            assert torch.equal(answer(model, branch, questions[i : i + 1]), expected[i])
        del branch
        gc.collect()  # a cache and its layers know each other

        torch.cuda.synchronize()
        start = time.perf_counter()
        (wide,) = cache.fork()
        wide.batch_repeat_interleave(QUESTIONS)
        forking = seconds_since(start)
        together = answer(model, wide, questions)
        batched = seconds_since(start)
        of_all = wide.stats()["bytes"]
        rows, kv = LAYERS * 8, cache.pages
        most = of_document + QUESTIONS * rows * kv.page_bytes * (
            -(-(QUESTION + ANSWER) // kv.page_size) + 2
        )
        assert of_all <= most
        assert together.shape == (QUESTIONS, ANSWER)
        agree = float((together[:4] == torch.cat(expected)).float().mean())
        times = alone * QUESTIONS / (prefill + batched)
        sys.stderr.write(
            f"\n{LAYERS} layers, {TOKENS} tokens: prefill {prefill * 1e3:.0f} ms, a question after "
            f"its own {alone * 1e3:.0f} ms; forking {QUESTIONS} branches {forking * 1e3:.1f} ms, "
            f"{QUESTIONS} questions together {batched * 1e3:.0f} ms: {times:.1f} times as many a "
            f"second; the document {of_document / 2**20:.0f} MiB, with all branches "
            f"{of_all / 2**20:.0f} MiB; {agree:.0%} of tokens as alone\n"
        )


def test_beams_and_guesses_on_a_gpu(model: Any) -> None:
    """Beam search reorders in every step; guesses are taken back."""
    part = tokens(40)
    document = torch.cat([part, tokens(400), part], 1)
    settings = {"max_new_tokens": 24, "do_sample": False}
    with adakv.attach(model):
        cache = adakv.Cache(model, ratio=0.5)
        out = model.generate(document, num_beams=4, **{CACHE: cache}, **settings)
        assert out.shape[1] == document.shape[1] + 24
        guessed = adakv.Cache(model, ratio=0.5)
        out = model.generate(document, prompt_lookup_num_tokens=4, **{CACHE: guessed}, **settings)
        assert guessed.seen == [out.shape[1] - 1]
