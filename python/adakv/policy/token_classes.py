"""Which tokens of a prompt are of an image, of a sound or of an instruction: given, and marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adakv.errors import short
from adakv.policy.budget import Budget
from adakv.policy.inputs import CLASSES, check_choice
from adakv.policy.protection import Protection, Spans, check_room, joined


@dataclass(frozen=True)
class TokenClasses:
    """What the tokens of prompts are; those that are of no class are text. Made by :meth:`given`.

    Empty if nobody said: a policy that reads classes is then refused.
    """

    where: tuple[tuple[str, Protection], ...] = ()

    @classmethod
    def given(cls, classes: Any) -> TokenClasses:
        """From what users give.

        Parameters
        ----------
        classes : None, or a dict
            ``{"image": [(3, 19)]}``: by the name of a class, ``"image"``, ``"audio"`` or
            ``"instruction"``, what :meth:`Protection.given` takes. No token may be of two.

        Raises
        ------
        ValueError
            If it is anything else.
        """
        if classes is None:
            return cls()
        if not isinstance(classes, Mapping):
            raise ValueError(
                f"classes must be a dict of spans by class, such as {{'image': [(3, 19)]}}, "
                f"got {short(classes)}"
            )
        for name in classes:
            check_choice("classes: each", name, CLASSES[1:])
        where = ((x, Protection.given(y, f"classes[{x!r}]")) for x, y in classes.items())
        return cls(tuple(where))

    def __bool__(self) -> bool:
        """Whether anything was given."""
        return bool(self.where)

    def spans(self, lengths: Sequence[int]) -> dict[str, list[Spans]]:
        """Those of each class in prompts of such lengths; raises ``ValueError`` if they are given
        for other prompts, or if a token is of two classes."""
        found = {name: marked.spans(lengths) for name, marked in self.where}
        for index, of_all in enumerate(zip(*found.values(), strict=True)):
            spans = [span for of_class in of_all for span in of_class]
            if _count(spans) > _count(joined(spans, lengths[index])):
                raise ValueError(f"classes: a token of sequence {index} is of two of them")
        return found

    def of_one(self, index: int) -> TokenClasses:
        """Those of one of the sequences."""
        return TokenClasses(tuple((name, marked.of_one(index)) for name, marked in self.where))

    def check(
        self,
        budget: Budget,
        lengths: Sequence[int],
        num_layers: int,
        protected: Sequence[Spans],
        *,
        name: str = "sequence {}",
    ) -> None:
        """Raises ``ValueError`` if a policy reads classes and there are none, or if it evicts those
        of one class alone and what else there is, and what is protected, has no room."""
        policy = budget.policy
        if "classes" not in policy.needs:
            return
        if not self:
            raise ValueError(
                f"classes must be given to a policy that reads them ({policy.scorer!r}): "
                "classes=adakv.classes_of(model, inputs), or spans as {'image': [(3, 19)]}"
            )
        found = self.spans(lengths)
        only: str | None = getattr(policy.scorer, "evicts", None)
        if only is None:
            return
        for index, (length, stays) in enumerate(zip(lengths, protected, strict=True)):
            leaves = found[only][index] if only in found else ()
            others = _rest(leaves, length)
            said = (
                f"classes: {name.format(index)} has {_count(others)} tokens that are not of class "
                f"{only!r}, which alone the policy evicts"
            )
            check_room(budget, joined((*others, *stays), length), length, num_layers, said)

    def numbers(
        self, lengths: Sequence[int], sequences: slice, columns: int, device: torch.device
    ) -> Tensor:
        """``[b, columns]`` uint8 as :attr:`adakv.policy.LayerInputs.classes`, of some of the
        sequences, which may not be complete."""
        rows = range(len(lengths))[sequences]
        numbers = torch.zeros(len(rows), columns, dtype=torch.uint8)
        for name, given in self.where:
            marked = given.marked * len(lengths) if given.is_common else given.marked
            for row, index in enumerate(rows if marked else ()):
                for begin, end in joined(marked[index].spans, lengths[index]):
                    numbers[row, begin:end] = CLASSES.index(name)
        return numbers.to(device, non_blocking=True)


def _rest(spans: Spans, length: int) -> Spans:
    """What of a prompt is not in the spans, which are in order and apart from each other."""
    edges = [0, *(edge for span in spans for edge in span), length]
    return tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)


def _count(spans: Sequence[tuple[int, int]]) -> int:
    return sum(end - begin for begin, end in spans)
