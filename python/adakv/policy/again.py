"""Choosing again: which of the entries that rows hold stay while a text is written."""

from __future__ import annotations

import torch
from torch import Tensor

from adakv.ops import Kept
from adakv.policy.base import Policy
from adakv.policy.inputs import LayerInputs


def carries(policy: Policy) -> bool:
    """Whether the policy's scores are those of before and what new queries add."""
    return bool(getattr(policy.scorer, "carries", False))


def check_chooses_again(policy: Policy, name: str = "decode_budget") -> None:
    """Raises ``ValueError`` if a policy can't choose again, as ``name`` wants it to."""
    if policy.is_model_wide:
        raise ValueError(
            f"{name}: {type(policy.allocator).__name__} shares a budget out among all layers, "
            "which is done once, for a whole prompt; take a policy that does so in each layer, "
            "such as 'r_kv' or 'ada_snapkv'"
        )
    there = {"w_o", "budget", *(("all_queries",) if carries(policy) else ())}
    if name == "chunk_budget":  # an instruction is read behind every chunk
        there.add("repeat")
    if missing := policy.needs - there:
        raise ValueError(
            f"{name}: {type(policy.scorer).__name__} needs {', '.join(sorted(missing))}, which "
            "are there for a whole prompt only; take a policy that looks at the newest queries, "
            "such as 'r_kv' or 'ada_snapkv'"
        )


def choose_again(
    policy: Policy,
    inputs: LayerInputs,
    scores: Tensor,
    budgets: tuple[int, ...],
    *,
    pinned: Tensor | None = None,
    protected: Tensor | None = None,
    total: int,
) -> Kept:
    """Which entries of a layer stay, of those that its rows hold.

    Shares a budget out and picks as :meth:`Policy.choose` does with a prompt. Rows differ in
    length, so the window, which is each row's last entries, takes part with a score of ``+inf``,
    and so does what is protected. What is pinned stays, too, and costs no budget.

    Parameters
    ----------
    policy : :class:`Policy`
        One that passes :func:`check_chooses_again`.
    inputs : :class:`LayerInputs`
        What rows hold, with ``positions`` and ``seq_lens`` ``[B, Hkv]``.
    scores : ``[B, Hkv, T]`` float32
        Those of the policy's scorer.
    budgets : ints ``[B]``
        Mean entries per kv head, window included, beside what is pinned; T for all of them.
    pinned, protected : ``[B, Hkv, T]`` bool, optional
        The budget must have room for what is protected. Behind a row's end they are not read.
    total : int
        Most entries that stay, of all sequences and kv heads together.

    Returns
    -------
    kept : :class:`adakv.ops.Kept`
        Places in the rows in the place of positions.
    """
    held = inputs.candidates(0)
    stays = held & ~inputs.candidates(policy.window)
    if protected is not None:
        stays |= protected & held
    scores = scores.masked_fill(stays, torch.inf).masked_fill(~held, -torch.inf)
    if pinned is None:
        shares = policy.allocator.allocate(scores, inputs, budgets, window=0)
    else:
        pinned = pinned & held
        competing = scores.masked_fill(pinned, -torch.inf)
        shares = policy.allocator.allocate(competing, inputs, budgets, window=0)
        shares = shares + pinned.sum(-1, dtype=torch.int32)
        scores = scores.masked_fill(pinned, torch.inf)
    shares = shares.minimum(inputs.ends)
    return policy.selector.select(scores, shares, inputs, window=0, total=total)
