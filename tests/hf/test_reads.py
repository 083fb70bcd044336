"""Caches whose steps read some pages: nothing leaves, and everything that caches do still goes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adakv
from adakv.formats import has_tails
from adakv.policy import AttentionPredictor, get
from hf.families import FAMILIES, LLAMA, VOCAB, Family
from hf.test_hf import GREEDY, prompts
from hf.test_model_wide import held
from predictor_file import predictor_file

pytestmark = pytest.mark.model

WHOLE = "Quest(share=1.0, full_layers=0)"
SOME = "Quest(share=0.25, least=2, full_layers=0)"


def logits(model: Any, cache: Any, *, prompt: int = 150, steps: int = 6, width: int = 1) -> Tensor:
    """``[steps, B, V]`` of forwards behind two prompts, of which one is padded."""
    torch.manual_seed(1)
    batch, found = prompts(prompt, (0, 30)), []
    mask = batch["attention_mask"]
    with torch.no_grad(), adakv.attach(model):
        model(**batch, past_key_values=cache)
        for _ in range(steps):
            mask = torch.cat([mask, mask.new_ones(2, width)], 1)
            tokens = torch.randint(3, VOCAB, (2, width))
            positions = (mask.cumsum(-1) - 1)[:, -width:]
            given = {"attention_mask": mask, "position_ids": positions}
            found.append(model(tokens, past_key_values=cache, **given).logits[:, -1])
    return torch.stack(found)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_all_pages_listed_changes_nothing(family: Family) -> None:
    if not family.is_available:
        pytest.skip("not in this version of transformers")
    model = family.model()
    plain = logits(model, adakv.Cache(model, "full"), prompt=60)
    listed = logits(model, adakv.Cache(model, "full", read=WHOLE), prompt=60)
    torch.testing.assert_close(listed, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("policy", "budget"), [("full", None), ("ada_snapkv", 60), ("model_rank_fusion", 60)]
)
@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "int4", "int2"])
@pytest.mark.parametrize("width", [1, 3, 40])
def test_reads_go_with_eviction_and_quantised_pages(
    policy: str, budget: int | None, kv_dtype: str, width: int
) -> None:
    """All entries stay; with all pages listed nothing changes, and with some of them something."""
    model = LLAMA.model().to(torch.bfloat16)
    found, kept = [], []
    for read in (None, WHOLE, SOME):
        cache = adakv.Cache(model, policy, budget, kv_dtype=kv_dtype, read=read)
        found.append(logits(model, cache, width=width).float())
        kept.append(held(cache))
    assert kept[0] == kept[1] == kept[2]
    far = [float((x - found[0]).abs().mean()) for x in found[1:]]
    if width == 40:  # more than a page: a step that reads everything
        assert far == [0, 0]
    elif not has_tails(kv_dtype):  # whose pages are quantised earlier here, where one is filled
        assert far[0] < 0.2 * far[1]
    else:
        assert far[0] < far[1]


def test_texts_that_are_evicted_from_may_be_read_in_part() -> None:
    model = LLAMA.model()
    options = {"policy": "ada_snapkv", "budget": 60, "decode_budget": 40, "every": 8}
    plain = logits(model, adakv.Cache(model, **options), steps=60)
    listed = logits(model, adakv.Cache(model, **options, read=WHOLE), steps=60)
    torch.testing.assert_close(listed, plain, atol=1e-4, rtol=1e-4)
    assert logits(model, adakv.Cache(model, **options, read=SOME), steps=60).isfinite().all()


def test_chunks_are_read_whole() -> None:
    model, ids = LLAMA.model(), torch.randint(3, VOCAB, (1, 120))
    found = []
    for read in (None, WHOLE):
        cache = adakv.Cache(model, "ada_snapkv", budget=50, chunk_budget=50, read=read)
        with torch.no_grad(), adakv.attach(model):
            for chunk in ids.split(10, 1):
                model(chunk, past_key_values=cache)
            found.append(model(ids[:, :1], past_key_values=cache).logits)
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


def test_branches_crops_and_beams_read_what_they_hold() -> None:
    """As caches without reads: with all pages listed every one of them gives the same."""
    model = LLAMA.model()
    ids, token = torch.randint(3, VOCAB, (1, 90)), torch.randint(3, VOCAB, (1, 1))
    results = []
    for read in (None, WHOLE):
        found = []
        with torch.no_grad(), adakv.attach(model):
            cache = adakv.Cache(model, "full", read=read)
            model(ids, past_key_values=cache)
            for _ in range(4):
                model(token, past_key_values=cache)
            (fork,) = cache.fork()
            found.append(model(token, past_key_values=fork).logits)
            twin = copy.deepcopy(cache)
            for _ in range(20):  # both go on in pages of their own
                model(token + 1, past_key_values=twin)
            found += [model(token, past_key_values=x).logits for x in (twin, cache)]
            cache.crop(-3)
            found.append(model(token + 1, past_key_values=cache).logits)
            cache.reset()
            found.append(
                model.generate(
                    ids, past_key_values=cache, num_beams=3, **GREEDY, output_logits=True,
                    return_dict_in_generate=True,
                ).sequences.float()
            )  # fmt: skip
        results.append(found)
    for plain, listed in zip(*results, strict=True):
        torch.testing.assert_close(plain, listed, atol=1e-4, rtol=1e-4)


def test_pages_may_be_foretold(tmp_path: Path) -> None:
    """All entries stay; with all pages listed nothing changes, and with some of them something,
    from the first step on that isn't read whole."""
    model, found, kept = LLAMA.model(), [], []
    file, _ = predictor_file(tmp_path)
    how = {"history": 2, "full_layers": 0, "first": 1, "newest": 1, "least": 2, "every": 100}
    for share in (None, 1.0, 0.25):
        read = None if share is None else AttentionPredictor(file=file, share=share, **how)  # type: ignore[arg-type]
        cache = adakv.Cache(model, "ada_snapkv", 60, read=read)
        found.append(logits(model, cache))
        kept.append(held(cache))
    assert kept[0] == kept[1] == kept[2]
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
    far = (found[2] - found[0]).abs().amax((1, 2))
    assert far[:2].max() < 1e-4 and far[2] > 1e-3


def test_a_saved_cache_can_be_read_in_part(tmp_path: Any) -> None:
    model, ids = LLAMA.model(), torch.randint(3, VOCAB, (1, 90))
    with torch.no_grad(), adakv.attach(model):
        cache = adakv.Cache(model, "full")
        model(ids, past_key_values=cache)
        cache.save(tmp_path / "doc")
        loaded = adakv.Cache.load(model, tmp_path / "doc", read=WHOLE)
        both = [model(ids[:, :1], past_key_values=x).logits for x in (cache, loaded)]
    torch.testing.assert_close(*both, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_done_is_refused() -> None:
    model = LLAMA.model()
    for wrong, message in [
        ("Quest(share=0)", "share must be above 0"),
        ("quest", "read 'quest': quest must be one of Quest"),
        (0.5, "read must be a Quest, or one written down, got 0.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            adakv.Cache(model, "full", read=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="read: it chooses pages by their keys alone"):
        adakv.generate_batch(
            model, [[5] * 9], policy=f"{get('ada_snapkv')} * Folded()", budget=60,
            options=adakv.BatchOptions(read=SOME),
        )  # fmt: skip


def test_steps_that_foretell_are_not_recorded(tmp_path: Path) -> None:
    model, (file, _) = LLAMA.model(), predictor_file(tmp_path)
    cache = adakv.Cache(model, "full", read=AttentionPredictor(file=file))
    message = "read must be a Quest where steps are recorded, got AttentionPredictor"
    with adakv.attach(model), pytest.raises(ValueError, match=message):
        model.generate(
            torch.ones(1, 9, dtype=torch.int64), past_key_values=cache, max_new_tokens=4,
            custom_generate=adakv.cuda_graph_sample,
        )  # fmt: skip


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "int4"])
def test_recorded_steps_read_the_same_pages(kv_dtype: str) -> None:
    """In transformers' loop, in a loop of recorded steps, which begins twice, and in a batch."""
    model = LLAMA.model().to(torch.bfloat16)
    torch.manual_seed(0)
    ids = torch.randint(3, VOCAB, (1, 150))
    texts = []
    for custom in (None, adakv.cuda_graph_sample):
        cache = adakv.Cache(model, "ada_snapkv", 90, kv_dtype=kv_dtype, read=SOME)
        with adakv.attach(model):
            text = ids
            for _ in range(2):
                text = model.generate(
                    text, attention_mask=torch.ones_like(text), past_key_values=cache,
                    custom_generate=custom, **GREEDY,
                )  # fmt: skip
        texts.append(text[0, 150:].tolist())
    options = adakv.BatchOptions(read=SOME, eos_token_id=(), max_batch=2)
    others = [torch.randint(3, VOCAB, (n,)) for n in (120, 40)]
    prompts = [others[0], ids[0], others[1]]
    batch = adakv.generate_batch(
        model, prompts, policy="ada_snapkv", budget=90, kv_dtype=kv_dtype, max_new_tokens=24,
        options=options,
    )  # fmt: skip
    texts.append(batch[1].tokens)
    assert texts[0] == texts[1]
    if kv_dtype != "int4":  # whose pages are quantised earlier in steps of one token alone
        assert texts[0] == texts[2]
