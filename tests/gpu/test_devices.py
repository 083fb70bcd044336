"""Models spread over devices: half of the layers on a GPU, half on the CPU or on a second GPU. Each
layer's pages lie where it attends, and what is written is what one device writes."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import adakv
from adakv.devices import SplitCache
from hf.families import LLAMA, VOCAB
from hf.test_hf import GREEDY, prompts

accelerate = pytest.importorskip("accelerate")
pytestmark = [pytest.mark.gpu, pytest.mark.model]

PLACES = {
    "CPU and GPU": ("cpu", "cuda:0"),
    "two GPUs": ("cuda:0", "cuda:1"),
}
POLICIES = ["ada_snapkv", "critical_ada_snapkv", "h2o", "model_column_max", "expected"]


def spread(first: str, second: str) -> PreTrainedModel:
    """Layers 0 and 1 on one device, with all that isn't a layer, and 2 and 3 on the other."""
    if "cuda:1" in (first, second) and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = LLAMA.model()
    places = dict.fromkeys(
        ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), first
    )
    places |= {f"model.layers.{i}": first if i < 2 else second for i in range(4)}
    return accelerate.dispatch_model(model, places, main_device=first)


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("policy", POLICIES)
def test_each_layers_pages_lie_where_it_does(policy: str, places: str) -> None:
    first, second = PLACES[places]
    batch, texts = prompts(120, (0, 50, 21)), []
    for model in (LLAMA.model(), spread(first, second)):
        inputs = {name: x.to(model.device) for name, x in batch.items()}
        with adakv.attach(model):
            cache = adakv.Cache(model, policy, budget=48, max_new_tokens=4)
            text = model.generate(**inputs, past_key_values=cache, **GREEDY)
            texts.append((text.cpu(), cache.stats()["lengths"]))
    assert isinstance(cache.pages, SplitCache)
    devices = [str(layer.pages.device) for layer in cache.pages.layers]
    assert devices == [first, first, second, second]
    assert torch.equal(texts[0][0], texts[1][0]) and torch.equal(texts[0][1], texts[1][1])


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("policy", ["ada_snapkv", "model_column_max"])
def test_batches_over_devices_write_the_same(policy: str, places: str) -> None:
    given = [torch.randint(3, VOCAB, (n,)).tolist() for n in (70, 40, 90, 60)]
    texts = []
    for model in (LLAMA.model(), spread(*PLACES[places])):
        results = adakv.generate_batch(model, given, policy=policy, budget=40, max_new_tokens=30)
        texts.append([result.tokens for result in results])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("places", PLACES)
def test_what_needs_one_device_is_refused(places: str) -> None:
    model = spread(*PLACES[places])
    with pytest.raises(ValueError, match="decode_budget, chunk_budget and read need all layers"):
        adakv.Cache(model, "ada_snapkv", 48, decode_budget=40)
    with pytest.raises(ValueError, match="compile must be False with layers on several devices"):
        options = adakv.BatchOptions(compile=True)
        adakv.generate_batch(model, [[5] * 60], budget=40, options=options)


@pytest.mark.parametrize("some", [True, False])
def test_weights_that_come_when_needed_have_pages_on_the_gpu(some: bool) -> None:
    """Accelerate runs layers that lie on the CPU on the GPU, if the model begins there."""
    model = spread("cuda:0", "cpu") if some else LLAMA.model()
    if not some:
        accelerate.cpu_offload(model, execution_device=torch.device("cuda:0"))
    (result,) = adakv.generate_batch(model, [[5, 6] * 40], budget=40, max_new_tokens=12)
    (expected,) = adakv.generate_batch(LLAMA.model(), [[5, 6] * 40], budget=40, max_new_tokens=12)
    assert result.tokens == expected.tokens
