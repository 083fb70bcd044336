"""Quality metrics, on a tiny random model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import adakv
from adakv.eval import data, metrics, runner
from adakv.eval.prefill import Prefill
from adakv.eval.written import Written
from hf.families import HYBRIDS
from small_model import save_model

STORY = "The harbour was quiet. A bell rang twice, and nobody came! Who had rung it? "
SIZE = data.Size(tokens=160, prompts=2, per_prompt=2)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(STORY * 12)
    return str(path)


@pytest.fixture(scope="module")
def squad(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve paragraphs, of which every third has no answered question."""
    paragraphs = [
        {
            "context": f"Paragraph {i}. {STORY}",
            "qas": [
                {"question": "Who?", "answers": [] if i % 3 == 2 else [{"text": f"Nobody {i}"}]},
                {"question": "Where?", "answers": []},
            ],
        }
        for i in range(12)
    ]
    path = tmp_path_factory.mktemp("squad") / "squad.json"
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return str(path)


def decoded(tokenizer: Any, item: metrics.Item) -> tuple[str, str, str]:
    return tuple(tokenizer.decode(part) for part in (item.prompt, item.query, item.answer))


# --- data ---------------------------------------------------------------------------------------


def test_questions_are_asked_about_their_paragraphs(squad: str, tokenizer: Any):
    size = data.Size(tokens=400, prompts=2, per_prompt=2)
    items = data.questions(squad, tokenizer, size, aware=False)
    assert [item.name for item in items] == ["0.0", "0.1", "1.0", "1.1"]
    assert [item.group for item in items] == ["0", "0", "1", "1"]
    for item in items:
        prompt, query, answer = decoded(tokenizer, item)
        assert len(prompt) <= size.tokens
        assert query == f"\n\nQuestion: Who? {data.BRIEFLY}\nAnswer:"
        number = answer.removeprefix(" Nobody ")
        assert f"Paragraph {number}." in prompt
    assert items[0].prompt == items[1].prompt != items[2].prompt
    assert len({item.answer for item in items}) == 4


def test_aware_questions_are_part_of_the_prompt(squad: str, tokenizer: Any):
    size = data.Size(tokens=400, prompts=2, per_prompt=2)
    later = data.questions(squad, tokenizer, size, aware=False)
    within = data.questions(squad, tokenizer, size, aware=True)
    for a, b in zip(later, within, strict=True):
        assert a.prompt + a.query == b.prompt + b.query
        assert len(b.query) == 1
        assert (a.name, a.group, a.answer) == (b.name, b.group, b.answer)


def test_a_chat_template_frames_text_and_question(folder: str):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}[assistant]"
    )
    frame = data.Frame(tokenizer)
    item = frame.item("3.1", "A text.", "Why?", "blue", given="It is", aware=False)
    texts = ("[user]A text.", "\n\nWhy?[end][assistant]It is", " blue")
    assert decoded(tokenizer, item) == texts
    assert item.group == "3"
    tokenizer.chat_template = "nothing"
    with pytest.raises(ValueError, match="tokenizer: its chat template"):
        data.Frame(tokenizer)


def test_continuations_follow_their_prompts(story: str, tokenizer: Any):
    items = data.continuations(story, tokenizer, SIZE, num_new=20)
    text = Path(story).read_text()
    for item in items:
        whole = "".join(decoded(tokenizer, item))
        assert whole in text
        assert (len(item.prompt) + len(item.query), len(item.answer)) == (160, 20)
    assert text.startswith(tokenizer.decode(items[0].prompt))
    assert text.endswith(tokenizer.decode(items[1].answer))


@pytest.mark.parametrize("per_prompt", [1, 3])
def test_needles_stand_where_their_depths_say(per_prompt: int, story: str, tokenizer: Any):
    size = data.Size(tokens=300, prompts=3, per_prompt=per_prompt)
    items = data.needles(story, tokenizer, size, aware=False)
    count = 3 * per_prompt
    depths = sorted(item.depth for item in items)
    assert depths == pytest.approx([(i + 0.5) / count for i in range(count)])
    for item in items:
        prompt, query, answer = decoded(tokenizer, item)
        given = query.rpartition("Answer: ")[2]
        sentence = given + answer + "."
        assert prompt.count(sentence) == 1
        assert prompt.index(sentence) / len(prompt) == pytest.approx(item.depth, abs=0.2)
        assert len(item.prompt) <= size.tokens


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't be read: No such file"),
        ("{", "is not JSON"),
        ('{"data": [{"paragraphs": [{"text": ""}]}]}', "not in SQuAD's layout: KeyError"),
        ("[]", "not in SQuAD's layout"),
        ('{"data": []}', "holds 0 prompts of 160 tokens with 2 questions each, but 2 are asked"),
    ],
)
def test_wrong_questions_are_refused(
    content: str | None, message: str, tmp_path: Path, tokenizer: Any
):
    path = tmp_path / "questions.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        data.questions(str(path), tokenizer, SIZE, aware=False)


def test_short_texts_are_refused(story: str, tokenizer: Any):
    size = data.Size(tokens=900, prompts=2, per_prompt=1)
    with pytest.raises(ValueError, match="holds 912 tokens, but 2 prompts of 964 are asked for"):
        data.continuations(story, tokenizer, size)
    with pytest.raises(ValueError, match="per_prompt must be at most 8, got 9"):
        data.needles(story, tokenizer, data.Size(400, 1, 9), aware=False)
    with pytest.raises(ValueError, match="tokens must be at least 64, got 10"):
        data.Size(10, 1, 1)


# --- one prefill, many caches -------------------------------------------------------------------


@pytest.mark.parametrize("policy", adakv.policies())
def test_prefill_fills_caches_as_the_model_would(policy: str, model: Any):
    if policy == "mikv":
        pytest.skip("holds codes of 16-bit numbers: tests/hf/test_tiers.py")
    prompt = torch.arange(160)[None] * 7 % 250
    tokens = torch.tensor([5, 6, 7, 8])
    with adakv.attach(model):
        prefill = Prefill(model, prompt)
        for _ in range(2):  # the first cache took nothing away from the second
            settings = {"ratio": 0.5, "classes": {"image": [(0, 120)]}}
            cache = prefill.cache(policy, **settings)
            read = adakv.Cache(model, policy, **settings)
            with torch.inference_mode():
                logits = model(prompt, past_key_values=read, logits_to_keep=1).logits[0, -1]
                if "repeat" in adakv.policy.get(policy).needs:
                    read.repeat(prompt)
            torch.testing.assert_close(prefill.logits, logits, rtol=0, atol=0)
            for layer in range(2):
                for ours, theirs in zip(cache.kept(layer)[0], read.kept(layer)[0], strict=True):
                    assert torch.equal(ours, theirs)
            assert cache.stats()["bytes"] == read.stats()["bytes"]
            ours, theirs = (metrics.follow(model, c, tokens) for c in (cache, read))
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("policy", ["critical_ada_snapkv", "model_column_max", "expected"])
def test_prefill_goes_on_from_what_it_has_read(policy: str, model: Any):
    prompt = torch.arange(160)[None] * 7 % 250
    tokens = torch.tensor([5, 6, 7, 8])
    with adakv.attach(model):
        whole, text = Prefill(model, prompt), Prefill(model, prompt[:, :140])
        before = text.logits
        for _ in range(2):  # the text is as it was, for the next question
            longer = text.followed_by(prompt[:, 140:])
            torch.testing.assert_close(longer.logits, whole.logits)
            full = [metrics.follow(model, p.full_cache(), tokens) for p in (longer, whole)]
            torch.testing.assert_close(*full)
            caches = [p.cache(policy, ratio=0.5) for p in (longer, whole)]
            for layer in range(2):
                kept = [cache.kept(layer)[0] for cache in caches]
                assert all(torch.equal(*heads) for heads in zip(*kept, strict=True))
            torch.testing.assert_close(*(metrics.follow(model, c, tokens) for c in caches))
        assert torch.equal(text.logits, before)


def test_prefill_fills_the_full_cache(model: Any):
    prompt, tokens = torch.arange(100)[None], torch.tensor([1, 2, 3])
    read = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(prompt, past_key_values=read)
    expected = metrics.follow(model, read, tokens)
    with adakv.attach(model):
        prefill = Prefill(model, prompt)
        for _ in range(2):
            assert torch.equal(metrics.follow(model, prefill.full_cache(), tokens), expected)
        with pytest.raises(ValueError, match=r"prompt must be \[1, T\]"):
            Prefill(model, prompt[0])


# --- metrics ------------------------------------------------------------------------------------


def test_prefill_refuses_states_that_it_cant_give_to_many_caches():
    family = next(family for family in HYBRIDS if str(family) == "Lfm2")
    if not family.is_available:
        pytest.skip("attach refuses it in this version of transformers")
    hybrid = family.model()
    with adakv.attach(hybrid), pytest.raises(ValueError, match="layers with states"):
        Prefill(hybrid, torch.ones(1, 8, dtype=torch.int64))


def test_compare_by_hand():
    full = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    compressed = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    quality = metrics.compare(full, compressed, torch.tensor([1, 0]))
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert quality.kl == pytest.approx(kl / 2, rel=1e-6)
    assert quality.agreement == 0.5  # torch takes the first of equal logits
    assert (quality.exact, quality.exact_full) == (1, 0)
    assert quality.loss == pytest.approx(-(math.log(0.75) + math.log(0.9)) / 2, rel=1e-6)
    assert quality.loss_full == pytest.approx(-(math.log(0.5) + math.log(0.9)) / 2, rel=1e-6)
    with pytest.raises(ValueError, match=r"answer \[S\], got \[2, 2\], \[2, 2\] and \[1\]"):
        metrics.compare(full, compressed, torch.tensor([1]))


def test_items_need_a_query(tokenizer: Any):
    with pytest.raises(ValueError, match="query of item 'a' must hold at least one token"):
        metrics.Item("a", "a", (1,), (), (1,))


def test_run_keeping_everything_changes_nothing(story: str, squad: str, model: Any, tokenizer: Any):
    size = data.Size(400, 2, 2)
    items = {
        "qa": data.questions(squad, tokenizer, size, aware=False),
        "qa_aware": data.questions(squad, tokenizer, size, aware=True),
        "text": data.continuations(story, tokenizer, SIZE, num_new=8),
    }
    policies = {name: adakv.policy.get(name) for name in ("full", "critical_ada_snapkv")}
    found = list(runner.run(model, items, policies, [1.0]))
    assert len(found) == 2 * (4 + 4 + 2)
    for record in found:
        assert record.quality.kl == pytest.approx(0, abs=1e-9)
        assert record.quality.agreement == 1
        assert record.quality.exact == record.quality.exact_full


def test_run_reports_the_bytes_of_the_pool_and_resumes(story: str, model: Any, tokenizer: Any):
    items = {"text": data.continuations(story, tokenizer, SIZE, num_new=8)}
    policies = {name: adakv.policy.get(name) for name in ("ada_snapkv", "random")}
    everything = list(runner.run(model, items, policies, [0.5, 0.25]))
    for record in everything:
        with adakv.attach(model):
            cache = Prefill(model, torch.tensor([items["text"][0].prompt])).cache(
                record.key.policy, ratio=record.key.share, max_new_tokens=9
            )
        assert record.bytes == cache.stats()["bytes"]
        assert record.full_bytes == 2 * 2 * 16 * 2 * 4 * 159  # L Hkv D, K and V, float32, tokens
    done = [record.key for record in everything[:3]]
    rest = list(runner.run(model, items, policies, [0.5, 0.25], done))
    assert rest == everything[3:]


def test_run_evicts_while_a_text_is_written(story: str, model: Any, tokenizer: Any):
    items = {"text": data.continuations(story, tokenizer, SIZE, num_new=8)}
    policies = {name: adakv.policy.get(name) for name in ("ada_snapkv", "random")}
    written = Written(prompt=20, every=16)
    for record in runner.run(model, items, policies, [1.0], written=written):
        assert record.quality.kl == pytest.approx(0, abs=1e-9)
    for record in runner.run(model, items, policies, [0.5], written=written):
        assert record.bytes < 0.8 * record.full_bytes
        assert record.quality.kl > 0
    with pytest.raises(ValueError, match="decode_budget: ColumnMax needs all_queries"):
        wide = {"wide": adakv.policy.get("model_column_max")}
        next(runner.run(model, items, wide, [0.5], written=written))
    with pytest.raises(ValueError, match="written: a prompt has 159 tokens, and 159 of them"):
        next(runner.run(model, items, policies, [0.5], written=Written(159)))


def test_run_refuses_what_the_model_cant_hold(model: Any):
    long = {"text": [metrics.Item("0", "0", (1,) * 1020, (1,), (1,) * 8)]}
    with pytest.raises(ValueError, match="an item of text has 1029 with its answer, the model"):
        next(runner.run(model, long, {"full": adakv.policy.get("full")}, [1.0]))


def test_random_is_worse_than_policies_that_look(tmp_path: Path):
    """On a model whose attention is sharp; policies that only look at keys may lose there."""
    folder = save_model(tmp_path, initializer_range=0.2)
    sharp = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(0, 256, (8, 300)).tolist()
    items = [
        metrics.Item(f"{i}.0", str(i), tuple(t[:260]), tuple(t[260:261]), tuple(t[261:]))
        for i, t in enumerate(tokens)
    ]
    looking = ("ada_snapkv", "critical_ada_snapkv", "ada_column_max", "model_column_max", "kvzip")
    policies = {name: adakv.policy.get(name) for name in ("random", *looking)}
    losses: dict[str, list[float]] = {name: [] for name in policies}
    for record in runner.run(sharp, {"text": items}, policies, [1 / 4]):
        losses[record.key.policy].append(record.quality.kl)
    means = {name: sum(values) / len(values) for name, values in losses.items()}
    assert max(means[name] for name in looking) < means["random"], means
