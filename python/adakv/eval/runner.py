"""Every item x policy x share, prompt by prompt."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

import adakv
from adakv.eval.metrics import Item, answer_logits, compare
from adakv.eval.prefill import Prefill
from adakv.eval.records import Key, Record
from adakv.eval.written import Written
from adakv.policy import Policy
from adakv.policy.base import needs_of


def missing(
    tasks: Mapping[str, Sequence[Item]],
    policies: Collection[str],
    shares: Collection[float],
    done: Collection[Key],
) -> list[Key]:
    """What is still to be measured."""
    finished = set(done)
    keys = (
        Key(task, item.name, policy, share)
        for task, items in tasks.items()
        for item in items
        for policy in policies
        for share in shares
    )
    return [key for key in keys if key not in finished]


def run(
    model: Any,
    tasks: Mapping[str, Sequence[Item]],
    policies: Mapping[str, Policy],
    shares: Sequence[float],
    done: Collection[Key] = (),
    kv_dtypes: Mapping[str, str | None] | None = None,
    *,
    protect: Sequence[tuple[int, int]] = (),
    protect_tokens: Collection[int] = (),
    written: Written | None = None,
    read: str | None = None,
) -> Iterator[Record]:
    """Measures everything that is not ``done``.

    Parameters
    ----------
    model : PreTrainedModel
        Not attached.
    tasks : items by the name of their task
    policies : policies by name
    shares : sequence of float in (0, 1]
        Of each prompt's entries.
    done : collection of :class:`Key`, optional
    kv_dtypes : formats of pages by names of ``policies``, optional
        Default: "auto".
    protect : spans, optional
        Tokens of every prompt that stay, as :class:`adakv.Cache` takes them.
    protect_tokens : ids of tokens, optional
        Which stay, wherever in a prompt they stand.
    written : :class:`adakv.eval.written.Written`, optional
        Has policies choose from prompts as if they were texts being written.
    read : str, optional
        Which pages steps read, as :class:`adakv.Cache` takes it. What follows a prompt is then read
        token by token, as wider steps may read everything. Not with ``written``.

    Raises
    ------
    ValueError
        If an item is too long for the model, or if the model can't run with adakv.

    Yields
    ------
    record : :class:`Record`
        One for each of :func:`missing`, prompt by prompt: each is read once.
    """
    _check_lengths(model, tasks)
    wanted = set(missing(tasks, policies, shares, done))
    settings = [(name, share) for name in policies for share in shares]
    needs = needs_of(*policies.values())
    with adakv.attach(model):
        for task, all_items in tasks.items():
            for prompt, group in groupby(all_items, key=lambda item: item.prompt):
                items = list(group)
                todo = [
                    (item, Key(task, item.name, *setting))
                    for item in items
                    for setting in settings
                    if Key(task, item.name, *setting) in wanted
                ]
                if not todo:
                    continue
                prefill = Prefill(model, torch.tensor([prompt]), needs=needs)
                stays = [*protect, *adakv.spans_of(prompt, protect_tokens)]
                for item, pairs in groupby(todo, key=lambda pair: pair[0]):
                    full = answer_logits(model, prefill.full_cache(), item)
                    for _, key in pairs:
                        policy = policies[key.policy]
                        kv_dtype = (kv_dtypes or {}).get(key.policy, "auto")
                        if written is not None:
                            cache = written.cache(model, prompt, policy, key.share, kv_dtype)
                        else:
                            new = len(item.query) + len(item.answer)
                            given: dict[str, Any] = {"kv_dtype": kv_dtype, "protect": stays}
                            given |= {"ratio": key.share, "max_new_tokens": new, "read": read}
                            cache = prefill.cache(policy, **given)
                        stats = cache.stats()
                        compressed = answer_logits(model, cache, item, one_by_one=read is not None)
                        yield _record(stats, compressed, item, key, full)


def _record(
    stats: dict[str, Any], compressed: torch.Tensor, item: Item, key: Key, full: torch.Tensor
) -> Record:
    quality = compare(full, compressed, torch.tensor(item.answer, device=full.device))
    return Record(
        key, item.group, quality, len(item.prompt), stats["bytes"], stats["full_bytes"], item.depth
    )


def _check_lengths(model: Any, tasks: Mapping[str, Sequence[Item]]) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for task, items in tasks.items():
        longest = max(len(item.prompt + item.query + item.answer) for item in items)
        if limit is not None and longest > limit:
            raise ValueError(
                f"tokens: an item of {task} has {longest} with its answer, the model takes {limit}"
            )
