"""Classes of tokens: as they are given and marked, and scorers that read them, computed by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adakv.policy import (
    Budget,
    Capped,
    ClassAttention,
    ClassQuotas,
    DualThreshold,
    EliteQueries,
    LayerInputs,
    ModelWide,
    Policy,
    Protection,
    TokenClasses,
    TopScore,
    Uniform,
    get,
)
from adakv.policy.again import check_chooses_again
from adakv.reading import Part, Reader
from adakv.step import Attention
from cases import Prompt
from policy.helpers import kept_rows, layer_inputs, model_inputs

CPU = torch.device("cpu")
INF = float("inf")


def attention_inputs(
    rows: list[list[list[float]]], is_image: list[int], device: torch.device
) -> LayerInputs:
    """Inputs of one kv head whose q head g attends from window row w with ``rows[g][w]``, up to a
    factor."""
    p = torch.tensor(rows, device=device)  # [G, W, T]
    group, window, length = p.shape
    queries = torch.zeros(1, group, window, 16, device=device)
    queries[0, :, :, :length] = p.clamp(min=1e-30).log()
    keys = torch.eye(length, 16, device=device)[None, None]
    classes = torch.tensor([is_image], dtype=torch.uint8, device=device)
    options = {"attention": Attention(1.0), "classes": classes}
    return LayerInputs(queries, keys, keys, None, (length,), 0, 1, **options)


# --- How classes are given ------------------------------------------------------------------------


def numbers(classes: Any, lengths: list[int]) -> list[list[int]]:
    given = TokenClasses.given(classes)
    given.spans(lengths)
    return given.numbers(lengths, slice(0, len(lengths)), max(lengths), CPU).tolist()


def test_classes_are_spans_masks_or_one_of_these_for_each_sequence():
    one = {"image": [(1, 3)], "instruction": [(4, 9)]}
    assert numbers(one, [6, 3]) == [[0, 1, 1, 0, 3, 3], [0, 1, 1, 0, 0, 0]]
    mask = torch.tensor([False, True, True])
    assert numbers({"audio": [None, mask]}, [4, 3]) == [[0, 0, 0, 0], [0, 2, 2, 0]]
    assert numbers({"image": []}, [2]) == [[0, 0]]
    assert numbers({"image": [[], [(0, 1)]], "audio": [(1, 2)]}, [2, 2]) == [[0, 2], [1, 2]]
    assert TokenClasses.given({"image": []}) and not TokenClasses.given(None)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([(0, 4)], "classes must be a dict of spans by class, such as .* got"),
        ({"picture": [(0, 4)]}, "classes: each must be one of image, audio, instruction; got 'pic"),
        ({"text": [(0, 4)]}, "classes: each must be one of image, audio, instruction; got 'text'"),
        ({"image": [(4, 2)]}, r"classes\['image'\] must be spans .* got \(4, 2\)"),
        ({"image": 7}, r"classes\['image'\] must be spans .* got 7"),
        ({"image": [[(0, 1)]]}, r"classes\['image'\] must have one list .* 2 sequences, got 1"),
        ({"image": torch.ones(5).bool()}, r"classes\['image'\]: a mask .* sequence 0 has 6, .* 5"),
        ({"image": [(0, 4)], "audio": [[], [(3, 5)]]}, "classes: a token of sequence 1 is of two"),
    ],
)
def test_classes_that_are_wrong_are_named(classes: Any, message: str):
    with pytest.raises(ValueError, match=message):
        TokenClasses.given(classes).spans([6, 6])


def test_layer_inputs_check_classes():
    inputs = layer_inputs(Prompt(batch=2, length=40), CPU)
    with pytest.raises(ValueError, match=r"classes must be uint8 \[B, T\] = \[2, 40\], got"):
        replace(inputs, classes=torch.zeros(2, 39, dtype=torch.uint8))
    with pytest.raises(ValueError, match="classes must be given to a policy that reads them"):
        inputs.is_of("image")


def reader_of(policy: Policy, classes: Any, budget: int, protect: Any = None) -> Reader:
    told = TokenClasses.given(classes)
    return Reader(Budget(policy, budget), 1, protection=Protection.given(protect), classes=told)


AIR = Policy(EliteQueries(window=8), Uniform(), TopScore())


def test_a_reader_refuses_what_it_was_not_told_or_has_no_room_for():
    for classes in (None, {}):
        with pytest.raises(ValueError, match=r"classes must be given to a policy .*EliteQueries"):
            reader_of(AIR, classes, 40).begin([60], 60, is_complete=True)
    image = {"image": [(2, 50)]}  # 12 others, 8 of them in the window
    reader_of(AIR, image, 12).begin([60], 60, is_complete=True)
    reader_of(AIR, {"image": []}, 60).begin([60], 60, is_complete=True)  # all of it
    said = r"classes: sequence 0 has 12 tokens that are not of class 'image', .* 12 must stay in"
    with pytest.raises(ValueError, match=said):
        reader_of(AIR, image, 11).begin([60], 60, is_complete=True)
    with pytest.raises(ValueError, match=r"0 has 60 tokens .* 60 must stay .* room for 59"):
        reader_of(AIR, {"audio": [(0, 50)]}, 59).begin([60], 60, is_complete=True)
    reader_of(AIR, image, 15, [(10, 13)]).begin([60], 60, is_complete=True)
    with pytest.raises(ValueError, match=r"15 must stay in every kv head, .* has room for 14"):
        reader_of(AIR, image, 14, [(10, 13)]).begin([60], 60, is_complete=True)


@pytest.mark.parametrize("name", ["aircache", "csp", "hae"])
@pytest.mark.parametrize("cuts", [(), (30, 31, 110)], ids=str)
def test_prompts_in_parts_keep_what_they_keep_in_one(device, name, cuts):
    """And what a reader is told is what :class:`LayerInputs` hold."""
    policy, prompt = get(name), Prompt(batch=2, kv_heads=2, group=2, length=150, head_dim=16)
    layers = [
        replace(layer_inputs(prompt, device, layer=i, all_queries=True), w_o=None) for i in range(4)
    ]
    image = {"image": [[(5, 100)], torch.arange(150) < 90]}
    marked = TokenClasses.given(image).numbers([150, 150], slice(0, 2), 150, device)
    seen = slice(None) if "all_queries" in policy.needs else slice(-policy.window, None)
    direct = policy.choose_all(
        [replace(x, queries=x.queries[:, :, seen], classes=marked) for x in layers], 90
    )
    reader = Reader(Budget(policy, 90), 4, classes=TokenClasses.given(image))
    chosen: dict[int, Any] = {}
    for layer, whole in enumerate(layers):
        for start, end in zip([0, *cuts], [*cuts, 150], strict=True):
            reader.begin([end, end], end, is_complete=end == 150)
            entries = whole.keys[:, :, :end], whole.values[:, :, :end]
            part = Part(whole.queries[:, :, start:end], lambda x=entries: x, whole.attention)
            reader.take(layer, part)
        chosen |= reader.finish(layer)
    for layer, kept in enumerate(direct):
        assert kept_rows(chosen[layer][0].kept, 2) == kept_rows(kept, 2)
        if name == "csp":
            continue
        for text in (set(range(5)) | set(range(100, 150)), set(range(90, 150))):
            rows = kept_rows(kept, 2)[0 if 0 in text else 1]
            assert all(text <= set(row) for row in rows)


def test_a_text_that_is_written_has_no_classes():
    with pytest.raises(ValueError, match="decode_budget: EliteQueries needs classes, which"):
        check_chooses_again(get("aircache"))


# --- AirCache, arXiv 2503.23956 -------------------------------------------------------------------

# An image of three entries, and a text of four; the last three queries are the window.
IMAGE = [0, 1, 1, 1, 0, 0, 0]
FROM_4 = [0.5, 0.20, 0.10, 0.10, 0.10, 0, 0]
FROM_5 = [0.5, 0.10, 0.10, 0.20, 0.05, 0.05, 0]
FROM_6 = [0.4, 0.10, 0.02, 0.08, 0.20, 0.10, 0.10]


def test_elite_queries_look_at_the_image(device):
    """To 4, 5 and 6 the last one attends by .2, .1 and .1; then by .2, .19 and .01 (elite .9)."""
    inputs = attention_inputs([[FROM_4, FROM_5, FROM_6]], IMAGE, device)
    scores = EliteQueries(window=3).score(inputs)  # 4 alone: .2 .1 .1 of .5, its own .1 included
    expected = torch.tensor([INF, 0.4, 0.2, 0.2, INF, INF, INF])
    torch.testing.assert_close(scores[0, 0].cpu(), expected)
    last = [0.4, 0.10, 0.02, 0.08, 0.20, 0.19, 0.01]
    inputs = attention_inputs([[FROM_4, FROM_5, last]], IMAGE, device)
    scores = EliteQueries(window=3).score(inputs)  # and 5: .1 .1 .2 of .5, .05 of 4 and of its own
    expected = torch.tensor([INF, 0.3, 0.2, 0.3, INF, INF, INF])
    torch.testing.assert_close(scores[0, 0].cpu(), expected)


def test_elite_queries_are_those_of_all_heads(device):
    """Entry 5 gets of all text 1/6 and 7/9, more than 4 with 1/2 and 1/9; all heads ask."""
    other = [0.05, 0.02, 0.04, 0.04, 0.05, 0.35, 0.0]
    inputs = attention_inputs([[FROM_4, FROM_5, last] for last in (FROM_6, other)], IMAGE, device)
    text = torch.tensor([[0.4, 0.2, 0.1, 0.1], [0.05, 0.05, 0.35, 0.0]])
    share = (text / text.sum(-1, keepdim=True)).mean(0)[1:]  # of 4, 5 and 6
    assert share.argmax() == 1 and (share >= 0.9 * share.max()).sum() == 1
    scores = EliteQueries(window=3).score(inputs)  # .1 .1 .2 of .45, with its own .05
    expected = torch.tensor([2 / 9, 2 / 9, 4 / 9])
    torch.testing.assert_close(scores[0, 0, 1:4].cpu(), expected)


def test_elite_queries_ask_in_the_window_alone(device):
    """0 is attended to most, and isn't there; with a wider window it is the only one, and sees no
    image."""
    p = torch.tensor([FROM_4, FROM_5, FROM_6])
    rows = torch.cat([torch.eye(7)[:4], p])[None].tolist()
    wide = EliteQueries(window=7).score(attention_inputs(rows, IMAGE, device))
    assert wide[0, 0, 1:4].tolist() == [0, 0, 0]


def test_aircache_evicts_entries_of_images_alone(device):
    policy, prompt = get("aircache"), Prompt(batch=2, kv_heads=2, group=2, length=180)
    layers = model_inputs(policy, replace(prompt, head_dim=16, seq_lens=(180, 151)), device)
    kept = [kept_rows(k, 2) for k in policy.choose_all(layers, 90)]
    for b, length in enumerate((180, 151)):
        text = {t for t in range(length) if not layers[0].classes[b, t]}
        assert all(text <= set(row) for rows in kept for row in rows[b])
        assert all(rows[b][0] == rows[b][1] for rows in kept)
        assert sum(len(row) for rows in kept for row in rows[b]) == 4 * 2 * 90


def padded(inputs: LayerInputs, by: int) -> LayerInputs:
    def longer(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0, 0, by), value=9.0)

    assert inputs.classes is not None
    return replace(
        inputs,
        keys=longer(inputs.keys),
        values=longer(inputs.values),
        classes=torch.nn.functional.pad(inputs.classes, (0, by)),
        seq_lens=torch.tensor(inputs.prompt_lens, dtype=torch.int32, device=inputs.device),
    )


def test_elite_queries_ignore_padding(device):
    inputs = attention_inputs([[FROM_4, FROM_5, FROM_6]], IMAGE, device)
    scores = EliteQueries(window=3).score(padded(inputs, 4))
    exact = EliteQueries(window=3).score(inputs)
    torch.testing.assert_close(scores[..., :7], exact)


# --- CSP, arXiv 2412.04652 ------------------------------------------------------------------------

# Four entries and a window of two, the last of an image; what is missing to 1 goes to nothing.
FROM_TEXT, FROM_IMAGE = [0.1, 0.3, 0.2, 0.1], [0.05, 0.05, 0.5, 0.2]
HALVES = [0, 0, 1, 1, 0, 1]


def loose_inputs(device: torch.device, group: int = 1) -> LayerInputs:
    """Rows whose ``exp(z)`` are such that ``exp(z) / (1 + sum(exp(z)))`` are the numbers."""
    rows = [[x / (1 - sum(row)) for x in row] + [0.0, 0.0] for row in (FROM_TEXT, FROM_IMAGE)]
    return attention_inputs([rows] * group, HALVES, device)


@pytest.mark.parametrize(
    ("rows", "expected"), [("self", [0.1, 0.3, 0.5, 0.2]), ("cross", [0.05, 0.05, 0.2, 0.1])]
)
def test_csp_tells_attention_within_classes_from_that_between(device, rows, expected):
    for group in (1, 2):
        scores = ClassAttention(rows, window=2).score(loose_inputs(device, group))
        torch.testing.assert_close(scores[0, 0, :4].cpu(), torch.tensor(expected))
    padded_ = padded(loose_inputs(device), 3)
    scores = ClassAttention(rows, window=2).score(padded_)
    torch.testing.assert_close(scores[0, 0, :4].cpu(), torch.tensor(expected))


def test_csp_softmax_has_one_more(device):
    """Logits 1 and 0: .576117 and .211942; with a sink logit of ln 2 the sum is larger by 2."""
    e = torch.tensor(1.0).exp()
    inputs = attention_inputs([[[float(e), 1.0, 0.0]]], [0, 0, 0], device)
    scores = ClassAttention(window=1).score(inputs)
    assert [round(float(x), 6) for x in scores[0, 0, :2]] == [0.576117, 0.211942]
    sinks = torch.tensor([2.0], device=device).log()
    inputs = replace(inputs, attention=Attention(1.0, sink_logits=sinks))
    scores = ClassAttention(window=1).score(inputs)
    torch.testing.assert_close(scores[0, 0, :2].cpu(), torch.stack([e, e / e]) / (4 + e))


@pytest.mark.parametrize(
    ("cross", "b", "expected"),
    [
        (0.0, 2, {1, 2}),  # .3 and .5 of their own
        (1.0, 2, {2, 3}),  # .2 and .1 of others
        (0.5, 2, {2, 3}),  # .5 of its own; it is also first of the others, so the next one: .1
        (0.3, 3, {1, 2, 3}),  # int(2.1) of their own, then again .1
    ],
)
def test_csp_spends_two_quotas_and_keeps_nothing_twice(device, cross, b, expected):
    policy = Policy(ClassAttention(window=2), Uniform(), ClassQuotas(cross))
    kept = kept_rows(policy.choose(loose_inputs(device), b + 2), 1)
    assert kept == [[sorted({*expected, 4, 5})]]


def test_csp_takes_instructions_for_text(device):
    inputs = loose_inputs(device)
    instruction = torch.tensor([[3, 0, 1, 1, 3, 1]], dtype=torch.uint8, device=device)
    scorer = ClassAttention(window=2)
    expected = scorer.score(inputs)
    assert torch.equal(scorer.score(replace(inputs, classes=instruction)), expected)


# --- HAE, arXiv 2602.02197, in the form of MustDrop, arXiv 2411.10803 -----------------------------

TWO_WORDS = [[0.10, 0.001, 0.02, 0.001], [0.20, 0.002, 0.001, 0.001]]
DUAL = {"share": 0.05, "most": 0.01}


def image_and_words(device: torch.device, group: int = 1) -> LayerInputs:
    """An image of four entries, then three words, the last two of which look at it so; the first
    one looks at itself."""
    rows = [[1e-30] * 7 for _ in range(7)]
    rows[4][4] = 1.0
    for row, word in enumerate(TWO_WORDS, 5):
        rows[row] = [*word, 1 - sum(word), 0, 0]
    return attention_inputs([rows] * group, [1, 1, 1, 1, 0, 0, 0], device)


def test_hae_evicts_what_no_word_looks_at(device):
    """Sums .3 .003 .021 .002, of which 5 % are .0163; maxima .2 .002 .02 .001."""
    for inputs in (image_and_words(device), image_and_words(device, 2)):
        for whole in (inputs, padded_queries(inputs, 3)):
            scores = DualThreshold(**DUAL).score(whole)[0, 0, :7]
            expected = torch.tensor([0.3, -INF, 0.021, -INF, INF, INF, INF])
            torch.testing.assert_close(scores.cpu(), expected)
        loose = DualThreshold(share=0.05, most=0.0015).score(inputs)  # 1 has a word of .002
        assert loose[0, 0, :4].isneginf().tolist() == [False, False, False, True]
        strict = DualThreshold(share=0.07, most=0.05).score(inputs)  # .0228
        assert strict[0, 0, :4].isneginf().tolist() == [False, True, True, True]


def padded_queries(inputs: LayerInputs, by: int) -> LayerInputs:
    longer = torch.nn.functional.pad(inputs.queries, (0, 0, 0, by), value=9.0)
    return replace(padded(inputs, by), queries=longer)


def test_hae_evicts_from_all_layers_what_the_first_one_says(device):
    """Whole tokens, whatever the other layers look at; and a budget is the most that stays."""
    first = image_and_words(device)
    others = [replace(first, queries=-first.queries), replace(first, queries=first.queries * 0)]
    layers = [replace(x, layer=i, num_layers=3) for i, x in enumerate([first, *others])]
    for budget, expected in ((6, [0, 2, 4, 5, 6]), (5, [0, 2, 4, 5, 6]), (4, [0, 4, 5, 6])):
        policy = Policy(DualThreshold(**DUAL), Capped(floor=1.0), TopScore())
        assert [kept_rows(k, 1) for k in policy.choose_all(layers, budget)] == [[[expected]]] * 3
        wide = Policy(DualThreshold(**DUAL), ModelWide(floor=1.0), TopScore())
        kept = [kept_rows(k, 1)[0][0] for k in wide.choose_all(layers, 4)]
        assert kept == [[0, 4, 5, 6]] * 3
    for budget in (7, 90):
        kept = [kept_rows(k, 1) for k in policy.choose_all(layers, budget)]
        assert kept == [[[list(range(7))]]] * 3


def test_hae_lets_entries_leave_when_it_is_read_in_parts(device):
    policy = Policy(DualThreshold(**DUAL), Capped(floor=1.0), TopScore())
    whole = image_and_words(device)
    told = TokenClasses.given({"image": [(0, 4)]})
    for cuts in ([7], [5, 7], [1, 4, 6, 7]):
        reader, start = Reader(Budget(policy, 6), 2, classes=told), 0
        chosen = {}
        for layer, factor in enumerate((1, 0)):
            for start, end in zip([0, *cuts], cuts, strict=False):
                reader.begin([end], end, is_complete=end == 7)
                entries = whole.keys[:, :, :end], whole.values[:, :, :end]
                queries = whole.queries[:, :, start:end] * factor
                reader.take(layer, Part(queries, lambda x=entries: x, whole.attention))
            chosen |= reader.finish(layer)
        kept = [kept_rows(chosen[layer][0].kept, 1) for layer in range(2)]
        assert kept == [[[[0, 2, 4, 5, 6]]]] * 2


def test_class_settings_are_checked():
    with pytest.raises(ValueError, match="rows must be one of self, cross; got 'both'"):
        ClassAttention("both")
    with pytest.raises(ValueError, match=r"cross must be in \[0, 1\], got 2"):
        ClassQuotas(2)
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\], got -1"):
        EliteQueries(share=-1)
    with pytest.raises(ValueError, match=r"most must be in \[0, 1\], got 2"):
        DualThreshold(most=2)
