"""A smaller cache is made of a larger one, by what its entries scored when their prompts were read.

The policy shares out and picks as it did then, among the entries that are still there. Those behind
the prompts stay, and cost no budget.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adakv.cache import KVCache, sequences
from adakv.entries import Held, HeldInputs
from adakv.kept_scores import fitting
from adakv.policy import Budget, Policy
from adakv.policy.again import Competing, moved_scores, shares_of_all
from adakv.policy.allocators import Everything
from adakv.policy.base import needs_of
from adakv.reselection import begin_again
from adakv.step import Attention


def check_shrinks(policy: Policy) -> None:
    """Raises ``ValueError`` if a policy can't share out and pick by the scores of what it kept."""
    if isinstance(policy.allocator.layers, Everything):
        raise ValueError("policy: it keeps everything of a prompt, and so has nothing to shrink by")
    if "budget" in needs_of(policy.scorer):
        raise ValueError(
            f"policy: what {type(policy.scorer).__name__} scores depends on the budget, and so it "
            "can't choose again for another one"
        )
    for part in (policy.allocator, policy.selector):
        if missing := needs_of(part) - {"w_o", "layer"}:
            raise ValueError(
                f"policy: {type(part).__name__} needs {', '.join(sorted(missing))}, which are "
                "there while a prompt is read: it can't choose again later"
            )


def shrunk(
    kv: KVCache,
    budget: Budget,
    scores: Sequence[Tensor],
    prompt_lens: Sequence[int],
    attention: Sequence[Attention],
) -> list[Tensor]:
    """Brings what rows hold of their prompts down to a budget, in place.

    Parameters
    ----------
    kv : :class:`adakv.cache.KVCache`
        Whose sequences share no pages.
    budget : :class:`adakv.policy.Budget`
        Mean entries per kv head that stay of a prompt.
    scores : one ``[B, Hkv, M]`` float32 for each layer
        As :class:`adakv.kept_scores.KeptScores` has them.
    prompt_lens : ints ``[B]``
    attention : one :class:`adakv.step.Attention` for each layer

    Returns
    -------
    scores : one ``[B, Hkv, M]`` for each layer
        Of what is left.

    Raises
    ------
    ValueError
        If more must stay than the budget holds. Nothing changes.
    """
    policy = budget.policy
    lengths = kv.lengths().tolist()  # [L][B][Hkv]; waits for the device
    most = max(max(map(max, of_layer)) for of_layer in lengths)
    most = -(-most // kv.page_size) * kv.page_size
    layers = [
        _layer(kv, policy, index, x, prompt_lens, most, attention[index])
        for index, x in enumerate(scores)
    ]
    means = _means(budget, prompt_lens, layers)
    if policy.is_model_wide:
        shares = shares_of_all(policy, [competing for _, competing in layers], means[0])
    else:
        shares = [
            competing.shares(policy, inputs, mean)
            for (inputs, competing), mean in zip(layers, means, strict=True)
        ]
    kept_of_rows = torch.stack(shares)  # [L, B, Hkv]
    totals = kept_of_rows.sum(-1).tolist()
    longest = kept_of_rows.amax((0, 2)).tolist()
    page_ids, page_indptr = begin_again(kv, totals, longest, 0)
    left = []
    for index, (inputs, competing) in enumerate(layers):
        kept = competing.pick(policy, inputs, shares[index], sum(totals[index]))
        inputs.held.compact(kept, page_ids, page_indptr[index])
        moved = moved_scores(fitting(scores[index], most), kept, behind=-torch.inf)
        left.append(moved[..., : max(longest)].clone())
    return left


def _layer(
    kv: KVCache,
    policy: Policy,
    index: int,
    scores: Tensor,
    prompt_lens: Sequence[int],
    most: int,
    attention: Attention,
) -> tuple[HeldInputs, Competing]:
    """What the rows of a layer hold, ready to be chosen from."""
    held = Held(sequences(kv.layers[index], slice(None)), most, kv.dtype)
    w_o = attention.w_o().to(kv.device) if attention.w_o and "w_o" in policy.needs else None
    nothing = scores.new_empty(len(prompt_lens), kv.num_kv_heads, 0, kv.head_dim)
    inputs = HeldInputs(held, nothing, index, kv.num_layers, attention=attention, w_o=w_o)
    ends = torch.tensor(prompt_lens, dtype=torch.int32).to(kv.device)[:, None, None]
    behind = held.positions >= ends
    return inputs, Competing.of(policy, inputs, fitting(scores, most), pinned=behind)


def _means(
    budget: Budget, prompt_lens: Sequence[int], layers: Sequence[tuple[HeldInputs, Competing]]
) -> list[tuple[int, ...]]:
    """Mean entries per kv head that each layer keeps of each prompt, ``[L][B]``."""
    always = torch.stack([x.rivals.isposinf().sum(-1).amax(-1) for _, x in layers])  # [L, B]
    policy, means = budget.policy, []
    for index, of_layer in enumerate(always.tolist()):
        of_prompts = [
            policy.allocator.layers.budget(
                budget.of(n),
                window=policy.window,
                prompt_len=n,
                layer=index,
                num_layers=len(layers),
            )
            for n in prompt_lens
        ]
        for b, (mean, least) in enumerate(zip(of_prompts, of_layer, strict=True)):
            if least > mean:
                raise ValueError(
                    f"budget must hold what always stays, the window and what is protected: of "
                    f"sequence {b} these are {least} entries, and a kv head of layer {index} has "
                    f"room for {mean}"
                )
        means.append(tuple(of_prompts))
    return means
