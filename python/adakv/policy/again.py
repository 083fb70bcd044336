"""Choosing again: which of the entries that rows hold stay while a text is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adakv.ops import Kept
from adakv.policy.base import Policy
from adakv.policy.inputs import LayerInputs


def carries(policy: Policy) -> bool:
    """Whether the policy's scores are made of what it knew before and what new queries add."""
    return bool(getattr(policy.scorer, "carries", False))


def check_unfolded(policy: Policy, name: str) -> None:
    """Raises ``ValueError`` if a policy folds what leaves, where ``name`` has it choose again."""
    if policy.fold is not None:
        raise ValueError(
            f"{name}: Folded() folds what leaves a prompt once, when all of it is there, and can't "
            "go with choosing again; take the policy without it"
        )


def check_chooses_again(policy: Policy, name: str = "decode_budget") -> None:
    """Raises ``ValueError`` if a policy can't choose again, as ``name`` wants it to."""
    check_unfolded(policy, name)
    there = {"w_o", "budget", "queries", "layer", *(("all_queries",) if carries(policy) else ())}
    if name == "chunk_budget":  # an instruction is read behind every chunk
        there.add("repeat")
    if missing := policy.needs - there:
        raise ValueError(
            f"{name}: {type(policy.scorer).__name__} needs {', '.join(sorted(missing))}, which "
            "are there for a whole prompt only; take a policy that looks at the newest queries, "
            "such as 'r_kv' or 'ada_snapkv'"
        )


class Competing(NamedTuple):
    """What the rows of a layer hold, ready to be chosen from.

    Rows differ in length, so the window, which is each row's last entries, takes part with a score
    of ``+inf``, and so does what is protected. What is pinned stays, too, and costs no budget.
    """

    scores: Tensor  # [B, Hkv, T]: +inf for what stays, -inf for what isn't there
    rivals: Tensor  # the same, -inf for what is pinned
    pinned: Tensor  # [B or 1, Hkv or 1] int32: how many are
    ends: Tensor  # [B, Hkv] int32: how many there are

    @classmethod
    def of(
        cls,
        policy: Policy,
        inputs: LayerInputs,
        scores: Tensor,
        *,
        pinned: Tensor | None = None,
        protected: Tensor | None = None,
    ) -> Competing:
        """From the scores of the policy's scorer, ``[B, Hkv, T]`` float32.

        ``inputs`` are what rows hold, with ``positions`` and ``seq_lens`` ``[B, Hkv]``; ``pinned``
        and ``protected`` are ``[B, Hkv, T]`` bool, not read behind a row's end. The budget must
        have room for what is protected.
        """
        held = inputs.candidates(0)
        stays = held & ~inputs.candidates(policy.window)
        if protected is not None:
            stays |= protected & held
        scores = scores.masked_fill(stays, torch.inf).masked_fill(~held, -torch.inf)
        ends = inputs.ends
        if pinned is None:
            return cls(scores, scores, ends.new_zeros(1, 1), ends)
        pinned = pinned & held
        rivals = scores.masked_fill(pinned, -torch.inf)
        scores = scores.masked_fill(pinned, torch.inf)
        return cls(scores, rivals, pinned.sum(-1, dtype=torch.int32), ends)

    def shares(self, policy: Policy, inputs: LayerInputs, budgets: tuple[int, ...]) -> Tensor:
        """``[B, Hkv]`` int32: entries that stay, of mean ``budgets`` per kv head, window included,
        beside what is pinned; T for all of them."""
        shares = policy.allocator.allocate(self.rivals, inputs, budgets, window=0)
        return (shares + self.pinned).minimum(self.ends)

    def pick(self, policy: Policy, inputs: LayerInputs, shares: Tensor, total: int) -> Kept:
        """Which entries stay, places in the rows instead of positions; at most ``total`` of
        all sequences and kv heads together."""
        return policy.selector.select(self.scores, shares, inputs, window=0, total=total)


def shares_of_all(
    policy: Policy, layers: Sequence[Competing], budgets: tuple[int, ...]
) -> list[Tensor]:
    """:meth:`Competing.shares` of all layers, between which a model-wide policy shares out."""
    joined = [torch.cat(x, 1) for x in zip(*((x.rivals, x.ends) for x in layers), strict=True)]
    batch, _, length = joined[0].shape
    hollow = joined[0].new_empty(*joined[0].shape, 0)
    inputs = LayerInputs(
        hollow, hollow, hollow, None, (length,) * batch, 0, len(layers), seq_lens=joined[1]
    )
    shares = policy.allocator.allocate(joined[0], inputs, budgets, window=0).chunk(len(layers), 1)
    return [(of + x.pinned).minimum(x.ends) for of, x in zip(shares, layers, strict=True)]


def moved_scores(scores: Tensor, kept: Kept, *, behind: float = 0.0) -> Tensor:
    """Scores ``[B, Hkv, T, ...]``, or whatever else is known of entries, as ``[B, Hkv, T + 1,
    ...]`` where the entries lie now; what is ``behind`` them."""
    batch, heads, length, *more = scores.shape
    rows = kept.rows(batch * heads)
    places = torch.arange(len(rows), device=rows.device) - kept.indptr[rows]
    moved = scores.new_full((batch * heads, length + 1, *more), behind)
    values = scores.reshape(batch * heads, length, *more)
    values = values[rows, kept.positions.clamp(min=0).long()]
    is_there = (kept.positions >= 0).view(-1, *(1 for _ in more))
    moved[rows, places.clamp(max=length)] = values.where(is_there, behind)
    return moved.view(batch, heads, length + 1, *more)
