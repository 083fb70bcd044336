"""What must stay of prompts, whatever it scores: given as spans or masks, counted, and marked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adakv.errors import NOT_A_NUMBER, integer, short, to_int
from adakv.policy.budget import Budget

Spans = tuple[tuple[int, int], ...]  # (begin, end), of a prompt's own tokens

_FORM = (
    "must be spans [(begin, end), ...] of tokens, with 0 <= begin < end, or a boolean mask "
    "[T], for all sequences; or a list with one of these for each, or a mask [B, T]"
)


class _Marked(NamedTuple):
    """What must stay of one prompt."""

    spans: Spans
    length: int | None = None  # of the mask that says so


@dataclass(frozen=True)
class Protection:
    """What must stay of prompts, in all kv heads of all layers; made by :meth:`given`."""

    marked: tuple[_Marked, ...] = ()  #: one for each sequence, or one for all
    is_common: bool = True
    name: str = "protect"  #: for messages

    @classmethod
    def given(cls, protect: Any, name: str = "protect") -> Protection:
        """From what users give, as the parameter of that name.

        Parameters
        ----------
        protect : None, spans, a mask, or a list of them
            Spans ``[(begin, end), ...]`` count a sequence's own tokens from 0, padding left out;
            what is behind the end of a prompt is ignored. A boolean mask, of torch or numpy, is as
            long as the prompt. ``[T]`` is for all sequences, ``[B, T]`` has a row for each, and a
            list has spans, a mask ``[T]`` or None for each.

        Raises
        ------
        ValueError
            If it is anything else.
        """
        if protect is None:
            return cls(name=name)
        if _is_mask(protect):
            mask = torch.as_tensor(protect).cpu()
            if mask.dim() == 2:
                return cls(tuple(_of_mask(name, x) for x in mask), is_common=False, name=name)
            return cls((_of_mask(name, mask),), name=name)
        if isinstance(protect, (list, tuple)):
            if all(map(_is_span, protect)):
                return cls((_of_spans(name, protect),) if protect else (), name=name)
            marked = tuple(_of_sequence(name, x) for x in protect)
            return cls(marked, is_common=False, name=name)
        raise ValueError(f"{name} {_FORM}; got {short(protect)}")

    @classmethod
    def of_prompts(
        cls, protect: Any, token_ids: Iterable[int], prompts: Sequence[Tensor]
    ) -> Protection:
        """What is given for some prompts ``[T]``, and where ``token_ids`` stand in each."""
        spans = cls.given(protect).spans([len(prompt) for prompt in prompts])
        token_ids = _token_ids("protect_tokens", token_ids)
        marked = tuple(
            _of_spans("protect", [*of_prompt, *spans_of(prompt, token_ids)])
            for of_prompt, prompt in zip(spans, prompts, strict=True)
        )
        return cls(marked, is_common=False)

    def of_one(self, index: int) -> Protection:
        """What must stay of one of the sequences."""
        return self if self.is_common else Protection((self.marked[index],))

    def __bool__(self) -> bool:
        """Whether anything must stay."""
        return any(one.spans for one in self.marked)

    def spans(self, lengths: Sequence[int]) -> list[Spans]:
        """Those of prompts of such lengths, in order and apart from each other, as far as each
        prompt reaches. Raises ``ValueError`` if they are given for other prompts."""
        if not self.marked:
            return [()] * len(lengths)
        marked = self.marked * len(lengths) if self.is_common else self.marked
        if len(marked) != len(lengths):
            raise ValueError(
                f"{self.name} must have one list or row for each of {len(lengths)} sequences, "
                f"got {len(marked)}"
            )
        for index, (one, length) in enumerate(zip(marked, lengths, strict=True)):
            if one.length not in (None, length):
                raise ValueError(
                    f"{self.name}: a mask must count a sequence's own tokens, without padding: "
                    f"sequence {index} has {length}, and its mask {one.length}"
                )
        return [joined(one.spans, n) for one, n in zip(marked, lengths, strict=True)]

    def check(
        self,
        budget: Budget,
        lengths: Sequence[int],
        num_layers: int,
        *,
        name: str = "sequence {}",
    ) -> None:
        """Raises ``ValueError`` if it doesn't go with prompts of such lengths: it is for others, or
        more must stay than a budget holds."""
        for index, (spans, length) in enumerate(zip(self.spans(lengths), lengths, strict=True)):
            if spans:
                protected = sum(end - begin for begin, end in spans)
                said = f"protect: {name.format(index)} has {protected} protected tokens"
                check_room(budget, spans, length, num_layers, said)


def spans_of(
    input_ids: Tensor | Sequence[int],
    token_ids: Iterable[int],
    attention_mask: Tensor | None = None,
) -> list[Any]:
    """Where some tokens stand in prompts: for ``protect=``, so that say all newlines stay.

    Parameters
    ----------
    input_ids : ``[T]`` or ``[B, T]`` integers
    token_ids : ints
        Which tokens.
    attention_mask : of the same shape, optional
        0 for padding, which doesn't count. Give it wherever there is any.

    Returns
    -------
    spans : list of (begin, end)
        From ``[B, T]`` one such list for each sequence.
    """
    ids = _integers(input_ids)
    if ids is None or ids.dim() not in (1, 2):
        raise ValueError(f"input_ids must be integers [T] or [B, T], got {short(input_ids)}")
    shown = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu()
    if shown.shape != ids.shape:
        raise ValueError(
            f"attention_mask must be {list(ids.shape)} as input_ids, got {list(shown.shape)}"
        )
    wanted = torch.isin(ids, torch.tensor(_token_ids("token_ids", token_ids), dtype=torch.int64))
    if ids.dim() == 1:
        return list(_of_mask("", wanted[shown.bool()]).spans)
    return [list(_of_mask("", x[y.bool()]).spans) for x, y in zip(wanted, shown, strict=True)]


def mask_of(spans: Sequence[Spans], length: int, device: torch.device) -> Tensor:
    """``[B, length]`` bool: as :attr:`adakv.policy.LayerInputs.protected`."""
    mask = torch.zeros(len(spans), length, dtype=torch.bool)
    for row, of_row in zip(mask, spans, strict=True):
        for begin, end in of_row:
            row[begin:end] = True
    return mask.to(device, non_blocking=True)


def check_room(budget: Budget, spans: Spans, prompt_len: int, num_layers: int, said: str) -> None:
    """Raises ``ValueError`` if not every head of every layer has room for what must stay; ``said``
    is what the message begins with."""
    policy = budget.policy
    window, pinned = policy.window, policy.scorer.pinned
    end = max(prompt_len - window, 0)  # of the candidates
    count = sum(last - first for first, last in joined(((0, pinned), *spans), end))
    if count == min(pinned, end):
        return
    layers = budget.of_layers(prompt_len, num_kv_heads=1, num_layers=num_layers)
    for layer, given in enumerate(layers):
        if given.keeps_everything:
            continue
        least = getattr(policy.allocator, "least", None)
        where = {"window": window, "prompt_len": prompt_len, "layer": layer, "pinned": count}
        room = given.mean if least is None else least(given.mean, **where)
        if window + count > room:
            first = f" and {pinned} pinned ones" if pinned else ""
            raise ValueError(
                f"{said}; with the policy's window of "
                f"{window} entries{first} {window + count} must stay in every kv head, and one of "
                f"layer {layer} has room for {room}: protect less, or give a larger budget"
            )


def _integers(given: Any) -> Tensor | None:
    try:
        found = torch.as_tensor(given).cpu()
    except NOT_A_NUMBER:
        return None
    return None if found.is_floating_point() or found.dtype == torch.bool else found


def _token_ids(name: str, given: Iterable[int]) -> list[int]:
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise ValueError(f"{name} must be a list of token ids, got {short(given)}")
    return [integer(name, token, 0) for token in given]


def _is_mask(given: Any) -> bool:
    return str(getattr(given, "dtype", "")).endswith("bool")


def _is_span(given: Any) -> bool:
    if not isinstance(given, (list, tuple)) or len(given) != 2:
        return False
    try:
        return all(to_int(end) is not None for end in given)
    except NOT_A_NUMBER:
        return False


def _of_sequence(name: str, given: Any) -> _Marked:
    """What was given for one of the sequences."""
    if given is None:
        return _Marked(())
    if _is_mask(given):
        return _of_mask(name, torch.as_tensor(given).cpu())
    if isinstance(given, (list, tuple)) and all(map(_is_span, given)):
        return _of_spans(name, given)
    raise ValueError(f"{name} {_FORM}; got {short(given)} in the list")


def _of_spans(name: str, given: Iterable[Sequence[int]]) -> _Marked:
    spans = tuple((to_int(begin), to_int(end)) for begin, end in given)
    for begin, end in spans:
        if not 0 <= begin < end:
            raise ValueError(f"{name} {_FORM}; got ({begin}, {end})")
    return _Marked(spans)


def _of_mask(name: str, mask: Tensor) -> _Marked:
    if mask.dim() != 1:
        raise ValueError(f"{name} {_FORM}; got a mask {list(mask.shape)}")
    edges = torch.nn.functional.pad(mask.int(), (1, 1)).diff()
    begins, ends = (torch.nonzero(edges == edge).flatten().tolist() for edge in (1, -1))
    return _Marked(tuple(zip(begins, ends, strict=True)), len(mask))


def joined(spans: Iterable[tuple[int, int]], end: int) -> Spans:
    """In order and apart from each other, as far as ``end``."""
    found: list[tuple[int, int]] = []
    for first, last in sorted((begin, min(last, end)) for begin, last in spans):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], last)
        elif first < last:
            found.append((first, last))
    return tuple(found)
