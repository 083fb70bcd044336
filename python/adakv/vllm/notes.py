"""What the scheduler's half knows of requests; without a line of vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from adakv.vllm.plan import Plan
from adakv.vllm.requests import Wishes


class Cut(NamedTuple):
    """An order that is being carried out."""

    at: int  # tokens before the step that does it
    boundary: int  # what a worker then writes down
    blocks: slice  # that come back
    changed: int  # first blocks that change
    is_text: bool = False


@dataclass
class Notes:
    """What the scheduler knows of a request that has blocks, or wants some."""

    prompt: int = 0
    admitted: int = 0  # tokens when it came, or came back
    boundary: int | None = None  # tokens when its prompt ended
    wishes: Wishes = field(default_factory=Wishes)
    planned: Plan | None = None  # what then becomes of its blocks; None: it stays whole
    gain: float = 0.0  # blocks that are on their way back to the pool
    at: int | None = None  # tokens before the step that compresses it
    is_asked: bool = False  # to be compressed in its next step
    cut: Cut | None = None
    chooses: bool = False  # from its text, once it is asked to
    due: int = 0  # tokens from which on it does; 0: it isn't asked yet
    last: int | None = None  # tokens before the step that did so last, or where its prompt ended

    @property
    def is_whole(self) -> bool:
        """Whether workers leave it as it is, whatever comes."""
        return self.planned is None and not self.chooses
