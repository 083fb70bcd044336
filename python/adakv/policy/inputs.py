"""What a policy is handed of a layer, and what its parts check and mark with."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from adakv import ops
from adakv.errors import NOT_A_NUMBER, short, to_float, to_int
from adakv.step import Attention

_SHORTEST = 3  # letters by which a name is known

#: What a token may be of; :attr:`LayerInputs.classes` has their numbers.
CLASSES = ("text", "image", "audio", "instruction")


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """What one layer's prefill hands to a policy.

    Parameters
    ----------
    queries : ``[B, Hq, W, D]``
        Of the window, after RoPE: row w of sequence b is at position ``prompt_lens[b] - W + w``.
        ``[B, Hq, T, D]``, of all positions, if "all_queries" is in :attr:`Policy.needs`.
    keys, values : ``[B, Hkv, T, D]`` and ``[B, Hkv, T, Dv]``
        The prompt, keys after RoPE, padded at the end.
    w_o : ``[E, Hq * D]``, optional
        Weight of the output projection; read only if "w_o" is in :attr:`Policy.needs`.
    prompt_lens : tuple of int
        True length of each sequence, known to the host.
    layer, num_layers : int
    seq_lens : ``[B]`` int32, optional
        ``prompt_lens`` on the device; may be left out if all are T. ``[B, Hkv]`` where a text is
        chosen from again: what each kv head holds, of which ``prompt_lens`` are the most.
    attention : :class:`adakv.step.Attention`, optional
        Scale, softcap and sink logits of the model's attention; with ``rotate``, its RoPE, for
        policies that need it.
    lse : ``[B, Hq, T]`` float32, optional
        Log-sum-exp of each query's logits, beside the queries of all positions, if the model's
        attention handed it over. Saves a pass over queries and keys.
    repeat : tuple of ``[B, Hq, R, D]`` and ``[B, Hkv, R, D]``, optional
        Queries and keys, after RoPE, of R tokens right behind the prompt that repeat it; if
        "repeat" is in :attr:`Policy.needs`.
    protected : ``[B, T]`` bool, optional
        Entries that stay in every kv head whatever they score, besides the window. The budget must
        have room for them.
    positions : ``[B, Hkv, T]`` int32, optional
        Where the entries stand in their sequences, for a text that is chosen from again. Of a
        prompt entry t stands at t.
    carried : ``[B, Hkv, T, ...]`` float32, optional
        What a scorer that ``carries`` knew of the entries when the text was last chosen from, 0 of
        newer ones: the queries are all since then.
    budgets : tuple of int
        Mean entries per kv head that stay of each sequence in this layer, if "budget" is in
        :attr:`Policy.needs`.
    classes : ``[B, T]`` uint8, optional
        What each token is, the number of one of :data:`CLASSES`; if "classes" is in
        :attr:`Policy.needs`.
    hidden : ``[B, T, E]``, optional
        What the layer's attention is fed: hidden states of all positions, or of the new ones where
        a prompt is taken part by part; if "hidden" is in :attr:`Policy.needs`.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    w_o: Tensor | None
    prompt_lens: tuple[int, ...]
    layer: int
    num_layers: int
    seq_lens: Tensor | None = None
    attention: Attention = field(default_factory=Attention)
    lse: Tensor | None = None
    repeat: tuple[Tensor, Tensor] | None = None
    protected: Tensor | None = None
    positions: Tensor | None = None
    carried: Tensor | None = None
    budgets: tuple[int, ...] = ()
    classes: Tensor | None = None
    hidden: Tensor | None = None
    sequence_lens: Tensor | None = field(init=False, repr=False)
    """``seq_lens`` as verbs take them, ``[B]`` int32; None where kv heads differ in length: there
    scores of ``-inf`` say what isn't there."""
    _norms: dict[ops.Norm, Tensor] = field(default_factory=dict, init=False, repr=False)
    _candidates: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.keys.dim() != 4 or self.keys.shape[:3] != self.values.shape[:-1]:
            raise ValueError(
                "keys and values must be [B, Hkv, T, D] and [B, Hkv, T, Dv], "
                f"got {list(self.keys.shape)} and {list(self.values.shape)}"
            )
        batch, _, length, _ = self.keys.shape
        if len(self.prompt_lens) != batch:
            raise ValueError(
                f"prompt_lens must hold the length of each of the {batch} sequences, "
                f"got {len(self.prompt_lens)}"
            )
        if any(not 0 <= n <= length for n in self.prompt_lens):
            raise ValueError(f"prompt_lens must be in [0, {length}], got {self.prompt_lens}")
        if self.seq_lens is None and any(n != length for n in self.prompt_lens):
            raise ValueError(
                f"seq_lens must be given when prompts are shorter than T = {length}, "
                f"got prompt_lens {self.prompt_lens}"
            )
        for name, kind, dtype in (
            ("protected", "boolean", torch.bool),
            ("classes", "uint8", torch.uint8),
        ):
            given = getattr(self, name)
            if given is not None and (given.dtype != dtype or given.shape != (batch, length)):
                raise ValueError(
                    f"{name} must be {kind} [B, T] = {[batch, length]}, "
                    f"got {given.dtype} {list(given.shape)}"
                )
        hidden = self.hidden
        if hidden is not None and (hidden.dim() != 3 or len(hidden) != batch):
            raise ValueError(f"hidden must be [B, T, E] with B = {batch}, got {list(hidden.shape)}")
        is_ragged = self.seq_lens is not None and self.seq_lens.dim() == 2
        object.__setattr__(self, "sequence_lens", None if is_ragged else self.seq_lens)
        if not 0 <= self.layer < self.num_layers:
            raise ValueError(f"layer must be in [0, {self.num_layers}), got {self.layer}")

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """B, Hkv and T, the shape of scores."""
        batch, heads, length, _ = self.keys.shape
        return batch, heads, length

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.queries.device

    @cached_property
    def num_kv_heads(self) -> int:
        """Hkv."""
        return self.keys.shape[1]

    @cached_property
    def length(self) -> int:
        """T, the padded length of the prompts."""
        return self.keys.shape[2]

    @cached_property
    def logits(self) -> dict[str, Any]:
        """What :func:`adakv.ops.score` has to know of the model's attention."""
        of = self.attention
        return {"scale": of.scale, "softcap": of.softcap, "sink_logits": of.sink_logits}

    def norms(self, norm: ops.Norm = "l1") -> Tensor:
        """``[B, Hkv, T]`` float32, :func:`adakv.ops.value_norm`; computed when first asked for."""
        if norm not in self._norms:
            if self.w_o is None:
                raise ValueError("w_o must be given to a policy that weighs values, got None")
            norms = ops.value_norm(self.values, self.w_o, seq_lens=self.sequence_lens, norm=norm)
            if self.seq_lens is not self.sequence_lens:  # of what isn't there, -inf would count
                norms = norms.masked_fill(~self.candidates(0), 0)
            self._norms[norm] = norms
        return self._norms[norm]

    def is_of(self, *names: str) -> Tensor:
        """``[B, T]`` bool: which tokens are of one of some :data:`CLASSES`, and no padding."""
        if self.classes is None:
            raise ValueError("classes must be given to a policy that reads them, got None")
        found = torch.zeros_like(self.classes, dtype=torch.bool)
        for name in names:
            found |= self.classes == CLASSES.index(name)
        return found & self.candidates(0)[:, 0]

    def attended(self, count: int, *, gain: Tensor | None = None, **how: Any) -> Tensor:
        """``[B, Hkv, T]`` float32: :func:`adakv.ops.score` of the last ``count`` queries, over what
        each kv head holds.

        ``how`` are its options; each sequence's queries are multiplied by ``gain`` ``[B or 1]``
        before. Raises ``ValueError`` unless the queries are so many.
        """
        if self.queries.shape[2] != count:
            self.check_window(count)
        queries = self.queries if gain is None else scaled(self.queries, gain)
        if self.seq_lens is self.sequence_lens:
            return ops.score(queries, self.keys, seq_lens=self.seq_lens, **self.logits, **how)
        heads, sinks = self.num_kv_heads, self.attention.sink_logits
        queries = queries.view(len(queries), heads, -1, *queries.shape[2:])
        lens, logits = self.seq_lens, self.logits
        assert lens is not None
        if sinks is None:  # a row is as good as a sequence
            keys = self.keys.flatten(0, 1)[:, None]
            scores = ops.score(
                queries.flatten(0, 1), keys, seq_lens=lens.flatten(), **logits, **how
            )
            return scores.view(self.keys.shape[:3])
        of_heads = [
            ops.score(
                queries[:, h],
                self.keys[:, h : h + 1],
                seq_lens=lens[:, h].contiguous(),
                **{**logits, "sink_logits": sinks.view(heads, -1)[h]},
                **how,
            )
            for h in range(heads)
        ]
        return torch.cat(of_heads, 1)

    def check_window(self, window: int) -> None:
        """Raises ``ValueError`` unless the queries are the window's."""
        if self.queries.shape[2] != window:
            raise ValueError(
                f"queries must be those of the last {window} positions (the policy's window), "
                f"got {self.queries.shape[2]}"
            )

    def check_all_queries(self) -> None:
        """Raises ``ValueError`` unless there is a query for every position."""
        if self.queries.shape[2] != self.length:
            raise ValueError(
                f"queries must be those of all {self.length} positions, got {self.queries.shape[2]}"
            )

    def followed_by(
        self, queries: Tensor, keys: Tensor, values: Tensor | None = None
    ) -> LayerInputs:
        """A copy with R more tokens right behind what each kv head holds, and their queries.

        Queries are ``[B, Hq, R, D]``, keys and values ``[B, Hkv, R, D]``; without values the copy
        has none either.
        """
        count = keys.shape[2]
        places = self.ends[..., None] + torch.arange(count, device=self.device)

        def joined_with(before: Tensor, new: Tensor) -> Tensor:
            index = places[..., None].expand_as(new)
            return torch.cat([before, new], 2).scatter_(2, index, new)

        joined = joined_with(self.keys, keys)
        of_values = joined if values is None else joined_with(self.values, values)
        return LayerInputs(
            queries,
            joined,
            of_values,
            None,
            (joined.shape[2],) * len(keys),
            self.layer,
            self.num_layers,
            seq_lens=(self.ends + count).expand(keys.shape[:2]).contiguous(),
            attention=self.attention,
        )

    def without_queries(self) -> LayerInputs:
        """For later, when they have been scored."""
        return self._with(queries=self.queries[..., :0].clone(), lse=None, hidden=None)

    def without_entries(self) -> LayerInputs:
        """The same shape, lengths and norms, without keys, values and queries."""
        hollow = self.keys[..., :0].clone()
        entries = {"keys": hollow, "values": hollow}
        return self._with(queries=hollow, **entries, w_o=None, lse=None, hidden=None)

    def _with(self, **changes: Tensor | None) -> LayerInputs:
        changed = replace(self, **changes)  # type: ignore[arg-type]
        changed._norms.update(self._norms)
        return changed

    @property
    def ends(self) -> Tensor:
        """``[B or 1, Hkv or 1]``: how many entries there are, on the keys' device."""
        if self.seq_lens is not None:
            return self.seq_lens.view(len(self.seq_lens), -1)
        return torch.full((1, 1), self.length, dtype=torch.int32, device=self.queries.device)

    @property
    def seen(self) -> Tensor:
        """``[B or 1]``: tokens of each sequence, those that have left included."""
        if self.positions is None:
            return self.ends[:, 0]
        return self.positions[:, 0].gather(1, self.ends[:, :1].long() - 1)[:, 0] + 1

    def candidates(self, window: int) -> Tensor:
        """``[B or 1, Hkv or 1, T]`` bool: the entries that compete, not those of window and
        padding. Made once for each window, so it must not be changed."""
        if window not in self._candidates:
            positions = torch.arange(self.length, device=self.queries.device)
            if self.seq_lens is None:
                found = (positions < self.length - window)[None, None]
            else:
                found = positions < self.ends[:, :, None] - window
            self._candidates[window] = found
        return self._candidates[window]

    def mean(self, x: Tensor, window: int) -> Tensor:
        """``[B, Hkv, 1]``: the mean of ``x`` ``[B, Hkv, T]`` over the candidates of each row."""
        if self.seq_lens is None:
            count = max(self.length - window, 0)
            return x[..., :count].sum(-1, keepdim=True) / max(count, 1)
        candidates = self.candidates(window)
        total = x.masked_fill(~candidates, 0).sum(-1, keepdim=True)
        return total / candidates.sum(-1, keepdim=True).clamp(min=1)

    def fill_others(self, x: Tensor, window: int, value: float) -> Tensor:
        """``x`` ``[B, Hkv, T]``, changed in place: what is no candidate has a value."""
        if self.seq_lens is None:
            x[..., max(self.length - window, 0) :].fill_(value)
            return x
        return x.masked_fill_(~self.candidates(window), value)

    def pin_protected(self, scores: Tensor) -> Tensor:
        """``scores``, or a copy with ``+inf`` for what is protected, if anything is."""
        if self.protected is None:
            return scores
        return scores.masked_fill(self.protected[:, None], torch.inf)

    def pin_window(self, scores: Tensor, window: int) -> Tensor:
        """A copy of ``scores`` with ``+inf`` in the window, where it competes and always wins."""
        in_window = self.candidates(0) & ~self.candidates(window)
        return scores.masked_fill(in_window, torch.inf)


def scaled(queries: Tensor, gain: Tensor) -> Tensor:
    """Queries ``[B, Hq, W, D]`` times the ``gain`` ``[B or 1]`` of their sequence."""
    return (queries * gain.view(-1, 1, 1, 1)).to(queries.dtype)


def check_settings(part: Any) -> None:
    """Checks a part's settings by the types that its dataclass declares.

    Integers, those of numpy too, become ``int`` and numbers ``float``, so that ``1`` may stand for
    ``1.0``. Raises ``ValueError`` with the setting's name for what is something else.
    """
    for setting in fields(part):
        kind, value = str(setting.type), getattr(part, setting.name)
        if kind in _CONVERSIONS and not (value is None and setting.default is None):
            convert, expected = _CONVERSIONS[kind]
            try:
                value = convert(value)
            except NOT_A_NUMBER:
                raise ValueError(f"{setting.name} must be {expected}, got {short(value)}") from None
            object.__setattr__(part, setting.name, value)
        elif kind in _METHODS and not callable(getattr(value, _METHODS[kind], None)):
            raise ValueError(
                f"{setting.name} must be a {kind}, with a method {_METHODS[kind]}, "
                f"got {short(value)}"
            )


def check_scorer(scorer: Any) -> None:
    """:func:`check_settings` of a scorer, with the window and the pinned entries that it has."""
    check_settings(scorer)
    check_range("window", scorer.window, 1)
    check_range("pinned", scorer.pinned, 0)


def _to_int32(value: Any) -> int:
    converted = to_int(value)
    if not -(2**31) <= converted < 2**31:
        raise ValueError
    return converted


def _to_bool(value: Any) -> bool:
    if type(value).__name__ not in ("bool", "bool_"):  # of Python or numpy
        raise ValueError
    return bool(value)


_CONVERSIONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "int": (_to_int32, "an integer of 32 bits"),
    "float": (to_float, "a number"),
    "float | None": (to_float, "a number or None"),
    "bool": (_to_bool, "True or False"),
}
_METHODS = {
    "LayerSchedule": "budget",
    "Allocator": "allocate",
    "Scorer": "score",
    "Selector": "select",
}


def check_at_most(name: str, value: float, most: float) -> None:
    """Raises ``ValueError`` if ``value`` would take more memory or time than any use is worth."""
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises ``ValueError`` unless ``low <= value <= high`` and finite."""
    if not low <= value <= high or math.isinf(value):
        allowed = f"in [{low}, {high}]" if high < math.inf else f"at least {low}"
        allowed += " and finite" if value == math.inf == high else ""
        raise ValueError(f"{name} must be {allowed}, got {value}")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises ``ValueError`` unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(choices)}; got {short(value)}"
            + did_you_mean(value, choices)
        )


def did_you_mean(value: Any, choices: Iterable[str]) -> str:
    """``: did you mean 'this'?`` if a choice looks like the value, else nothing."""
    near = nearest(value, choices) if isinstance(value, str) else None
    return f": did you mean {near!r}?" if near else ""


def nearest(value: str, choices: Iterable[str]) -> str | None:
    """The first choice that begins with a value, if it isn't very short, or else the most alike."""
    choices = tuple(choices)
    longer = [x for x in choices if x.startswith(value) and len(value) >= _SHORTEST]
    return next(iter(longer or difflib.get_close_matches(value, choices, 1)), None)


def pin_first(scores: Tensor, count: int) -> Tensor:
    """``scores``, changed in place: the first ``count`` entries of every row are ``+inf``."""
    if count:
        scores[..., :count].fill_(torch.inf)
    return scores
