"""An engine's half of a cache, played: requests, blocks and steps described as vLLM describes them,
with queries, keys and values by chance in the place of a model; and what has to come out."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from itertools import chain, pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import codes
from adakv.policy import Budget, LayerInputs, Policy, Protection, TokenClasses
from adakv.policy.inputs import CLASSES
from adakv.reading import Chosen, Part, Reader
from adakv.reselection import Rule
from adakv.step import Attention
from adakv.vllm.engine_cache import EngineCache
from adakv.vllm.metadata import batch_of
from adakv.vllm.page_memory import Pages, entry_bytes
from adakv.vllm.pages import spans_layers
from adakv.vllm.plan import Order, Plan, Scheduler, plan
from adakv.vllm.prompt_attention import FlashAttention
from adakv.vllm.steps import Step
from policy.helpers import rotate
from tolerance import assert_close

LAYERS, HEADS, GROUP, DIM, BLOCK, BUDGET = 2, 3, 2, 32, 16, 48
NUM_BLOCKS, MAX_LEN, MOST_REQUESTS = 200, 512, 9
SCALE = 0.3


def watched(policy: Policy) -> tuple[Policy, list[LayerInputs]]:
    """A policy that takes prompts part by part, and those it will have taken."""
    parts: list[LayerInputs] = []

    class Watched(type(policy.scorer)):  # type: ignore[misc]
        def take(self, taken: Any, part: LayerInputs) -> Any:
            parts.append(part)
            return super().take(taken, part)

    settings = {f.name: getattr(policy.scorer, f.name) for f in fields(policy.scorer)}
    return replace(policy, scorer=Watched(**settings)), parts


@dataclass(eq=False)
class Request:
    """A request: what it will say, what of it was seen, and its blocks."""

    prompt: int
    queries: Tensor  # [L, MAX_LEN, Hq, D]
    keys: Tensor  # [L, MAX_LEN, Hkv, D], what pages hold of them
    values: Tensor
    new_keys: Tensor  # as the model has them
    new_values: Tensor
    computed: int = 0
    boundary: int = 0
    kept: list[list[Tensor]] = field(default_factory=list)  # [L][Hkv], where it was compressed
    blocks: list[int] = field(default_factory=list)
    wait: int = 0  # tokens behind the prompt, before it is compressed
    budget: int = BUDGET
    protected: tuple[tuple[int, int], ...] = ()
    images: tuple[tuple[int, int], ...] = ()
    order: Order | None = None
    is_warm_up: bool = False  # no scheduler knows of it
    place: int = -1


class Told(Scheduler):
    """What a cache tells."""

    def __init__(self) -> None:
        self.planned: list[tuple[int, int]] = []
        self.entries: list[tuple[int, int]] = []
        self.running: set[int] = set()
        self.orders: dict[int, Order] = {}
        self.num_late = 0  # requests that had written something when they were compressed
        self.refuses = False  # what the cache plans

    def is_running(self, first_block: int) -> bool:
        return first_block in self.running

    def order(self, first_block: int, boundary: int, computed: int) -> Order | None:
        if self.refuses:
            raise RuntimeError("planned otherwise")
        order = self.orders.get(first_block, Order(computed, boundary))
        if order.at == computed and order.budget != 0:
            self.planned.append((first_block, boundary))
            self.num_late += computed > boundary
        return order

    def compressed(self, entries_read: int, entries_kept: int) -> None:
        self.entries.append((entries_read, entries_kept))


class Steps:
    """Requests on one device; their blocks in any order, unused memory full of NaN.

    ``kv_dtype``: what pages hold; ``has_places``: the worker has a table of requests, as vLLM's
    second model runner; ``scheduler``: what the cache asks instead of :attr:`told`.
    """

    def __init__(
        self,
        policy: Policy,
        device: torch.device,
        dtype: torch.dtype,
        *,
        flash: FlashAttention | None = None,
        has_places: bool = False,
        kv_dtype: str = "auto",
        rule: Rule | None = None,
        scheduler: Scheduler | None = None,
    ) -> None:
        self.has_places, self.kv_dtype, self.flash = has_places, kv_dtype, flash
        self.block_size = 32 if kv_dtype == "int4" else BLOCK
        self.rows_of_layer = None if spans_layers(policy) else HEADS
        self.policy, self.device, self.dtype = policy, device, dtype
        self.told = Told()
        width = HEADS * GROUP * DIM
        self.asked: list[int] = []  # layers whose output projection was asked for
        self.w_o = [torch.randn(40, width, device=device).to(dtype) for _ in range(LAYERS)]
        self.cache = EngineCache(
            policy,
            BUDGET,
            self._pages(),
            num_kv_heads=HEADS,
            attentions=[Attention(scale=SCALE, rotate=rotate)] * LAYERS,
            w_o=self._output_weight,
            scheduler=scheduler or self.told,
            flash=flash,
            rule=rule,
            num_requests=MOST_REQUESTS,
        )
        self.free = (torch.randperm(NUM_BLOCKS - 1) + 1).tolist()
        self.requests: list[Request] = []

    def add(self, prompt: int) -> Request:
        """A new request."""
        made = [torch.randn(LAYERS, MAX_LEN, n, DIM) for n in (HEADS * GROUP, HEADS, HEADS)]
        queries, keys, values = (x.to(self.device, self.dtype) for x in made)
        held = [self._held(x) for x in (keys, values)]
        request = Request(prompt, queries, *held, keys, values)
        self.requests.append(request)
        return request

    def find(self, request: Request, count: int) -> None:
        """Its first tokens, whole blocks of them, are in a prefix cache."""
        request.blocks = [self.free.pop() for _ in range(count // self.block_size)]
        request.computed = count
        self.told.running.add(request.blocks[0])
        self._fill(request, count)

    def _fill(self, request: Request, count: int) -> None:
        """Writes its first tokens to its blocks, whole blocks of them."""
        for layer, pages in enumerate(self.cache.pages):
            parts = [[x[layer, :count]] for x in (request.new_keys, request.new_values)]
            if self.kv_dtype != "auto":
                parts = [codes.quantise(x, self.kv_dtype) for (x,) in parts]
            for part, x in zip(pages.parts, chain(*zip(*parts, strict=True)), strict=True):
                found = x.view(part.dtype).unflatten(0, (-1, self.block_size)).transpose(1, 2)
                part.unflatten(0, (NUM_BLOCKS, HEADS))[request.blocks] = found

    def remove(self, request: Request) -> None:
        """It has finished, and its blocks are anybody's."""
        self.requests.remove(request)
        self._free(request)

    def preempt(self, request: Request) -> None:
        """It has to start again."""
        self._free(request)
        request.blocks, request.computed, request.boundary, request.kept = [], 0, 0, []
        request.order = None
        request.place = -1

    def _free(self, request: Request) -> None:
        if request.blocks:
            self.told.running.discard(request.blocks[0])
        self.free += [block for block in request.blocks if block]

    def describe(self, counts: list[int], padding: int = 0) -> SimpleNamespace:
        """What vLLM says of a step with so many new tokens of each request, and of padding."""
        for request, count in zip(self.requests, counts, strict=True):
            while len(request.blocks) * self.block_size < request.computed + count:
                request.blocks.append(self.free.pop())
            if request.computed == 0 and request.blocks and not request.is_warm_up:
                self.told.running.add(request.blocks[0])
        computed = [r.computed for r in self.requests]
        table = torch.zeros(len(counts) + padding, MAX_LEN // self.block_size, dtype=torch.int32)
        for row, request in zip(table, self.requests, strict=False):
            row[: len(request.blocks)] = torch.tensor(request.blocks)
        start = torch.tensor([0, *counts] + [0] * padding).cumsum(0).int()
        lengths = [a + b for a, b in zip(computed, counts, strict=True)] + [0] * padding
        size = self.block_size
        slots = [
            request.blocks[place // size] * size + place % size
            for request, count in zip(self.requests, counts, strict=True)
            for place in range(request.computed, request.computed + count)
        ]
        return SimpleNamespace(
            query_start_loc=start.to(self.device),
            query_start_loc_cpu=start,
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=self.device),
            seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
            num_reqs=len(counts) + padding,
            num_actual_tokens=sum(counts) + padding,
            max_query_len=max(counts),
            max_seq_len=max(lengths),
            block_table_tensor=table.to(self.device),
            slot_mapping=torch.tensor(slots + [-1] * padding).to(self.device),
            req_idx=self._places() if self.has_places else None,
            is_prefilling=torch.tensor(
                [r.computed < r.prompt for r in self.requests] + [False] * padding
            ),
        )

    def _places(self) -> np.ndarray:
        """Places of the requests in their worker's table; a free one is taken again soon."""
        taken = [r.place for r in self.requests]
        for request in self.requests:
            if request.place < 0:
                request.place = next(i for i in range(100) if i not in taken)
                taken.append(request.place)
        return np.array([r.place for r in self.requests])

    def inputs(self, layer: int, counts: list[int]) -> list[Tensor]:
        """Queries, keys and values ``[tokens, H, D]`` of a step's new tokens."""
        return [
            torch.cat(
                [
                    x[layer, r.computed : r.computed + count]
                    for r, count in zip(self.requests, counts, strict=True)
                    for x in [getattr(r, name)]
                ]
            )
            for name in ("queries", "new_keys", "new_values")
        ]

    def end_prompts(self) -> None:
        """Chooses what requests keep whose prompt ended before this step, or some tokens ago."""
        for request in self.requests:
            if request.computed < request.prompt or request.is_warm_up:
                continue
            if not request.boundary:
                request.boundary = request.computed
                hold = Order(request.boundary, request.boundary, 0)
                self.told.orders[request.blocks[0]] = hold
            if request.order is None and request.computed >= request.boundary + request.wait:
                request.order = Order(
                    request.computed,
                    request.boundary,
                    request.budget,
                    request.protected,
                    classes=tuple((*span, CLASSES.index("image")) for span in request.images),
                )
                self.told.orders[request.blocks[0]] = request.order
                if self.plan(request.boundary, request.budget) is not None:
                    request.kept = self._kept(request)

    def plan(self, boundary: int, budget: int) -> Plan | None:
        """As the scheduler computes it."""
        numbers = {"block_size": self.block_size, "num_kv_heads": self.rows_of_layer}
        return plan(boundary, budget=budget, **numbers)

    def give_back(self) -> None:
        """Frees blocks of compressed requests, after the step that compressed them."""
        for request in self.requests:
            if request.kept:
                self.take_back(request, *self.plan(request.boundary, request.budget))

    def take_back(self, request: Request, begin: int, end: int) -> None:
        """Blocks of a request that are not taken back by now."""
        self.free += [block for block in request.blocks[begin:end] if block]
        request.blocks[begin:end] = [0] * len(request.blocks[begin:end])

    def expected(self, layer: int, counts: list[int], dtype: torch.dtype) -> Tensor:
        """``[tokens, Hq, D]``, what the step has to give, computed in ``dtype``."""
        pairs = zip(self.requests, counts, strict=True)
        return torch.cat([self._attention(r, layer, count, dtype) for r, count in pairs])

    def check(self, out: Tensor, layer: int, counts: list[int]) -> None:
        """Compares what came out of a layer."""
        exact = self.expected(layer, counts, torch.float64)
        assert_close(out[: sum(counts)], exact, self.expected(layer, counts, self.dtype))

    def advance(self, counts: list[int]) -> None:
        """The step has run."""
        for request, count in zip(self.requests, counts, strict=True):
            request.computed += count

    def _pages(self) -> list[Pages]:
        """Those of all layers, in one memory."""
        sizes = LAYERS, NUM_BLOCKS * HEADS
        if self.kv_dtype == "auto":
            shape = *sizes, 2, BLOCK, DIM
            nan = torch.full(shape, float("nan"), device=self.device, dtype=self.dtype)
            return [Pages(x) for x in nan]
        shape = *sizes, self.block_size, entry_bytes(self.kv_dtype, DIM, self.dtype)
        ones = torch.full(shape, 255, device=self.device, dtype=torch.uint8)
        kind = {"kv_dtype": self.kv_dtype, "head_dim": DIM, "dtype": self.dtype}
        return [Pages.within(x, **kind) for x in ones]

    def _held(self, x: Tensor) -> Tensor:
        """What pages hold of keys or values, in float32 if they hold codes."""
        if self.kv_dtype == "auto":
            return x
        return codes.dequantise(*codes.quantise(x, self.kv_dtype), torch.float32)

    def _output_weight(self, layer: int) -> Tensor:
        self.asked.append(layer)
        return self.w_o[layer]

    def _kept(self, request: Request) -> list[list[Tensor]]:
        """What a reader of the whole prompt at once keeps."""
        n = request.boundary
        protection = Protection.given(request.protected)
        classes = TokenClasses.given({"image": list(request.images)})
        budget = Budget(self.policy, request.budget)
        reader = Reader(budget, LAYERS, protection=protection, classes=classes)
        reader.begin([n], n)
        chosen: dict[int, list[Chosen]] = {}
        for layer in range(LAYERS):
            q, k, v = (
                x[layer, :n].transpose(0, 1)[None]
                for x in (request.queries, request.keys, request.values)
            )
            entries, w_o = (k.to(self.dtype), v.to(self.dtype)), self.w_o[layer]
            attention = Attention(SCALE, rotate=rotate)
            part = Part(q, lambda x=entries: x, attention, lambda x=w_o: x)
            chosen |= reader.finish(layer, part)
        kept = [chosen[layer][0].kept for layer in range(LAYERS)]
        borders = [list(pairwise(x.indptr.tolist())) for x in kept]
        return [
            [x.positions[a:b].long() for a, b in rows]
            for x, rows in zip(kept, borders, strict=True)
        ]

    def _attention(self, request: Request, layer: int, count: int, dtype: torch.dtype) -> Tensor:
        """``[count, Hq, D]`` of a request's new tokens, each of which sees those before it."""
        end = request.computed + count
        queries = request.queries[layer, request.computed : end].to(dtype)
        out = []
        for h in range(HEADS):
            keys, values = self._row(request, layer, h, end, dtype)
            numbers = torch.arange(len(keys), device=self.device)
            ahead = numbers > numbers[len(keys) - count :, None]  # [count, n]
            logits = queries[:, h * GROUP : (h + 1) * GROUP] @ keys.T * SCALE  # [count, G, n]
            out.append(logits.masked_fill(ahead[:, None], -torch.inf).softmax(-1) @ values)
        return torch.cat(out, 1)

    def _row(
        self, request: Request, layer: int, head: int, end: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``[n, D]`` that the token before ``end`` sees."""
        seen = torch.arange(request.boundary if request.kept else 0, end, device=self.device)
        if request.kept:
            seen = torch.cat([request.kept[layer][head], seen])
        keys, values = (x[layer, seen, head].to(dtype) for x in (request.keys, request.values))
        return keys, values


def run_step(steps: Steps, counts: list[int]) -> Step:
    """One step of all requests, and whether it gave what it should; what it was for the layers.
    The engine's memory of queries, keys and values is then used for something else."""
    metadata = steps.describe(counts)
    steps.end_prompts()
    step = steps.cache.begin_step(batch_of(metadata))
    for layer in range(LAYERS):
        queries, keys, values = steps.inputs(layer, counts)
        out = torch.full_like(queries, float("nan"))
        steps.cache.attend(layer, step, queries, keys, values, out)
        steps.check(out, layer, counts)
        for used in (queries, keys, values):
            used.fill_(float("nan"))
    steps.advance(counts)
    steps.give_back()
    return step
