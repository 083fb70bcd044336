"""The verbs as torch operators: registration is sound, and compiled graphs give the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
from adakv import ops

VERBS = ["score", "value_norm", "allocate", "select", "compact", "append", "plan", "attend"]
BATCH, HEADS, GROUP, LENGTH, WINDOW, DIM = 2, 2, 2, 40, 4, 64


def prompt() -> dict[str, Tensor]:
    case = cases.Prompt(BATCH, HEADS, GROUP, LENGTH, WINDOW, DIM, seq_lens=(LENGTH, 30))
    cpu = torch.device("cpu")
    return {
        "queries": case.queries(cpu),
        "keys": case.entries(cpu),
        "values": case.entries(cpu),
        "w_o": case.w_o(cpu),
        "seq_lens": cases.int32(case.seq_lens),
    }


def prefill(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    w_o: Tensor,
    seq_lens: Tensor,
    layer: ops.Layer,
    page_ids: Tensor,
    page_indptr: Tensor,
) -> tuple[Tensor, ...]:
    """Five verbs, as both papers put them together."""
    scores = ops.score(queries, keys, seq_lens=seq_lens)
    norms = ops.value_norm(values, w_o, seq_lens=seq_lens)
    budgets = ops.allocate(scores, 16, window=WINDOW, seq_lens=seq_lens)
    total = BATCH * HEADS * 16
    kept = ops.select(scores, budgets, window=WINDOW, seq_lens=seq_lens, norms=norms, total=total)
    ops.compact(keys, values, kept, layer, page_ids, page_indptr, seq_lens=seq_lens)
    return scores, norms, budgets, *kept


def decode(
    queries: Tensor, keys: Tensor, values: Tensor, layer: ops.Layer, older: ops.Layer
) -> tuple[Tensor, ...]:
    """A step by append and attend, and one that attend appends itself, beside another tier."""
    ops.append(keys, values, layer)
    rows = (layer.lengths[None], layer.block_table[None], layer.fresh_pages[None])
    first = ops.attend(queries, layer, ops.plan(*rows, new_tokens=0)[0])
    schedule = ops.plan(*rows, new_tokens=keys.shape[2])
    rows = (older.lengths[None], older.block_table[None], older.fresh_pages[None])
    tier = ops.Tier(older, ops.plan(*rows, new_tokens=0)[0], queries[..., ::2].contiguous(), DIM)
    return *first, *ops.attend(queries, layer, schedule[0], [tier], keys=keys, values=values)


def step() -> dict[str, Any]:
    layer = cases.paged_layer([[20, 3], [7, 33]], head_dim=DIM, new_tokens=4)
    layer = layer._replace(pages=layer.pages.nan_to_num())  # NaN is not equal to itself
    new = {"keys": torch.randn(BATCH, HEADS, 2, DIM), "values": torch.randn(BATCH, HEADS, 2, DIM)}
    older = cases.paged_layer([[9, 0], [40, 3]], head_dim=DIM // 2)
    older = older._replace(pages=older.pages.nan_to_num())
    queries = torch.randn(BATCH, HEADS * GROUP, 2, DIM)
    return {"queries": queries, **new, "layer": layer, "older": older}


def pages() -> dict[str, Any]:
    layer = cases.empty_layer(BATCH, HEADS, num_pages=40, columns=5, head_dim=DIM)
    layer = layer._replace(pages=torch.zeros_like(layer.pages))
    ids = torch.randperm(40)[:20].int()
    return {"layer": layer, "page_ids": ids, "page_indptr": cases.int32([0, 10, 20])}


def operators(device: torch.device) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments and options of each operator, on the CPU but for what depends on the device."""
    p, s, room = prompt(), step(), pages()
    scores = torch.rand(BATCH, HEADS, LENGTH)
    budgets = cases.int32([[10, 6], [4, 12]])
    kept = ops.select(scores, budgets, window=WINDOW)
    table = (s["layer"].lengths[None], s["layer"].block_table[None], s["layer"].fresh_pages[None])
    schedule = ops.plan(*(on(device, x) for x in table), new_tokens=2)[0]
    lens = {"seq_lens": p["seq_lens"]}
    new = {"keys": s["keys"], "values": s["values"]}
    entries = (torch.randn(BATCH, HEADS, LENGTH, DIM) for _ in range(2))
    room_for_pages = (*room["layer"], room["page_ids"], room["page_indptr"])
    norms = torch.rand_like(scores)
    most = s["layer"].block_table.shape[2] * s["layer"].pages.shape[2]
    return {
        "score": ((p["queries"], p["keys"]), lens | {"scale": 0.1, "window_reduce": "max"}),
        "value_norm": ((p["values"], p["w_o"]), lens),
        "allocate": ((scores, 10), lens | {"window": WINDOW}),
        "select": ((scores, budgets), {"window": WINDOW, "norms": norms, "total": 40}),
        "compact": ((*entries, *kept, *room_for_pages), {}),
        "append": ((*new.values(), *s["layer"]), {}),
        "plan": (table, {"new_tokens": 2}),
        "attend": (
            (s["queries"], *s["layer"], schedule, [], []),
            new | {"scale": 0.1, "accumulated": torch.rand(BATCH, HEADS, most)},
        ),
    }


@pytest.mark.parametrize("verb", VERBS)
def test_torch_operator_is_registered_soundly(verb: str, device: torch.device) -> None:
    """The schema tells what is mutated, and the fake gives the shapes, dtypes and strides."""
    args, options = operators(device)[verb]
    args = tuple(x.to(device) if isinstance(x, Tensor) else x for x in args)
    options = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in options.items()}
    torch.library.opcheck(getattr(torch.ops.adakv, verb).default, args, options)


def test_torch_operator_takes_tiers(device: torch.device) -> None:
    """Their tensors in one list, and their numbers in another."""
    s = {name: on(device, x) for name, x in step().items()}
    queries, layer, older = s["queries"], s["layer"], s["older"]
    schedules = [
        ops.plan(x.lengths[None], x.block_table[None], x.fresh_pages[None], new_tokens=0)[0]
        for x in (layer, older)
    ]
    tiers = [ops.Tier(older, schedules[1], queries[..., :32], column) for column in (DIM, 0)]
    tensors = [*older, schedules[1], queries[..., :32]] * 2
    args = (queries, *layer, schedules[0], tensors, [DIM, 0])
    torch.library.opcheck(torch.ops.adakv.attend.default, args)
    for x, y in zip(
        torch.ops.adakv.attend(*args), ops.attend(queries, layer, schedules[0], tiers), strict=True
    ):
        assert torch.equal(x, y)


def test_torch_operators_are_seen_by_tracers_without_the_compiler() -> None:
    class Scores(torch.nn.Module):
        def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
            return ops.score(queries, keys)

    tensors = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 40, 16)
    score = ops.score
    with ops.operators():
        exported = torch.export.export(Scores(), tensors, strict=False)
    assert ops.score is score
    called = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.adakv.score.default]
    assert torch.equal(exported.module()(*tensors), ops.score(*tensors))


def test_torch_operator_says_that_attend_counts_in_the_schedule() -> None:
    arguments = {a.name: a for a in torch.ops.adakv.attend.default._schema.arguments}
    assert arguments["schedule"].is_write


@pytest.mark.parametrize("verb", VERBS)
def test_torch_operator_takes_what_the_function_takes(verb: str) -> None:
    """Same names, order and defaults; a NamedTuple is as many arguments as it has fields."""
    schema = getattr(torch.ops.adakv, verb).default._schema
    packed = {
        "kept": ops.Kept._fields,
        "layer": ops.Layer._fields,
        "others": ("others", "others_numbers"),  # schemas know no defaults of lists
    }
    parameters = inspect.signature(getattr(ops, verb)).parameters.values()
    names = [x for p in parameters for x in packed.get(p.name, (p.name,))]
    assert [a.name for a in schema.arguments] == names
    given = [p for p in parameters if p.default not in (p.empty, ())]
    defaults = {x: p.default for p in given for x in packed.get(p.name, (p.name,))}
    assert {a.name: a.default_value for a in schema.arguments if a.has_default_value()} == defaults


def on(device: torch.device, value: Any) -> Any:
    """A copy of an input on a device."""
    if isinstance(value, ops.Layer):
        return cases.mapped(value, lambda x: x.to(device, copy=True))
    return value.to(device, copy=True)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    ("function", "inputs"),
    [(prefill, lambda: prompt() | pages()), (decode, step)],
    ids=["prefill", "decode"],
)
def test_torch_compiled_graph_gives_the_same(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Callable[[], dict[str, Any]],
    backend: str,
    device: torch.device,
) -> None:
    """All eight verbs in two graphs without a break: results and mutated tensors, bit for bit."""
    host = inputs()
    eager = {name: on(device, x) for name, x in host.items()}
    compiled = {name: on(device, x) for name, x in host.items()}
    expected = function(**eager)
    got = torch.compile(function, fullgraph=True, backend=backend)(**compiled)
    for a, e in zip(got, expected, strict=True):
        assert torch.equal(a, e)
    for a, e in zip(compiled["layer"], eager["layer"], strict=True):
        assert a is e is None or torch.equal(a, e)
    assert not torch.equal(compiled["layer"].pages.cpu(), host["layer"].pages)


def test_torch_compiled_graph_selects_without_a_known_total(device: torch.device) -> None:
    scores = torch.rand(BATCH, HEADS, LENGTH, device=device)
    budgets = cases.int32([[10, 6], [4, 12]]).to(device)

    def select(scores: Tensor, budgets: Tensor) -> ops.Kept:
        return ops.select(scores, budgets, window=WINDOW)

    got = torch.compile(select, fullgraph=True, backend="aot_eager")(scores, budgets)
    for a, e in zip(got, select(scores, budgets), strict=True):
        assert torch.equal(a, e)
