"""When texts of a batch are over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from adakv.errors import integer, short
from adakv.hf.prompts import is_one

End = Literal["eos", "stop_string", "length"]


class Stop:
    """When a text is over."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        eos: int | Sequence[int] | None,
        strings: str | Sequence[str],
    ) -> None:
        if eos is None and model.generation_config is not None:
            eos = model.generation_config.eos_token_id
        eos = () if eos is None else eos
        tokens = list(eos) if isinstance(eos, Iterable) and not is_one(eos) else [eos]
        self._eos = {integer("eos_token_id", token, 0) for token in tokens}
        self._strings = [strings] if isinstance(strings, str) else list(strings)
        for string in self._strings:
            if not isinstance(string, str):
                raise ValueError(f"stop_strings must be strings, got {short(string)}")
        if "" in self._strings:
            raise ValueError("stop_strings must not be empty")
        if self._strings and tokenizer is None:
            raise ValueError("stop_strings need a tokenizer")
        self._tokenizer = tokenizer
        # Every token but special ones is a byte at least; the first may lose a space.
        self._tail = max((len(string.encode()) for string in self._strings), default=0) + 1

    def end(self, tokens: list[int], max_new_tokens: int) -> End | None:
        """Why a text is over, if it is, after its newest token."""
        if tokens[-1] in self._eos:
            return "eos"
        if self._strings:
            tail = self._tokenizer.decode(tokens[-self._tail :])
            if any(string in tail for string in self._strings):
                return "stop_string"
        return "length" if len(tokens) == max_new_tokens else None

    def text(self, tokens: list[int]) -> str | None:
        """The text that tokens make, if there is a tokenizer."""
        if self._tokenizer is None:
            return None
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))
