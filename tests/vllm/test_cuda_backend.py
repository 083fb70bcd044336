"""Steps of one token from a CUDA graph, as vLLM replays them: padded to the size that was recorded,
while the tables are made anew outside. vLLM isn't needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adakv.vllm.config import Settings
from adakv.vllm.metadata import batch_of, decode_batch_of, is_decode
from engine_steps import BLOCK, BUDGET, GROUP, HEADS, LAYERS, MAX_LEN, Steps
from int4_steps import PAGE, Int4Steps

MOST = 6


def prompts_read(device: torch.device, dtype: torch.dtype, kv_dtype: str = "auto") -> Steps:
    """Four requests whose prompts have just been read."""
    if kv_dtype == "int4":
        steps: Steps = Int4Steps(Settings(budget=BUDGET).policy_for(PAGE), device, dtype)
    else:
        policy = Settings(budget=BUDGET).policy_for(BLOCK)
        steps = Steps(policy, device, dtype, kv_dtype=kv_dtype)
    for prompt in (200, 30, 161, 100):
        steps.add(prompt)
    read(steps, [r.prompt for r in steps.requests])
    return steps


def read(steps: Steps, counts: list[int]) -> None:
    """One step outside of graphs, with so many tokens of each request."""
    step = steps.cache.begin_step(batch_of(steps.describe(counts)))
    for layer in range(LAYERS):
        queries, keys, values = steps.inputs(layer, counts)
        steps.cache.attend(layer, step, queries, keys, values, torch.empty_like(queries))
    steps.advance(counts)


def padded(steps: Steps, layer: int) -> list[torch.Tensor]:
    """One token of each request, and padding."""
    inputs = steps.inputs(layer, [1] * len(steps.requests))
    return [torch.cat([x, x.new_ones(MOST - len(x), *x.shape[1:])]) for x in inputs]


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8", "int4"])
def test_padded_decode_steps_equal_the_reference(device: torch.device, kv_dtype: str):
    is_exact = device.type == "cpu" and kv_dtype == "auto"
    steps = prompts_read(device, torch.float32 if is_exact else torch.bfloat16, kv_dtype)
    buffers = steps.cache.buffers(MOST + 3, MAX_LEN, HEADS * GROUP)
    for number in range(40):
        if number == 30:
            steps.remove(steps.requests[1])
        counts = [1] * len(steps.requests)
        metadata = steps.describe(counts, padding=MOST - len(counts))
        assert is_decode(metadata)
        steps.end_prompts()
        step = steps.cache.begin_step(decode_batch_of(metadata, MAX_LEN), buffers)
        for layer in range(LAYERS):
            queries, keys, values = padded(steps, layer)
            out = torch.full_like(queries, float("nan"))
            steps.cache.attend(layer, step, queries, keys, values, out)
            steps.check(out, layer, counts)
            assert (out[len(counts) :] == 0).all()
        steps.advance(counts)
        steps.give_back()


@pytest.mark.parametrize("has_places", [False, True])
@pytest.mark.parametrize("name", ["ada_snapkv", "h2o", "model_column_max"])
def test_prompt_tokens_in_replayed_decode_steps_are_observed(name: str, has_places: bool):
    """A step of one token for each request may be replayed from a graph, where no layer is asked:
    also if that token is one of a prompt."""
    policy = Settings(name, BUDGET).policy_for(BLOCK)
    steps = Steps(policy, torch.device("cpu"), torch.float32, has_places=has_places)
    for prompt in (152, 130, 161, 40):
        steps.add(prompt)
    buffers = steps.cache.buffers(4, MAX_LEN, HEADS * GROUP)
    read(steps, [149, 130, 161, 40])
    counts, recorded = [1, 1, 1, 1], None
    for _ in range(6):
        metadata = steps.describe(counts)
        assert is_decode(metadata)
        steps.end_prompts()
        step = steps.cache.begin_step(decode_batch_of(metadata, MAX_LEN), buffers)
        # What a graph replays knows no more of a step than what is in the buffers.
        recorded = recorded or replace(step, reading={})
        for layer in range(LAYERS):
            queries, keys, values = steps.inputs(layer, counts)
            out = torch.full_like(queries, float("nan"))
            steps.cache.attend(layer, recorded, queries, keys, values, out)
            steps.check(out, layer, counts)
        steps.advance(counts)
        steps.give_back()
    assert [boundary for _, boundary in steps.told.planned] == [130, 161, 40, 152]
    assert len(steps.told.entries) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8", "int4"])
def test_decode_steps_replayed_from_a_graph_equal_the_reference(kv_dtype: str):
    device = torch.device("cuda")
    steps = prompts_read(device, torch.bfloat16, kv_dtype)
    buffers = steps.cache.buffers(MOST + 3, MAX_LEN, HEADS * GROUP)
    counts = [1] * len(steps.requests)
    # Recorded on padding alone, as vLLM does before there are requests.
    empty = steps.describe(counts)
    for name in ("seq_lens", "seq_lens_cpu_upper_bound", "query_start_loc", "block_table_tensor"):
        tensor = getattr(empty, name)
        size = MOST + (name == "query_start_loc")
        setattr(empty, name, torch.zeros(size, *tensor.shape[1:], dtype=torch.int32).to(tensor))
    empty.num_reqs = empty.num_actual_tokens = MOST
    empty.is_prefilling = None
    static = [padded(steps, layer) for layer in range(LAYERS)]
    outs = [torch.empty_like(static[layer][0]) for layer in range(LAYERS)]
    step = steps.cache.begin_step(decode_batch_of(empty, MAX_LEN), buffers)

    def model() -> None:
        for layer in range(LAYERS):
            steps.cache.attend(layer, step, *static[layer], outs[layer])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model()
    for _ in range(40):
        metadata = steps.describe(counts, padding=MOST - len(counts))
        steps.end_prompts()
        steps.cache.begin_step(decode_batch_of(metadata, MAX_LEN), buffers)
        for layer in range(LAYERS):
            for buffer, new in zip(static[layer], padded(steps, layer), strict=True):
                buffer.copy_(new)
        graph.replay()
        for layer in range(LAYERS):
            steps.check(outs[layer], layer, counts)
            assert (outs[layer][len(counts) :] == 0).all()
        steps.advance(counts)
        steps.give_back()
