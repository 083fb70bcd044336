"""The trainers in examples/: what they write is read, and has learnt what there was to learn."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import foreseen
import reference
from adakv.cli.main import run_command_line
from adakv.policy import Gate, LayerInputs, LearnedScorer

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def trainer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of that name."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(request.param)


def trains(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("trainer", [name], indirect=True)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with one text in it, and one file that is none."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "numbers.txt").write_text(" ".join(map(str, range(200))))
    (folder / "binary").write_bytes(bytes(range(256)) * 100)
    return folder


def train(trainer: Any, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    """Calls a trainer as a command with these arguments."""
    monkeypatch.setattr(sys, "argv", [trainer.__file__, *map(str, arguments)])
    trainer.main()


def lines(count: int) -> tuple[Tensor, Tensor]:
    """Hidden states of 2 layers and targets of 3 heads that follow from them by straight lines."""
    torch.manual_seed(0)
    hidden = torch.randn(2, count, 16) * torch.linspace(0.1, 3, 16) + 1
    slopes = torch.randn(2, 16, 3)
    return hidden.bfloat16(), hidden.bfloat16().float() @ slopes - 5


@trains("train_gate")
def test_a_line_is_found(trainer: Any) -> None:
    x, y = lines(400)
    weights = trainer.line(x, y, ridge=0)
    for layer in range(2):
        found = reference.gate(x[layer][None].double(), weights, layer)[0].mT
        torch.testing.assert_close(found.float(), y[layer], atol=1e-3, rtol=1e-3)
    assert trainer.explained(weights, x, y) > 0.9999


@trains("train_gate")
@pytest.mark.parametrize("ranking", [0, 1])
def test_two_layers_come_near_a_bend(trainer: Any, ranking: float) -> None:
    x, y = lines(4000)
    y = y.abs()
    edges = y.flatten().quantile(torch.tensor([1 / 2, 3 / 4, 7 / 8, 15 / 16])).expand(4000, -1)
    samples = trainer.Samples(x, y, edges)
    fit = trainer.Fit(32, epochs=200, ranking=ranking)
    two = trainer.two_layers(samples.part(slice(3500)), samples.part(slice(3500, None)), fit)
    line = trainer.line(x, y)
    assert trainer.explained(line, x, y) < 0.5 < 0.9 < trainer.explained(two, x, y)
    best, worse = (trainer.agreement(of, samples, 500) for of in (two, line))
    assert all(a > 0.75 and a > b for a, b in zip(best, worse, strict=True))


@trains("train_gate")
def test_two_layers_end_in_time(trainer: Any) -> None:
    x, y = lines(4000)
    samples = trainer.Samples(x, y, y[0, :, :1].expand(-1, 4))
    weights = trainer.two_layers(samples, samples, trainer.Fit(32, epochs=10**6, seconds=0.5))
    assert all(value.isfinite().all() for value in weights.values())


@trains("train_gate")
def test_agreement_counts_what_is_among_the_best_of_a_prompt(trainer: Any) -> None:
    scores = torch.arange(32.0).view(1, 32, 1)  # two prompts of 16 tokens
    hidden = torch.cat([torch.arange(16), torch.arange(16).flip(0)]).view(1, 32, 1)
    others = trainer.Samples(hidden.bfloat16(), scores, scores[0].expand(-1, 4))
    rising = {"layers.0.weight": torch.ones(1, 1), "layers.0.bias": torch.zeros(1)}
    assert trainer.agreement(rising, others, 16) == [0.5, 0.5, 0.5, 0.5]  # all, then none


@trains("train_gate")
def test_a_gate_needs_a_prompt_to_hold_out(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train(trainer, monkeypatch, "model", "--texts", "texts", "--prompts", 1)
    assert "--prompts must be at least 2" in capsys.readouterr().err


@trains("training")
@pytest.mark.model
def test_a_chat_begins_as_its_template_does(trainer: Any, model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    with pytest.raises(SystemExit, match="--chat needs a tokenizer with a chat template"):
        trainer.opening(tokenizer)
    tokenizer.chat_template = "<user>{{ messages[0].content }}</user>"
    before = trainer.opening(tokenizer)
    assert tokenizer.decode(before[0]) == "<user>"
    tokenizer.chat_template = "<user>{{ messages[0].content | upper }}</user>"
    with pytest.raises(SystemExit, match="repeats a message as it is"):
        trainer.opening(tokenizer)


@trains("train_gate")
@pytest.mark.model
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("width", [0, 8])
def test_a_gate_runs_on_the_command_line(
    trainer: Any,
    model: str,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    device: torch.device,
) -> None:
    out, place = tmp_path / "gate.safetensors", ("--device", str(device))
    sizes = ("--prompts", 2, "--length", 100, "--per-prompt", 80, "--epochs", 1, "--width", width)
    sizes += ("--seconds", 60)
    train(trainer, monkeypatch, model, "--texts", texts, "--out", out, *sizes, *place)
    policy = f"{Gate(str(out))} * ModelWide() * TopScore()"
    command = ["generate", model, str(texts / "numbers.txt"), "--policy", policy, "--budget", "48"]
    assert run_command_line([*command, "--max-new-tokens", "3", *place]) == 0


@trains("train_learned")
def test_golden_scores_and_what_is_evicted_by_them(trainer: Any) -> None:
    """Two kv heads of two q heads each, windows of 32, of which 160 tokens have five: choices are
    made at the ends of the third and the fourth, behind which there is something to foresee."""
    window, budget, length = 32, 64, 160
    queries = torch.randn(1, 4, length, 8)
    keys, values = torch.randn(2, 1, 2, length, 8)
    inputs = LayerInputs(queries, keys, values, None, (length,), 0, 1)
    golden = trainer.golden_scores(inputs, window)
    made = trainer.choices(inputs, window, budget, budget)
    assert made.golden.shape == (2, 2, budget) and made.known.shape == (2, 2, budget, 2 * 8 + 16)
    for h in range(2):
        p = torch.stack([foreseen.attention(queries[0, 2 * h + g], keys[0, h]) for g in (0, 1)])
        means = p.mean(0).unflatten(0, (-1, window)).mean(1)  # [5, T]
        later = [means[i + 1 :].amax(0) if i < 4 else means[0] * 0 for i in range(5)]
        torch.testing.assert_close(golden[h].double(), torch.stack(later), atol=1e-6, rtol=1e-5)
        held, carried = [*range(budget)], torch.zeros(length, 2, 2).double()
        for number in range(4):
            newest = [*range(number * window, (number + 1) * window)]
            held = [*range(newest[-1] + 1)] if number < 2 else [*held, *newest]
            asked = queries[0, 2 * h : 2 * h + 2, newest]
            known, carried[held] = foreseen.features(
                asked, keys[0, h, held], values[0, h, held], carried[held], window
            )
            if number < 2:
                continue
            rivals = held[:-window]
            order = made.golden[h, number - 2].argsort()  # they come in any order
            ours = sorted(range(budget), key=lambda i: float(later[number][rivals[i]]))
            found = made.known[h, number - 2, order].double()
            torch.testing.assert_close(found, known[ours], atol=2e-2, rtol=1e-2)
            held = sorted(rivals[i] for i in ours[budget - window :]) + newest


@trains("train_learned")
def test_what_tells_is_learnt(trainer: Any) -> None:
    """Golden scores that follow from two of the features, differently in each head."""
    torch.manual_seed(0)
    known = torch.randn(2, 300, 12, 20).bfloat16()
    golden = torch.stack([known[0, ..., 3].abs(), known[1, ..., 7] - known[1, ..., 2]]).float()
    weights = trainer.fitted(trainer.Choices(known, golden), 16, 400)
    assert [list(x.shape) for x in weights] == [[2, 20, 16], [2, 16], [2, 16, 1], [2, 1]]
    assert trainer.in_order(trainer.left(weights, known), golden) > 0.9
    exact = torch.tensor([[3.0, 1.0, 2.0]])
    assert trainer.in_order(-exact, exact) == 1 and trainer.in_order(exact, exact) == 0
    # Of the pairs only that of 1 and 2 is right, by 1: the others are wrong by 1 and by 2.
    mixed = torch.tensor([[2.0, 1.0, 0.0]])
    assert float(trainer.hinge(mixed, exact)) == pytest.approx((1.01 + 0 + 2.01) / 3)


@trains("train_learned")
@pytest.mark.model
@pytest.mark.usefixtures("one_thread")
def test_a_learned_scorer_runs_on_the_command_line(
    trainer: Any,
    model: str,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    out, place = tmp_path / "learned.safetensors", ("--device", str(device))
    sizes = ("--prompts", 2, "--length", 160, "--per-choice", 8, "--steps", 3)
    train(trainer, monkeypatch, model, "--texts", texts, "--out", out, *sizes, *place)
    policy = f"{LearnedScorer(str(out))} * Uniform() * TopScore() * EveryTokens(every=8)"
    command = ["generate", model, str(texts / "numbers.txt"), "--decode-policy", policy]
    command += ["--decode-budget", "40", "--max-new-tokens", "60", "--policy", "full"]
    assert run_command_line([*command, *place]) == 0


@trains("train_predictor")
def test_what_tokens_looked_at(trainer: Any) -> None:
    queries, entries = torch.randn(1, 4, 90, 8), torch.randn(1, 2, 90, 8)
    inputs = LayerInputs(queries, entries, entries, None, (90,), 0, 1)
    looked = trainer.looked_at(inputs)
    assert looked.shape == (4, 90, 6)
    for q in range(4):
        p = foreseen.attention(queries[0, q], entries[0, q // 2])
        pages = [p[:, page * 16 : page * 16 + 16].amax(1) for page in range(6)]
        torch.testing.assert_close(looked[q].double(), torch.stack(pages, 1), atol=1e-3, rtol=0)


@trains("train_predictor")
def test_a_habit_is_learnt(trainer: Any) -> None:
    """Pages that are looked at every second step: the last step says the opposite."""
    torch.manual_seed(0)
    odd = torch.rand(20, 1, 40) < 0.5
    step = torch.arange(640)[None, :, None] % 2 == 0
    looked = (odd == step).half()
    weights = trainer.fitted(looked, history=8, steps=150, batch=32)
    foretold, last = trainer.shares_of_best(looked, weights, 8)
    assert last < 0.2 and foretold > 0.9


@trains("train_predictor")
@pytest.mark.model
@pytest.mark.usefixtures("one_thread")
def test_a_predictor_runs_on_the_command_line(
    trainer: Any,
    model: str,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    out, place = tmp_path / "predictor.safetensors", ("--device", str(device))
    sizes = ("--prompts", 2, "--length", 250, "--steps", 2, "--batch", 4, "--history", 4)
    train(trainer, monkeypatch, model, "--texts", texts, "--out", out, *sizes, *place)
    read = f"AttentionPredictor(file={str(out)!r}, history=4)"
    command = ["generate", model, str(texts / "numbers.txt"), "--policy", "full", "--read", read]
    assert run_command_line([*command, "--max-new-tokens", "12", *place]) == 0
