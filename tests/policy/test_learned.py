"""Learned scorers: what they know of entries, what their files say, and texts that they choose
from."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import foreseen
from adakv import ops
from adakv.cache import KVCache
from adakv.policy import Kept, LayerInputs, LearnedScorer, get
from adakv.policy.learned import features
from adakv.reselection import Reselection, Rule
from adakv.step import Attention, PlannedStep

LAYERS, HEADS, GROUP, DIM, MIDDLE, WINDOW = 2, 3, 2, 16, 5, 32
WIDTH = 2 * DIM + 8 * GROUP


def weights(
    layers: int = LAYERS, heads: int = HEADS, width: int = WIDTH, middle: int = MIDDLE
) -> dict[str, Tensor]:
    """Those of a random scorer."""
    found = {}
    for layer in range(layers):
        place = f"layers.{layer}"
        found[f"{place}.fc1.weight"] = torch.randn(heads, width, middle) / width**0.5
        found[f"{place}.fc1.bias"] = torch.randn(heads, middle)
        found[f"{place}.fc2.weight"] = torch.randn(heads, middle, 1)
        found[f"{place}.fc2.bias"] = torch.randn(heads, 1)
    return found


def scorer_file(folder: Path, given: dict[str, Tensor], window: int | None = WINDOW) -> str:
    path = folder / "scorer.safetensors"
    of_window = {} if window is None else {"window": torch.tensor(window)}
    save_file(given | of_window, path)
    return str(path)


def test_features_counted_by_hand(device: torch.device) -> None:
    """Queries of 0 look at all that they see alike: of 33 entries the first gets 1/2, ..., 1/33."""

    def harmonic(first: int) -> float:
        return sum(1 / n for n in range(first, 34))

    queries = torch.zeros(1, 1, 32, 1, device=device)
    keys, values = torch.full((2, 1, 1, 33, 1), 7.0, device=device)
    carried = torch.zeros(1, 1, 33, 2, 1, device=device)
    carried[0, 0, 0, :, 0] = torch.tensor([2.0, 3.0])
    inputs = LayerInputs(queries, keys, values, None, (33,), 0, 1, carried=carried)
    known, after = features(inputs, 32)
    total = harmonic(2)
    expected = [7, 7, 1 / 2, 1 / 33, total, harmonic(18), harmonic(26), total, total + 2]
    expected.append(total + 2.7)
    torch.testing.assert_close(known[0, 0, 0].cpu(), torch.tensor(expected))
    torch.testing.assert_close(after[0, 0, 0, :, 0].cpu(), torch.tensor([total + 2, total + 2.7]))


def test_sizes_of_the_paper(tmp_path: Path) -> None:
    """Qwen3-4B has 8 kv heads of 128 dimensions, groups of 4: 288 features and 37,128 parameters a
    layer, with the 128 newest entries of the authors' code."""
    given = weights(layers=1, heads=8, width=288, middle=16)
    assert sum(x.numel() for x in given.values()) == 37_128
    scorer = LearnedScorer(scorer_file(tmp_path, given, window=None))
    assert scorer.window == 128
    entries = torch.randn(1, 8, 200, 128)
    inputs = LayerInputs(torch.randn(1, 32, 128, 128), entries, entries, None, (200,), 0, 1)
    assert scorer.score(inputs).shape == (1, 8, 200)
    assert features(inputs, 128)[0].shape == (1, 8, 200, 288)


@pytest.mark.parametrize("count", [7, 32, 40])
@pytest.mark.parametrize("attention", [Attention(), Attention(0.5, 3.0)])
@pytest.mark.parametrize("carries", [True, False])
def test_scores_are_those_of_the_definition(
    tmp_path: Path, device: torch.device, count: int, attention: Attention, carries: bool
) -> None:
    """Rows of unequal length, and queries of more or fewer tokens than the window."""
    lengths = [[100, 41, 90], [64, 100, 43]]
    queries = torch.randn(2, HEADS * GROUP, count, DIM, device=device)
    keys, values = torch.randn(2, 2, HEADS, 100, DIM, device=device)
    carried = torch.rand(2, HEADS, 100, 2, GROUP, device=device) * 5
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    inputs = LayerInputs(
        queries, keys, values, None, (100, 100), 1, LAYERS,
        seq_lens=lens, attention=attention, carried=carried if carries else None,
    )  # fmt: skip
    given = weights()
    scores, after = LearnedScorer(scorer_file(tmp_path, given)).carry(inputs)
    for b, row_lengths in enumerate(lengths):
        for h, n in enumerate(row_lengths):
            known, expected = foreseen.features(
                queries[b, GROUP * h : GROUP * (h + 1)].cpu(),
                keys[b, h, :n].cpu(),
                values[b, h, :n].cpu(),
                carried[b, h, :n].cpu() * carries,
                WINDOW,
                scale=attention.scale,
                softcap=attention.softcap,
            )
            said = foreseen.score(known, given, 1, h)
            close = {"atol": 2e-5, "rtol": 2e-5}
            torch.testing.assert_close(after[b, h, :n].cpu().double(), expected, **close)  # type: ignore[arg-type]
            torch.testing.assert_close(scores[b, h, :n].cpu().double(), said, **close)  # type: ignore[arg-type]


def cache_with(prompt: Tensor) -> KVCache:
    """A cache that holds all of a prompt: keys and values ``[2, L, Hkv, T, D]``."""
    layers, heads, length, dim = prompt.shape[1:]
    kv = KVCache(
        num_layers=layers, num_sequences=1, num_kv_heads=heads, head_dim=dim, num_pages=200,
        max_row_pages=20, page_size=8, dtype=torch.float32,
    )  # fmt: skip
    for layer in range(layers):
        where = kv.begin(layer, [heads * length], [length])
        kept = Kept(
            torch.arange(length, dtype=torch.int32).repeat(heads),
            torch.arange(heads + 1, dtype=torch.int32) * length,
        )
        ops.compact(*prompt[:, layer, None], kept, kv.layer(layer), *where)
    return kv


@pytest.mark.parametrize("pins_prompt", [True, False])
def test_texts_keep_what_the_definition_keeps(tmp_path: Path, pins_prompt: bool) -> None:
    """A text in steps of one token, from which every head keeps as many entries, again and again:
    what was carried of them moves with the entries that stay."""
    budget, every, prompt, steps = 48, 32, 8, 150
    given = weights()
    policy = get(f"LearnedScorer(file={scorer_file(tmp_path, given)!r}) * Uniform() * TopScore()")
    rule = Rule(policy, budget, every=every, pins_prompt=pins_prompt)
    queries = torch.randn(LAYERS, HEADS * GROUP, prompt + steps, DIM)
    entries = torch.randn(2, LAYERS, HEADS, prompt + steps, DIM)
    kv = cache_with(entries[:, :, :, :prompt])
    text = Reselection(rule, [prompt], [Attention()] * LAYERS)
    held = [[[*range(prompt)] for _ in range(HEADS)] for _ in range(LAYERS)]
    known = torch.zeros(LAYERS, HEADS, prompt + steps, 2, GROUP, dtype=torch.float64)
    heard, of_text = prompt, 0
    for t in range(prompt, prompt + steps):
        text.begin_step([1], 1)
        step = PlannedStep.grow(kv, [1], 1, watcher=text.recent)
        for layer, rows in enumerate(held):
            new = (x[layer][None, :, t : t + 1] for x in (queries, *entries))
            step.attend(layer, *new, Attention())
            for row in rows:
                row.append(t)
        of_text += 1
        if not text.is_due:
            continue
        is_full = of_text >= budget + every
        text.choose(kv, slice(0, 1))
        for layer, h in itertools.product(range(LAYERS), range(HEADS)):
            row = held[layer][h]
            asked = queries[layer, GROUP * h : GROUP * (h + 1), heard : t + 1]
            of_row, known[layer, h, row] = foreseen.features(
                asked, *entries[:, layer, h, row], known[layer, h, row], WINDOW
            )
            if is_full:
                said = foreseen.score(of_row, given, layer, h)
                rivals = [i for i, position in enumerate(row[:-WINDOW])
                          if position >= prompt or not pins_prompt]  # fmt: skip
                room = budget - WINDOW + (0 if pins_prompt else prompt)
                gone = {row[i] for i in sorted(rivals, key=lambda i: -float(said[i]))[room:]}
                held[layer][h] = [position for position in row if position not in gone]
        heard, of_text = t + 1, budget if is_full else of_text
        for layer in range(LAYERS):
            assert [x.tolist() for x in kv.positions(layer)[0]] == held[layer]
    assert len(held[0][0]) < prompt + budget + every < prompt + steps


def test_a_scorer_is_written_down(tmp_path: Path, device: torch.device) -> None:
    """Written down it comes back, takes prompts, too, and pins what it is told to."""
    path = scorer_file(tmp_path, weights())
    scorer = LearnedScorer(path, pinned=2)
    policy = get(f"{scorer} * Adaptive() * TopScore() * EveryTokens(every=32)")
    assert policy.scorer == scorer and get(str(policy)) == policy and policy.window == WINDOW
    entries = torch.randn(1, HEADS, 90, DIM, device=device)
    queries = torch.randn(1, HEADS * GROUP, WINDOW, DIM, device=device)
    inputs = LayerInputs(queries, entries, entries, None, (90,), 0, LAYERS)
    assert scorer.score(inputs)[..., :2].isposinf().all()
    kept = policy.choose(inputs, 50)
    assert int(kept.indptr[-1]) == 50 * HEADS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.0.fc1.weight": None}, "file must hold layers.0.fc1.weight"),
        ({"layers.1.fc2.bias": None}, "file must hold layers.1.fc2.bias"),
        ({"layers.0.fc1.weight": [3, 4]}, r"fc1.weight \[Hkv, F, M\].*they are \[3, 4\], \[3, 5\]"),
        ({"layers.1.fc2.weight": [3, 5]}, "layers of one size with layers.1.fc1"),
        ({"layers.0.fc1.bias": [3, 6]}, "layers of one size"),
        ({"window": [0]}, "window that is a multiple of 8 and at least 32, and that .* is 0"),
        ({"window": [36]}, "window that is a multiple of 8.* is 36"),
    ],
)
def test_what_is_no_scorer_is_refused(
    tmp_path: Path, change: dict[str, list[int] | None], message: str
) -> None:
    given = weights()
    for name, shape in change.items():
        if shape is None:
            del given[name]
        else:
            given[name] = torch.zeros(shape) if name != "window" else torch.tensor(shape)
    window = None if "window" in change else WINDOW
    with pytest.raises(ValueError, match=message):
        LearnedScorer(scorer_file(tmp_path, given, window))
    with pytest.raises(ValueError, match="file must be there"):
        LearnedScorer(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "sizes", [{"layers": 3}, {"heads": 2}, {"width": WIDTH + 8}], ids=lambda x: next(iter(x))
)
def test_a_scorer_of_another_model_is_refused(tmp_path: Path, sizes: dict[str, int]) -> None:
    scorer = LearnedScorer(scorer_file(tmp_path, weights(**sizes)))
    entries = torch.randn(1, HEADS, 90, DIM)
    inputs = LayerInputs(
        torch.randn(1, HEADS * GROUP, WINDOW, DIM), entries, entries, None, (90,), 0, LAYERS
    )
    with pytest.raises(ValueError, match="file must be of a scorer for 2 layers of 3 kv heads and"):
        scorer.score(inputs)
