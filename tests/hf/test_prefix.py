"""Prompts that share what they begin with: each text is that of a fork of one cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import adakv
from adakv.hf.attachment import CACHE
from hf.families import LLAMA, VOCAB

pytestmark = pytest.mark.model

LENGTHS, NEW = (9, 40, 1, 17, 33, 2), (30, 9, 18, 1, 20, 5)


def ids(length: int) -> Tensor:
    return torch.randint(3, VOCAB, (length,))


def options(**settings: Any) -> adakv.BatchOptions:
    return adakv.BatchOptions(**{"eos_token_id": (), **settings})


def of_forks(
    model: Any, prefix: Tensor, prompts: list[Tensor], new: tuple[int, ...], **settings: Any
) -> list[list[int]]:
    """What the model writes behind each prompt in a fork of one cache, greedily."""
    texts = []
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, **settings)
        model(prefix[None], **{CACHE: cache})
        for fork, prompt, count in zip(cache.fork(len(prompts)), prompts, new, strict=True):
            text, tokens = [], prompt[None]
            for _ in range(count):
                tokens = model(tokens, **{CACHE: fork}).logits[:, -1:].argmax(-1)
                text.append(int(tokens))
            texts.append(text)
    return texts


SETTINGS: list[dict[str, Any]] = [
    {"budget": 40},
    {"policy": "ada_snapkv", "ratio": 0.3},
    {"policy": "critical_ada_snapkv", "budget": 36, "kv_dtype": "auto"},
    {"policy": "streaming", "budget": 40, "protect": [(10, 20)]},
    {"policy": "full"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("max_batch", [2, 64])
def test_texts_are_those_of_forks_of_one_cache(settings: dict[str, Any], max_batch: int) -> None:
    model = LLAMA.model(num_hidden_layers=2)
    prefix, prompts = ids(150), [ids(n) for n in LENGTHS]
    results = adakv.generate_batch(
        model,
        prompts,
        prefix=prefix,
        max_new_tokens=NEW,
        options=options(max_batch=max_batch),
        **settings,
    )
    expected = of_forks(model, prefix, prompts, NEW, **settings)
    assert [result.tokens for result in results] == expected
    assert [result.prompt_tokens for result in results] == list(LENGTHS)


@pytest.mark.parametrize("kv_dtype", ["int8", "int4", "int2"])
def test_quantised_pages_are_shared(kv_dtype: str) -> None:
    model = LLAMA.model(num_hidden_layers=2).bfloat16()
    prefix, prompts = ids(150), [ids(n) for n in LENGTHS]
    settings = {"budget": 60, "kv_dtype": kv_dtype}
    results = adakv.generate_batch(
        model, prompts, prefix=prefix, max_new_tokens=NEW, options=options(), **settings
    )
    assert [result.tokens for result in results] == of_forks(
        model, prefix, prompts, NEW, **settings
    )


def test_a_budget_in_bytes_is_that_of_the_prefix() -> None:
    model = LLAMA.model(num_hidden_layers=2).bfloat16()
    results = adakv.generate_batch(
        model, [ids(9), ids(300)], prefix=ids(400), budget_bytes="50%", max_new_tokens=7
    )
    assert [result.prompt_tokens for result in results] == [9, 300]


def test_a_long_prompt_comes_in_pieces_and_the_cache_grows() -> None:
    """More tokens than the fresh pages of a row take at once, and texts beyond their first room."""
    model = LLAMA.model(num_hidden_layers=2, max_position_embeddings=2048)
    prefix, prompts, new = ids(90), [ids(700), ids(5)], (4, 60)
    settings = {"budget": 40}
    results = adakv.generate_batch(
        model,
        prompts,
        prefix=prefix,
        max_new_tokens=new,
        options=options(page_size=8, max_batch=1),
        **settings,
    )
    assert [result.tokens for result in results] == of_forks(
        model, prefix, prompts, new, page_size=8, **settings
    )


def test_what_is_shared_is_stored_once() -> None:
    model = LLAMA.model(num_hidden_layers=2)
    prefix, prompts = ids(400), [ids(5) for _ in range(12)]
    caches = []

    def note(module: Any, args: Any, arguments: dict[str, Any]) -> None:
        reader = arguments.get(CACHE)
        if isinstance(reader, adakv.Cache) and reader.pages is not None:
            caches.append((reader.pages, reader.pages.pages_used))

    model.register_forward_pre_hook(note, with_kwargs=True)
    adakv.generate_batch(
        model, prompts, prefix=prefix, ratio=0.5, max_new_tokens=8, options=options()
    )
    kv, used = caches[1]  # behind the prefix, with the first branch
    branch = 2 * 2 * kv.num_kv_heads  # 2 pages for each row
    assert kv.num_sequences == 13 and len(caches) == 13
    assert kv.num_pages == used + 11 * branch
    assert kv.pages_used == used - branch  # all prompts gave theirs back


def test_strings_go_on_where_the_prefix_ends() -> None:
    model, tokenizer = LLAMA.model(num_hidden_layers=2), words()
    prefix, text = "w5 w6 w7 w8 w9 " * 12, "w10 w11 w12"
    (result,) = adakv.generate_batch(
        model, [text], prefix=prefix, tokenizer=tokenizer, budget=40, max_new_tokens=6
    )
    begin = torch.tensor(tokenizer(prefix)["input_ids"])
    behind = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer(text)["input_ids"] == [1, *behind]
    (expected,) = of_forks(model, begin, [torch.tensor(behind)], (6,), budget=40)
    assert result.tokens == expected


def words() -> Any:
    """A tokenizer whose texts begin with token 1."""
    vocabulary = {"<unk>": 0, "<s>": 1, **{f"w{i}": i for i in range(3, VOCAB)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_a_sampled_text_depends_on_its_seed_alone() -> None:
    model, prefix = LLAMA.model(num_hidden_layers=2), ids(90)
    prompts = [ids(4)] * 5
    runs = [
        adakv.generate_batch(
            model,
            prompts,
            prefix=prefix,
            budget=40,
            max_new_tokens=12,
            options=options(temperature=1.5, seed=7, max_batch=max_batch),
        )
        for max_batch in (1, 5)
    ]
    texts = [[result.tokens for result in results] for results in runs]
    assert texts[0] == texts[1] and len({*map(tuple, texts[0])}) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefix": []}, "prefix is empty"),
        ({"prefix": [VOCAB]}, "prefix must hold tokens from 0"),
        ({"prefix": "text"}, "prefix is a string, which needs a tokenizer"),
        (
            {"prefix": [5] * 90, "policy": "snapkv", "decode_budget": 64},
            "decode_budget must not be given with prefix",
        ),
        ({"prefix": [5] * 90, "protect": [None, None]}, "one list or row for each of 1 sequences"),
        ({"prefix": [5] * 90, "protect": [(0, 40)]}, "protect: prefix has 40 protected tokens"),
        ({"prefix": [5] * 90, "prompts": [[5], []]}, r"prompts\[1\] is empty"),
    ],
)
def test_what_does_not_go_with_a_prefix_is_refused(settings: dict[str, Any], message: str) -> None:
    model = LLAMA.model(num_hidden_layers=2)
    settings = {"prompts": [[5], [6]], "budget": 40, **settings}
    with pytest.raises(ValueError, match=message):
        adakv.generate_batch(model, **settings)


def test_a_prompt_that_never_fits_behind_a_prefix_is_refused() -> None:
    model = LLAMA.model(num_hidden_layers=2)
    with pytest.raises(adakv.Error, match=r"prompts\[1\] can never fit"):
        adakv.generate_batch(
            model,
            [ids(5), ids(500)],
            prefix=ids(90),
            budget=40,
            max_new_tokens=4,
            options=options(cache_bytes=200_000),
        )
