"""Many prompts at once: each text is the one that its prompt gets alone, in any company."""

from __future__ import annotations

import gc
import resource
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor

import adakv
import cases
from adakv.cache import KVCache
from adakv.hf.attachment import CACHE, is_attached
from adakv.hf.sampling import Sampling
from adakv.hf.slots import Decoder
from hf.families import FAMILIES, LLAMA, VOCAB, Family

pytestmark = pytest.mark.model

LENGTHS = (70, 40, 100, 5, 33, 81)
NEW = (5, 18, 9, 20, 1, 2)
LAYERS = 2
SLIDING = FAMILIES[8]


def llama() -> Any:
    return LLAMA.model(num_hidden_layers=LAYERS)


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    return [torch.randint(3, VOCAB, (length,)) for length in lengths]


def alone(model: Any, prompt: Tensor, new: int, *, eos: Any = (), **settings: Any) -> list[int]:
    """What transformers' generate writes with a cache for this prompt only."""
    with adakv.attach(model):
        cache = adakv.Cache(model, **settings)
        ids = model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            past_key_values=cache,
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=list(eos) or None,
        )
    return ids[0, len(prompt) :].tolist()


def options(**settings: Any) -> adakv.BatchOptions:
    return adakv.BatchOptions(**{"eos_token_id": (), **settings})


def caches_of_batches(model: Any) -> list[KVCache]:
    """Those that ``generate_batch`` makes from now on, their unused memory full of NaN."""
    caches: list[KVCache] = []

    def note(module: Any, args: Any, arguments: dict[str, Any]) -> None:
        reader = arguments.get(CACHE)
        is_prompt = isinstance(reader, adakv.Cache) and reader.reading is not None
        kv = reader.pages if is_prompt else None  # other caches have none before their prompt
        if kv is not None and (not caches or caches[-1] is not kv):
            kv.all_layers.pages.fill_(float("nan"))
            caches.append(kv)

    model.register_forward_pre_hook(note, with_kwargs=True)
    return caches


SETTINGS = [
    {"budget": 40},
    {"ratio": 0.5},
    {"policy": "critical_ada_snapkv", "budget": 36},
    {"policy": "ada_pyramidkv", "ratio": 0.7},
    {"policy": "streaming", "budget": 40},
    {"policy": "WindowAttention() * Adaptive() * TopScore() * Folded(cosine=0.0)", "budget": 40},
    {"policy": "full"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_texts_are_those_of_each_prompt_alone(settings: dict[str, Any]) -> None:
    model, ids = llama(), prompts()
    made = caches_of_batches(model)
    results = adakv.generate_batch(
        model, ids, max_new_tokens=NEW, options=options(max_batch=3), **settings
    )
    assert [result.index for result in results] == list(range(len(ids)))
    assert [result.prompt_tokens for result in results] == list(LENGTHS)
    for result, prompt, new in zip(results, ids, NEW, strict=True):
        assert result.tokens == alone(model, prompt, new, **settings)
        assert (result.end, result.text) == ("length", None)
    assert made[0].num_sequences == 3
    assert made[0].num_free == made[0].num_pages
    assert not is_attached(model)


FULL = [
    f for f in FAMILIES if "sliding_window" not in f.settings or not f.settings["sliding_window"]
]


@pytest.mark.parametrize("family", FULL, ids=str)
def test_every_family_with_full_attention_runs(family: Family) -> None:
    if not family.is_available:
        pytest.skip("doesn't use the attention interface in this version of transformers")
    model, ids = (
        family.model(attn_implementation="sdpa", num_hidden_layers=LAYERS),
        prompts((60, 41, 50)),
    )
    results = adakv.generate_batch(
        model, ids, budget=36, max_new_tokens=6, options=options(max_batch=2)
    )
    for result, prompt in zip(results, ids, strict=True):
        assert result.tokens == alone(model, prompt, 6, budget=36)


def test_prompts_wait_for_pages() -> None:
    model, ids = llama(), prompts()
    made = caches_of_batches(model)
    settings = {"budget": 40, "max_new_tokens": NEW}
    expected = adakv.generate_batch(model, ids, options=options(), **settings)
    page = made[0].page_bytes
    with pytest.raises(adakv.Error, match=r"prompts\[0\] .* needs 18 pages .* has 17"):
        tight = options(cache_bytes=18 * page - 1)
        adakv.generate_batch(model, ids, options=tight, **settings)
    tight = options(cache_bytes=38 * page)
    assert adakv.generate_batch(model, ids, options=tight, **settings) == expected
    assert made[1].num_pages == made[1].num_free == 38


@pytest.mark.slow
def test_a_thousand_texts_leave_nothing_behind(device: torch.device) -> None:
    model, sizes = llama().to(device), []
    made = caches_of_batches(model)
    for _ in range(20):
        given = prompts(tuple(torch.randint(1, 400, (50,)).tolist()))
        counts = torch.randint(1, 30, (50,)).tolist()
        adakv.generate_batch(
            model, given, budget=40, max_new_tokens=counts, options=options(max_batch=16)
        )
        cache = made.pop()
        assert cache.pages_used == 0
        pages = weakref.ref(cache.all_layers.pages)
        del cache
        gc.collect()
        assert pages() is None
        sizes.append(used_bytes(device))
    assert max(sizes[5:]) < 1.1 * sizes[4]


def used_bytes(device: torch.device) -> int:
    """Bytes of torch's memory on a GPU, or of this process by Linux's /proc."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_a_text_ends_at_its_stop_token() -> None:
    model, ids = llama(), prompts()
    texts = [alone(model, prompt, 12, budget=40) for prompt in ids]
    eos = {text[i] for i, text in enumerate(texts)}  # of some text the first token
    settings = {"budget": 40, "max_new_tokens": 12}
    results = adakv.generate_batch(
        model, ids, options=options(eos_token_id=sorted(eos), max_batch=3), **settings
    )
    for result, text in zip(results, texts, strict=True):
        ends = [i for i, token in enumerate(text) if token in eos]
        assert result.tokens == text[: ends[0] + 1] and result.end == "eos"
    model.generation_config.eos_token_id = sorted(eos)
    assert adakv.generate_batch(model, ids, **settings) == results
    model.generation_config.eos_token_id = min(eos)
    one = options(eos_token_id=min(eos))
    assert adakv.generate_batch(model, ids, **settings) == adakv.generate_batch(
        model, ids, options=one, **settings
    )


def letters() -> Any:
    """A tokenizer whose tokens are characters."""
    characters = [chr(ord("!") + i) for i in range(VOCAB - 3)]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *characters])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def test_strings_come_in_and_go_out() -> None:
    model, tokenizer, ids = llama(), letters(), prompts()
    texts = ["".join(chr(ord("!") + i - 3) for i in prompt.tolist()) for prompt in ids]
    settings = {"budget": 40, "max_new_tokens": NEW}
    expected = adakv.generate_batch(model, ids, options=options(), **settings)
    results = adakv.generate_batch(model, texts, tokenizer=tokenizer, options=options(), **settings)
    for result, other in zip(results, expected, strict=True):
        assert result.tokens == other.tokens
        assert result.text == "".join(chr(ord("!") + i - 3) for i in other.tokens if i >= 3)


def test_a_text_ends_with_a_stop_string_where_transformers_ends_it() -> None:
    model, tokenizer, ids = llama(), letters(), prompts((70, 40, 90))
    settings = {"budget": 40, "max_new_tokens": 30, "tokenizer": tokenizer}
    texts = [r.text for r in adakv.generate_batch(model, ids, options=options(), **settings)]
    stops = [texts[0][4:7], texts[1][20:22]]
    results = adakv.generate_batch(model, ids, options=options(stop_strings=stops), **settings)
    assert [result.end for result in results[:2]] == ["stop_string"] * 2
    with adakv.attach(model):
        for prompt, result in zip(ids, results, strict=True):
            expected = model.generate(
                prompt[None],
                attention_mask=torch.ones_like(prompt[None]),
                past_key_values=adakv.Cache(model, budget=40),
                do_sample=False,
                max_new_tokens=30,
                eos_token_id=None,
                stop_strings=stops,
                tokenizer=tokenizer,
            )
            assert result.tokens == expected[0, len(prompt) :].tolist()


SAMPLED = {"temperature": 1.5, "top_k": 40, "top_p": 0.9}


def test_sampled_texts_depend_on_their_prompt_and_seed_alone() -> None:
    model, ids = llama(), prompts()
    settings = {"budget": 40, "max_new_tokens": 12}
    wide, narrow, other = (
        adakv.generate_batch(
            model, ids, options=options(seed=seed, max_batch=slots, **SAMPLED), **settings
        )
        for seed, slots in ((5, 64), (5, 2), (6, 64))
    )
    assert wide == narrow != other
    for result, prompt in zip(wide, ids, strict=True):
        own = options(seed=5 + result.index, **SAMPLED)
        [single] = adakv.generate_batch(model, [prompt], options=own, **settings)
        assert single.tokens == result.tokens
    greedy = adakv.generate_batch(model, ids, options=options(), **settings)
    only = options(temperature=2.0, top_k=1)
    assert adakv.generate_batch(model, ids, options=only, **settings) == greedy


def test_seed_comes_from_torch() -> None:
    model, ids = llama(), prompts((40, 50))
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(
            adakv.generate_batch(
                model, ids, budget=40, max_new_tokens=8, options=options(temperature=2.0)
            )
        )
    assert runs[0] == runs[1] != runs[2]


def test_sampling_follows_the_probabilities() -> None:
    sampling, count = Sampling(temperature=0.7, top_k=5, top_p=0.95), 20000
    logits = torch.randn(1, VOCAB)
    # The definition: the 5 best, renormalised; of those as few as make up 0.95.
    values, order = (logits[0] / 0.7).sort(descending=True)
    best = values[:5].softmax(0)
    is_in = best.cumsum(0) - best < 0.95
    expected = (best * is_in) / (best * is_in).sum()
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    chosen = sampling.choose(logits.expand(count, -1), uniforms)
    shares = torch.bincount(chosen, minlength=VOCAB)[order] / count
    assert (shares[:5] - expected).abs().max() < 2 / count
    assert shares[5:].sum() == 0
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert set(sampling.choose(logits.expand(2, -1), ends).tolist()) <= set(order[:5].tolist())


def test_stream_gives_every_token_when_it_is_written() -> None:
    model, ids = llama(), prompts()
    settings = {"budget": 40, "max_new_tokens": NEW, "options": options(max_batch=3)}
    expected = adakv.generate_batch(model, ids, **settings)
    texts: dict[int, list[int]] = {}
    results = []
    for new in adakv.generate_stream(model, ids, **settings):
        texts.setdefault(new.index, []).append(new.token)
        assert is_attached(model)
        if new.result is not None:
            assert new.result == expected[new.index]
            assert texts[new.index] == new.result.tokens
            results.append(new.index)
    assert sorted(results) == list(range(6)) and results != sorted(results)
    stream = adakv.generate_stream(model, ids, **settings)
    next(stream)
    assert is_attached(model) and torch.is_grad_enabled()
    stream.close()
    assert not is_attached(model)
    with adakv.attach(model):
        assert adakv.generate_batch(model, ids, **settings) == expected
        assert is_attached(model)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompts": [[5, 6], []]}, r"prompts\[1\] is empty"),
    ({"prompts": ["text"]}, r"prompts\[0\] is a string, which needs a tokenizer"),
    ({"prompts": [[5, VOCAB]]}, r"prompts\[0\] must hold tokens from 0 to 96, got 5 to 97"),
    ({"prompts": [[-1]]}, r"from 0 to 96, got -1 to -1"),
    ({"prompts": [[0.5]]}, r"prompts\[0\] must be \[T\] integers, got torch.float32 \[1\]"),
    ({"prompts": [[[5]]]}, r"must be \[T\] integers, got torch.int64 \[1, 1\]"),
    ({"budget": None}, "either budget or ratio"),
    ({"ratio": 0.5}, "either budget or ratio"),
    ({"policy": "snapkvv"}, "policy must be .*ada_snapkv.* got 'snapkvv'"),
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ({"max_new_tokens": [4, 5]}, "one for each of the 1 prompts, got 2"),
    ({"options": {"max_batch": 0}}, "max_batch must be at least 1, got 0"),
    ({"options": {"temperature": -1.0}}, "temperature must be at least 0, got -1.0"),
    ({"options": {"temperature": 1.0, "top_k": -1}}, "top_k must be at least 0, got -1"),
    ({"options": {"temperature": 1.0, "top_p": 0.0}}, "top_p must be above 0 .* got 0.0"),
    ({"options": {"top_p": 0.9}}, "temperature must be above 0 where top_k or top_p is given"),
    ({"options": {"stop_strings": "."}}, "stop_strings need a tokenizer"),
    ({"options": {"stop_strings": ["a", ""]}}, "stop_strings must not be empty"),
    ({"options": {"page_size": 10}}, "page_size must be a power of two"),
]


@pytest.mark.parametrize("wrong, message", REFUSED, ids=str)
def test_what_makes_no_sense_is_refused_before_any_work(
    wrong: dict[str, Any], message: str
) -> None:
    model = llama()
    made = caches_of_batches(model)
    arguments: dict[str, Any] = {"prompts": [[5, 6]], "budget": 40, **wrong}
    with pytest.raises(ValueError, match=message):
        arguments["options"] = options(**arguments.get("options", {}))
        adakv.generate_stream(model, **arguments)
    assert not made


def test_models_that_cannot_share_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="Gemma2ForCausalLM has layers without full attention"):
        adakv.generate_batch(SLIDING.model(), [[5, 6]], budget=40)
    with pytest.raises(ValueError, match="eval mode"):
        adakv.generate_batch(llama().train(), [[5, 6]], budget=40)
    assert adakv.generate_batch(llama(), [], budget=40) == []


def fill(model: Any, slots: dict[int, Tensor], num_sequences: int) -> tuple[KVCache, Decoder]:
    """A decoder with prompts in some of its slots."""
    kv = KVCache(
        num_layers=LAYERS,
        num_sequences=num_sequences,
        num_kv_heads=2,
        head_dim=16,
        num_pages=400,
        max_row_pages=20,
        dtype=torch.float32,
    )
    kv.all_layers.pages.fill_(float("nan"))
    decoder = Decoder(model, kv, Sampling())
    cache = adakv.Cache(model, budget=40)
    for slot, prompt in slots.items():
        cache.fill(kv, slot)
        logits = model(prompt[None], past_key_values=cache, use_cache=True).logits
        decoder.begin(slot, logits[0, -1], len(prompt))
    return kv, decoder


@torch.no_grad()
def test_empty_slots_take_and_write_nothing() -> None:
    model, (first, second) = llama(), prompts((70, 50))
    outs: list[Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda *call: outs.append(call[2]))
    with adakv.attach(model):
        kv, decoder = fill(model, {1: first, 3: second}, 6)
        decoder.end(1)
        before = cases.copied(kv.all_layers)
        outs.clear()
        for _ in range(20):
            decoder.grow()
            decoder.step(6)()
    assert torch.isfinite(torch.stack(outs)).all()
    mine = kv.all_layers.block_table[:, 3]
    own = torch.zeros(kv.num_pages, dtype=torch.bool)
    own[mine[mine >= 0].long()] = True
    for name, was, now in zip(before._fields, before, kv.all_layers, strict=True):
        if was is None or now is None:
            assert was is now
        elif name.startswith("page"):
            assert torch.equal(was[~own].nan_to_num(), now[~own].nan_to_num())
        else:
            others = [0, 1, 2, 4, 5]
            assert torch.equal(was[:, others], now[:, others])
    assert decoder.slots.positions[:, 0].tolist() == [0, 70, 0, 70, 0, 0]
    assert kv.all_layers.seen[:, 3].tolist() == [70] * LAYERS


@torch.no_grad()
def test_step_is_one_graph_while_sequences_come_grow_and_go() -> None:
    model, (first, second, third) = llama(), prompts((70, 50, 60))
    texts: dict[str, list[Tensor]] = {}
    with adakv.attach(model):
        for name in ("eager", "compiled"):
            torch.compiler.reset()
            kv, decoder = fill(model, {0: first, 2: second}, 3)
            step = decoder.step(3)
            if name == "compiled":
                step = torch.compile(step, backend="aot_eager", fullgraph=True)
            texts[name] = []
            for i in range(24):
                if i == 6:
                    decoder.end(2)
                    cache = adakv.Cache(model, budget=40)
                    cache.fill(kv, 1)
                    logits = model(third[None], past_key_values=cache, use_cache=True).logits
                    decoder.begin(1, logits[0, -1], 60)
                decoder.grow()
                with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
                    step()
                texts[name].append(decoder.slots.tokens[decoder.slots.num_new.bool()])
    assert torch.equal(torch.cat(texts["eager"]), torch.cat(texts["compiled"]))


def test_streams_of_one_model_may_overlap() -> None:
    """The first one to end doesn't detach the model under the other."""
    model, (first, second) = llama(), prompts()[:2]
    alone = adakv.generate_batch(model, [second], budget=40, max_new_tokens=8)[0].tokens
    short = adakv.generate_stream(model, [first], budget=40, max_new_tokens=3)
    long = adakv.generate_stream(model, [second], budget=40, max_new_tokens=8)
    next(short)
    tokens = [next(long).token]
    list(short)
    tokens += [new.token for new in long]
    assert tokens == alone
    assert not is_attached(model)


def test_a_stream_under_which_the_model_was_detached_says_so() -> None:
    model, ids = llama(), prompts()[:1]
    stream = adakv.generate_stream(model, ids, budget=40, max_new_tokens=8)
    next(stream)
    adakv.detach(model)
    with pytest.raises(adakv.Error, match="the model was detached"):
        next(stream)


def test_an_abandoned_stream_detaches() -> None:
    model = llama()
    stream = adakv.generate_stream(model, prompts()[:1], budget=40, max_new_tokens=8)
    next(stream)
    assert is_attached(model)
    del stream
    gc.collect()
    assert not is_attached(model)
