"""Masks: who has how many of the new tokens, and how they are brought together on the right.

adakv reads padding from a model's mask and attends causally. Any other mask is an error: trees,
blocks that look ahead, biases, masks that differ between heads or cut a text in pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_HIDDEN = -1e4  # what an additive mask gives entries that must not be seen, or less
_BLOCK = 1 << 24  # elements of a mask that are looked at in one go


class Padding:
    """Which columns hold tokens of each sequence, as the masks so far had it."""

    def __init__(self) -> None:
        self.order: Tensor | None = None
        """``[B, columns]`` int64 that puts padding of the newest columns in front (:func:`align`),
        or None if it is there."""
        self.shown: Tensor | None = None
        """``[B, n]`` bool: which columns the newest mask shows; later ones are all shown."""

    def count(
        self, mask: Tensor | None, seen: Sequence[int], before: int, columns: int, *, prompt: bool
    ) -> list[int]:
        """How many of the newest columns belong to each sequence.

        Parameters
        ----------
        mask
            What the model gives its attention: ``[B, 1, columns, before + columns]``, boolean or
            additive, or ``[B, before + columns]``; or None, which shows everything. A new column
            that the last row hides is padding.
        seen : ints
            Tokens of each sequence in the ``before`` columns.
        prompt : bool
            Tokens may also see later ones, as those of an image do: their attention is the
            model's own.

        Raises
        ------
        ValueError
            If the mask hides tokens seen, or isn't causal. Nothing changes.
        """
        if mask is None:
            self.order = None
            return [columns] * len(seen)
        total = before + columns
        if mask.dim() not in (2, 4) or mask.shape[-1] < total:
            raise ValueError(
                f"attention_mask must be [B, {total}] or [B, 1, {columns}, {total}], "
                f"got {list(mask.shape)}"
            )
        mask = mask[..., :total]
        shown = (mask.bool() if mask.dim() == 2 else _shows(mask[:, 0, -1])).expand(len(seen), -1)
        new = shown[:, before:].int()
        known, is_other = 0, torch.zeros_like(shown[:, 0])
        if self.shown is not None and before:
            earlier = self.shown[:, :before]  # without what a refused forward showed
            known, is_other = earlier.shape[1], (shown[:, : earlier.shape[1]] != earlier).any(-1)
        facts = [
            new.sum(-1),
            shown.sum(-1),
            (new.diff() < 0).any(-1),
            is_other | ~shown[:, known:before].all(-1),
            _is_wrong(mask, shown, before, prompt) if mask.dim() == 4 else is_other,
        ]
        num_new, num_shown, is_mixed, hides, is_wrong = torch.stack(facts).tolist()  # waits
        for b, (had, now, both) in enumerate(zip(seen, num_new, num_shown, strict=True)):
            if is_wrong[b]:
                raise ValueError(
                    f"attention_mask of sequence {b} must be causal beside padding: "
                    f"{_PROMPTS if prompt else _STEPS} are not supported"
                )
            if both != had + now or hides[b]:
                raise ValueError(
                    f"attention_mask must show all tokens seen: sequence {b} has {had}, "
                    f"and {both - now} are shown; what was given without a mask, or after the end "
                    "of a text, can't be hidden later"
                )
        self.order = new.argsort(stable=True) if any(is_mixed) else None
        self.shown = shown.clone()
        return [int(n) for n in num_new]

    def count_step(
        self,
        mask: Tensor | None,
        seen: Sequence[int],
        before: int,
        columns: int,
        *,
        is_chunk: bool,
    ) -> list[int]:
        """:meth:`count` of a step. For a chunk a mask ``[B, 1, columns, columns]`` will do, which
        shows all tokens seen."""
        if not is_chunk or mask is None or mask.dim() != 4 or mask.shape[-1] != columns:
            return self.count(mask, seen, before, columns, prompt=False)
        newest = Padding()
        num_new = newest.count(mask, [0] * len(seen), 0, columns, prompt=False)
        assert newest.shown is not None
        shown = newest.shown.new_ones(len(seen), before)
        if self.shown is not None:
            earlier = self.shown[:, :before]
            shown[:, : earlier.shape[1]] = earlier
        self.order, self.shown = newest.order, torch.cat([shown, newest.shown], 1)
        return num_new

    def tokens_in_last(self, count: int, columns: int, batch: int) -> list[int]:
        """How many tokens of each sequence are in the last ``count`` of ``columns`` columns."""
        if self.shown is None:
            return [count] * batch
        known = self.shown[:, :columns]
        padding = (~known[:, columns - count :]).sum(-1)
        return [count - int(n) for n in padding.tolist()]

    def of_branches(self, sources: Sequence[int], columns: int | None) -> Padding:
        """The same for the sequences ``sources``, in the first columns or in all."""
        branches = Padding()
        if self.shown is not None:
            branches.shown = self.shown[list(sources), :columns]
        return branches


_PROMPTS = "several texts in one sequence, biases and masks that differ between heads"
_STEPS = "trees, blocks that look ahead, biases and masks that differ between heads"


def _shows(mask: Tensor) -> Tensor:
    """What a mask with queries shows."""
    return mask == 0 if mask.is_floating_point() else mask.bool()


def _is_wrong(mask: Tensor, shown: Tensor, before: int, prompt: bool) -> Tensor:
    """``[B]`` bool: whether a mask ``[B, H, S, columns]`` is another one than a causal one over
    ``shown`` ``[B, columns]``."""
    batch, total = shown.shape
    wrong = torch.zeros(batch, dtype=torch.bool, device=mask.device)
    mask = mask.expand(batch, -1, total - before, -1)
    columns = torch.arange(total, device=mask.device)
    step = max(_BLOCK // mask[:, :, 0].numel(), 1)
    for start in range(before, total, step):
        rows = columns[start : start + step, None]  # [n, 1]
        block = mask[:, :, start - before : start - before + step]  # [B, H, n, columns]
        shows = _shows(block)
        if mask.is_floating_point():
            wrong |= ~(shows | (block <= _HIDDEN)).flatten(1).all(-1)
        causal = shown[:, None, None, :] & (columns <= rows)
        more = shows & ~(shown[:, None, None, :] if prompt else causal)
        of_token = shown[:, start : start + step][:, None, :, None]
        # Padding may see anything but itself: then it is no padding.
        wrong |= ((more | causal & ~shows) & of_token).flatten(1).any(-1)
        wrong |= (shows & ~of_token & (columns == rows)).flatten(1).any(-1)
    return wrong


def align(x: Tensor, order: Tensor) -> Tensor:
    """``[B, H, columns, D]`` with the padding on the left."""
    return x.gather(2, order.to(x.device)[:, None, :, None].expand(x.shape))


def restore(out: Tensor, order: Tensor) -> Tensor:
    """``[B, columns, H, D]`` as it was before :func:`align`."""
    return out.gather(1, order.to(out.device).argsort()[:, :, None, None].expand(out.shape))
