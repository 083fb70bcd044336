"""Budgets in bytes: as many entries as fit, in the most bits that let everything stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import adakv
from hf.families import LLAMA, VOCAB
from hf.test_hf import GREEDY

pytestmark = pytest.mark.model

POLICIES = pytest.mark.parametrize("policy", ["model_column_max", "ada_snapkv", "pyramidkv"])


def llama(dtype: torch.dtype = torch.bfloat16) -> Any:
    return LLAMA.model().to(dtype)


def tokens(length: int, batch: int = 1) -> Tensor:
    torch.manual_seed(length)
    return torch.randint(3, VOCAB, (batch, length))


def read(model: Any, ids: Tensor, **settings: Any) -> adakv.Cache:
    cache = adakv.Cache(model, **settings)
    with torch.no_grad(), adakv.attach(model):
        model(ids, past_key_values=cache)
    return cache


def taken(cache: adakv.Cache) -> int:
    """Bytes that the pages' sequences take: pages, tails and tables."""
    kv = cache.pages
    assert kv is not None
    return kv.bytes_used + kv.num_sequences * kv.table_bytes


def entries(cache: adakv.Cache) -> int:
    return int(cache.stats()["lengths"].sum())


def test_bits_go_before_entries_do() -> None:
    model, ids = llama(), tokens(300)
    whole = {
        kv_dtype: taken(read(model, ids, ratio=1.0, kv_dtype=kv_dtype))
        for kv_dtype in ("auto", "int8", "int4")
    }
    assert whole["auto"] > whole["int8"] > whole["int4"]
    for kv_dtype, smaller in (("auto", "int8"), ("int8", "int4"), ("int4", "int4")):
        size = whole[kv_dtype]
        at, below = (read(model, ids, budget_bytes=n) for n in (size, size - 1))
        assert at.pages is not None and below.pages is not None
        assert at.pages.kv_dtype == kv_dtype and entries(at) == 4 * 2 * 300
        assert at.stats()["kv_dtype"] == kv_dtype
        assert below.pages.kv_dtype == smaller
        assert (entries(below) == entries(at)) == (kv_dtype != "int4")


def test_where_tails_take_too_much_int8_holds_more_than_int4() -> None:
    model, ids = llama(), tokens(300)
    chosen = read(model, ids, budget_bytes=45_000)
    int8, int4 = (read(model, ids, budget_bytes=45_000, kv_dtype=x) for x in ("int8", "int4"))
    assert chosen.stats()["kv_dtype"] == "int8"
    assert entries(chosen) == entries(int8) > entries(int4)
    with pytest.raises(ValueError, match=r"room for .* in pages of bfloat16, got 45000"):
        read(model, ids, budget_bytes=45_000, kv_dtype="auto")


@POLICIES
@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8", "int4", "int2"])
def test_as_many_entries_as_fit(policy: str, kv_dtype: str) -> None:
    """Never more bytes than asked for, and one entry more in each head is too much."""
    model, ids = llama(), tokens(300)
    for size in (65_000, 70_001):
        cache = read(model, ids, policy=policy, budget_bytes=size, kv_dtype=kv_dtype)
        assert taken(cache) <= size
        mean = cache.eviction.budget.of(300)
        assert entries(cache) == 8 * mean < 8 * 300
        more = read(model, ids, policy=policy, budget=mean + 1, kv_dtype=kv_dtype)
        assert taken(more) > size


def test_a_share_is_one_of_the_full_caches_bytes() -> None:
    model = llama()
    for length in (200, 400):
        cache = read(model, tokens(length), budget_bytes="40%")
        assert taken(cache) <= 0.4 * cache.stats()["full_bytes"]
        number = int(cache.stats()["full_bytes"] * 0.4)
        assert entries(cache) == entries(read(model, tokens(length), budget_bytes=number))


def test_float32_has_no_fewer_bits() -> None:
    cache = read(llama(torch.float32), tokens(300), budget_bytes="60%")
    assert cache.stats()["kv_dtype"] == "auto" and 0 < entries(cache) < 8 * 300
    assert taken(cache) <= 0.6 * cache.stats()["full_bytes"]


def test_a_page_size_leaves_the_formats_that_have_it() -> None:
    cache = read(llama(), tokens(300), budget_bytes="40%", page_size=16)
    assert cache.pages is not None
    assert (cache.pages.kv_dtype, cache.pages.page_size) == ("int8", 16)


def test_prompts_of_a_batch_share_a_format_and_have_their_own_budgets() -> None:
    model, ids = llama(), tokens(300, batch=3)
    mask = torch.ones_like(ids)
    for b, padding in enumerate((0, 100, 250)):
        mask[b, :padding] = 0
    cache = adakv.Cache(model, budget_bytes=70_000)
    with torch.no_grad(), adakv.attach(model):
        model(ids, attention_mask=mask, past_key_values=cache)
    kv, stats = cache.pages, cache.stats()
    assert kv is not None and kv.kv_dtype == "int4"
    assert taken(cache) <= 3 * 70_000
    held = stats["lengths"].sum((0, 2)).tolist()
    assert held[0] == held[1] < 8 * 200 and held[2] == 8 * 50


def test_a_budget_that_is_too_small_names_the_smallest() -> None:
    model, ids = llama(), tokens(300)
    cache = adakv.Cache(model, budget_bytes=1000)
    with (
        torch.no_grad(),
        adakv.attach(model),
        pytest.raises(ValueError, match=r"budget_bytes must have room for (\d+) bytes") as error,
    ):
        model(ids, past_key_values=cache)
    assert cache.pages is None and "got 1000" in str(error.value)
    smallest = int(str(error.value).split("for ")[1].split()[0])
    assert taken(read(model, ids, budget_bytes=smallest)) <= smallest
    with pytest.raises(ValueError, match=f"room for {smallest} bytes"):
        read(model, ids, budget_bytes=smallest - 1)
    with torch.no_grad(), adakv.attach(model):  # nothing was changed
        cache.budget = adakv.policy.Budget.given("ada_snapkv", num_bytes=smallest)
        cache.reset()
        model(ids, past_key_values=cache)


def test_what_a_policy_keeps_of_everything_must_fit() -> None:
    model, ids = llama(), tokens(300)
    assert read(model, ids, policy="full", budget_bytes="80%").stats()["kv_dtype"] == "int4"
    with pytest.raises(ValueError, match="budget_bytes must have room for"):
        read(model, ids, policy="full", budget_bytes="20%")


@pytest.mark.parametrize("chunk", [70, 128])
def test_a_prompt_in_chunks_waits_for_its_length(chunk: int) -> None:
    model, ids = llama(), tokens(300)
    whole = read(model, ids, budget_bytes=70_000)
    cache = adakv.Cache(model, budget_bytes=70_000, chunked_prefill=True)
    with torch.no_grad(), adakv.attach(model):
        for begin in range(0, 300, chunk):
            model(ids[:, begin : begin + chunk], past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    assert cache.stats()["kv_dtype"] == whole.stats()["kv_dtype"] == "int4"
    assert entries(cache) == entries(whole) + 8


def test_chunks_that_are_evicted_from_need_a_format() -> None:
    model, ids = llama(), tokens(300)
    settings: dict[str, Any] = {"policy": "ada_snapkv", "chunk_budget": 200}
    with pytest.raises(ValueError, match="kv_dtype must be given with chunk_budget and bytes to "):
        adakv.Cache(model, budget_bytes=70_000, **settings)
    cache = adakv.Cache(model, budget_bytes=90_000, kv_dtype="int8", **settings)
    with torch.no_grad(), adakv.attach(model):
        for begin in range(0, 300, 100):
            model(ids[:, begin : begin + 100], past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    assert taken(cache) <= 90_000 and entries(cache) < 8 * 200
    small = adakv.Cache(model, budget_bytes=1000, kv_dtype="int8", **settings)
    with torch.no_grad(), adakv.attach(model):
        model(ids, past_key_values=small)
        with pytest.raises(ValueError, match="budget_bytes must have room for"):
            model(ids[:, :1], past_key_values=small)


@pytest.mark.parametrize("pin_prompt", [True, False])
def test_a_text_that_is_evicted_from_is_counted(pin_prompt: bool) -> None:
    """Between choices a cache never takes more, however long the text is."""
    model, ids = llama(), tokens(250)
    cache = adakv.Cache(
        model,
        "ada_snapkv",
        budget_bytes=80_000,
        decode_budget=40,
        every=16,
        pin_prompt=pin_prompt,
    )
    most = 0
    with torch.no_grad(), adakv.attach(model):
        model(ids, past_key_values=cache)
        assert entries(cache) < 8 * 250
        for _ in range(200):
            model(ids[:, :1], past_key_values=cache)
            most = max(most, taken(cache))
    assert 70_000 < most <= 80_000


def test_tokens_behind_the_prompt_come_on_top() -> None:
    cache = read(llama(), tokens(300), budget_bytes=70_000)
    before = entries(cache)
    with torch.no_grad(), adakv.attach(cache.model):
        for _ in range(100):
            cache.model(tokens(1), past_key_values=cache)
    assert entries(cache) == before + 8 * 100 and taken(cache) > 70_000


@pytest.mark.parametrize("size", [80_000, "70%", "100%"])
def test_a_batch_of_prompts_has_one_format_and_each_its_bytes(size: int | str) -> None:
    model = llama()
    given = [tokens(length)[0] for length in (300, 200, 280)]
    options = adakv.BatchOptions(max_batch=2, eos_token_id=())
    batch: dict[str, Any] = {"budget_bytes": size, "max_new_tokens": 5, "options": options}
    results = adakv.generate_batch(model, given, **batch)
    kv_dtype = read(model, given[0][None], budget_bytes=size).stats()["kv_dtype"]
    for prompt, result in zip(given, results, strict=True):
        cache = adakv.Cache(model, budget_bytes=size, kv_dtype=kv_dtype, max_new_tokens=5)
        with adakv.attach(model):
            alone = model.generate(
                prompt[None],
                attention_mask=torch.ones_like(prompt[None]),
                past_key_values=cache,
                **GREEDY | {"max_new_tokens": 5},
            )
        assert result.tokens == alone[0, len(prompt) :].tolist()


def test_a_batch_refuses_bytes_that_are_too_few_before_any_work() -> None:
    with pytest.raises(ValueError, match="budget_bytes must have room for"):
        adakv.generate_batch(llama(), [tokens(300)[0]], budget_bytes="2KiB")
    assert adakv.generate_batch(llama(), [], budget_bytes="2KiB") == []


def test_a_budget_in_bytes_stands_alone() -> None:
    with pytest.raises(ValueError, match="budget_bytes must be given without budget and ratio"):
        adakv.Cache(llama(), budget=40, budget_bytes=100)
    with pytest.raises(ValueError, match="budget_bytes must be bytes"):
        adakv.Cache(llama(), budget_bytes=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give either budget or ratio, or budget_bytes"):
        adakv.Cache(llama())


MORE = "WindowAttention() * Adaptive() * TopScore() * MoreTokens({})"


def test_more_tokens_take_the_bytes_of_as_many_in_16_bits() -> None:
    model, ids = llama(), tokens(400)
    for budget in (100, 150):
        plain = read(model, ids, policy="ada_snapkv", budget=budget)
        cache = read(model, ids, policy=MORE.format(""), budget=budget)
        assert cache.stats()["kv_dtype"] == "int4"
        assert taken(cache) <= taken(plain) and entries(cache) > 1.3 * entries(plain)
        named = read(model, ids, policy=MORE.format("kv_dtype='int4'"), budget=budget)
        assert all(map(torch.equal, cache.kept(1)[0], named.kept(1)[0]))
        mean = cache.eviction.budget.of(400)
        more = read(model, ids, policy="ada_snapkv", budget=mean + 1, kv_dtype="int4")
        assert taken(more) > taken(plain)
    assert read(model, ids, policy=MORE.format(""), ratio=1.0).stats()["kv_dtype"] == "auto"


def test_more_tokens_choose_as_the_policy_does() -> None:
    """The text of a preset and one more part: nothing else about it changes."""
    model, ids = llama(), tokens(400)
    cache = read(model, ids, policy="more_tokens", ratio=0.3)
    mean = cache.eviction.budget.of(400)
    same = read(model, ids, policy="snapkv", budget=mean, kv_dtype=cache.stats()["kv_dtype"])
    assert mean > 120 and all(map(torch.equal, cache.kept(2)[0], same.kept(2)[0]))


def test_more_tokens_in_16_bits_are_as_many() -> None:
    model, ids = llama(torch.float32), tokens(400)
    caches = [read(model, ids, policy=name, budget=90) for name in ("snapkv", "more_tokens")]
    assert taken(caches[0]) == taken(caches[1])
    assert all(map(torch.equal, caches[0].kept(0)[0], caches[1].kept(0)[0]))


def test_more_tokens_of_another_format_are_refused() -> None:
    with pytest.raises(ValueError, match="kv_dtype must be that of the policy, 'int4', got 'int8'"):
        adakv.Cache(llama(), MORE.format("kv_dtype='int4'"), 60, kv_dtype="int8")


def test_a_batch_takes_more_tokens() -> None:
    model, prompt = llama(), tokens(300)[0]
    options = adakv.BatchOptions(eos_token_id=())
    settings: dict[str, Any] = {"max_new_tokens": 5, "options": options}
    alone = read(model, prompt[None], policy="more_tokens", budget=100, max_new_tokens=5)
    mean = alone.eviction.budget.of(300)
    given: dict[str, Any] = {"policy": "snapkv", "budget": mean, "kv_dtype": "int4"}
    expected = adakv.generate_batch(model, [prompt], **given, **settings)
    got = adakv.generate_batch(model, [prompt], policy="more_tokens", budget=100, **settings)
    assert got == expected
