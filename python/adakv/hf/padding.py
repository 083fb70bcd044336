"""Padding: who has how many of the new tokens, and how they are brought together on the right."""

from __future__ import annotations

import torch
from torch import Tensor


def new_tokens(
    mask: Tensor | None, seen: list[int], columns: int
) -> tuple[list[int], Tensor | None]:
    """How many of the newest columns belong to each sequence, and how to move them to the right.

    ``mask`` is what the model gives its attention: ``[B, 1, S, columns so far]``, boolean or
    additive, or ``[B, columns so far]``. Its last row must show all tokens seen; a new column that
    it hides is padding. The second result is ``[B, columns]`` int64, or None if all padding is on
    the left.
    """
    if mask is None:
        return [columns] * len(seen), None
    shown = mask[:, 0, -1] if mask.dim() == 4 else mask
    shown = (shown > -1 if shown.is_floating_point() else shown.bool()).expand(len(seen), -1)
    new = shown[:, -columns:].int()
    is_mixed = (new.diff() < 0).any(-1)
    num_new, num_shown, mixed = torch.stack([new.sum(-1), shown.sum(-1), is_mixed]).tolist()
    for b, (before, now, both) in enumerate(zip(seen, num_new, num_shown, strict=True)):
        if both != before + now:
            raise ValueError(
                f"attention_mask must show all tokens seen: sequence {b} has {before}, "
                f"and {both - now} are shown"
            )
    return num_new, new.argsort(stable=True) if any(mixed) else None


def align(x: Tensor, order: Tensor) -> Tensor:
    """``[B, H, columns, D]`` with the padding on the left."""
    return x.gather(2, order[:, None, :, None].expand(x.shape))


def restore(out: Tensor, order: Tensor) -> Tensor:
    """``[B, columns, H, D]`` as it was before :func:`align`."""
    return out.gather(1, order.argsort()[:, :, None, None].expand(out.shape))
