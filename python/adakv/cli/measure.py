"""One prompt, several caches: what each holds, how fast it is, and whether it says the same."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import adakv
from adakv.cli.inputs import check_prompt_length, refusals
from adakv.cli.progress import progress_bar
from adakv.eval.metrics import follow, same_start
from adakv.hf.attachment import CACHE

OnToken = Callable[[], None]
OnText = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """What one generation was made of."""

    title: str
    prompt_tokens: int
    tokens: list[int]  #: the new ones
    text: str
    prefill_seconds: float
    token_seconds: float  #: median of the decode steps; 0 if there were none
    cache_bytes: int
    full_bytes: int  #: of a cache that holds every entry
    kept: list[list[int]] = field(default_factory=list)  #: ``[L][Hkv]`` entries of the prompt
    same_choice: float | None = None  #: of the full cache's tokens, the share chosen here too
    same_start: int | None = None  #: tokens before the first that differs from the full cache's

    @property
    def tokens_per_second(self) -> float:
        """How fast the new tokens were written."""
        return 1 / self.token_seconds if self.token_seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}


class _Clock:
    """A streamer: ``generate`` calls ``put`` with the prompt, then with each new token."""

    def __init__(self, on_token: OnToken, text: Any = None) -> None:
        self.times: list[float] = []
        self._on_token, self._text = on_token, text

    def put(self, tokens: Tensor) -> None:
        self.times.append(time.perf_counter())
        self._on_token()
        if self._text is not None:
            self._text.put(tokens)

    def end(self) -> None:
        if self._text is not None:
            self._text.end()


def _text_streamer(tokenizer: Any, on_text: OnText) -> Any:
    """A streamer that hands over what is written, as soon as its characters are complete."""
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                on_text(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)


@dataclass(frozen=True)
class Setting:
    """What :class:`adakv.Cache` is made with."""

    policy: str | None  #: None: transformers' own cache and attention
    budget: int | None = None
    ratio: float | None = None
    budget_bytes: str | None = None
    kv_dtype: str | None = "auto"  #: None: what fits into the bytes
    decode_budget: int | None = None
    decode_policy: str | None = None
    every: int | None = None
    pin_prompt: bool = True
    read: str | None = None
    protect: tuple[tuple[int, int], ...] = ()  #: spans of tokens that stay of every prompt
    protect_tokens: tuple[str, ...] = ()  #: texts whose tokens stay, too
    protect_system: bool = False  #: whether a system prompt stays, too

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of :class:`adakv.Cache` and :func:`adakv.generate_stream`: not what is protected,
        and not what steps read, which is a cache's alone."""
        given = asdict(self)
        others = ("protect", "protect_tokens", "protect_system", "read")
        return {name: value for name, value in given.items() if name not in others}

    @property
    def title(self) -> str:
        """For people."""
        bits = "" if self.kv_dtype in (None, "auto") else f", {self.kv_dtype}"
        return f"{self.policy or 'full cache'}{bits}{', ' if self.read else ''}{self.read or ''}"

    def cache(self, model: Any) -> Any:
        """An empty cache; raises ``ValueError`` for settings out of range."""
        if self.policy is None:
            from transformers import DynamicCache

            return DynamicCache(config=model.config)
        return adakv.Cache(model, protect=self.protect, read=self.read, **self.arguments)


FULL = Setting(policy=None)


def run_all(
    model: Any,
    tokenizer: Any,
    prompt: Tensor,
    settings: list[Setting],
    new: int,
    *,
    on_text: OnText | None = None,
) -> list[Run]:
    """Runs each setting in turn; those after the full cache are compared with it.

    ``on_text`` is handed what the last one writes, piece by piece.
    """
    check_prompt_length(model, prompt.shape[1], new)
    with refusals():
        for setting in settings:
            setting.cache(model)  # what is wrong shows before the long work
    runs: list[Run] = []
    for setting in settings:
        with ExitStack() as bar, refusals():
            advance = bar.enter_context(progress_bar(setting.title, new + 1))
            streamer = None
            if on_text is not None and setting is settings[-1]:

                def show(piece: str, bar: ExitStack = bar) -> None:
                    bar.close()  # it would stand on the line that is written
                    on_text(piece)

                streamer = _text_streamer(tokenizer, show)
            clock = _Clock(advance, streamer)
            runs.append(run(model, tokenizer, prompt, setting, new=new, clock=clock))
        if settings[0] == FULL and len(runs) > 1:
            with progress_bar(f"{setting.title}: comparing") as advance, refusals():
                runs[-1] = compare(model, prompt, setting, run=runs[-1], full=runs[0])
                advance()
    return runs


def run_in_turn(
    model: Any, tokenizer: Any, prompt: Tensor, settings: list[Setting], new: int, *, rounds: int
) -> list[Run]:
    """Runs all settings so many times, in turn, after a warm-up with a short prompt; each has the
    medians of its times. Just ``new`` tokens are written."""
    check_prompt_length(model, prompt.shape[1], new)
    with refusals():
        for setting in settings:
            setting.cache(model)
    found: list[list[Run]] = [[] for _ in settings]
    for i in range(rounds + 1):
        for setting, runs in zip(settings, found, strict=True):
            title = f"{setting.title}: round {i} of {rounds}" if i else f"{setting.title}: warm-up"
            with progress_bar(title, new + 1) as advance, refusals():
                part, clock = prompt if i else prompt[:, :256], _Clock(advance)
                made = run(model, tokenizer, part, setting, new=new, clock=clock, least=new)
            if i:
                runs.append(made)
    return [
        replace(
            runs[0],
            prefill_seconds=statistics.median(run.prefill_seconds for run in runs),
            token_seconds=statistics.median(run.token_seconds for run in runs),
        )
        for runs in found
    ]


def run(
    model: Any,
    tokenizer: Any,
    prompt: Tensor,
    setting: Setting,
    *,
    new: int,
    clock: _Clock,
    least: int | None = None,
) -> Run:
    """Reads the prompt, ``[1, T]``, and writes up to ``new`` tokens greedily, and ``least`` even
    where the text has ended."""
    prompt = prompt.to(model.device)
    cache = setting.cache(model)
    with _attached(model, setting):
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            min_new_tokens=least,
            do_sample=False,
            streamer=clock,
            **{CACHE: cache},
        )
    tokens = output[0, prompt.shape[1] :].tolist()
    start, *times = clock.times
    held, full = cache_bytes(cache)
    return Run(
        title=setting.title + _found_bits(cache, setting),
        prompt_tokens=prompt.shape[1],
        tokens=tokens,
        text=str(tokenizer.decode(tokens, skip_special_tokens=True)).strip(),
        prefill_seconds=times[0] - start,
        token_seconds=statistics.median(b - a for a, b in pairwise(times)) if times[1:] else 0.0,
        cache_bytes=held,
        full_bytes=full,
        kept=_kept_of_prompt(cache, prompt.shape[1]),
    )


def compare(model: Any, prompt: Tensor, setting: Setting, *, run: Run, full: Run) -> Run:
    """``run`` with its agreement with ``full`` filled in.

    Given the same past, how often is the full cache's next token the first choice here too? For
    that the model reads the prompt once more and is then fed the full cache's answer, so that one
    early difference doesn't count again and again.
    """
    prompt = prompt.to(model.device)
    answer = torch.tensor(full.tokens, device=model.device)
    cache = setting.cache(model)
    with _attached(model, setting), torch.inference_mode():
        first = model(prompt, logits_to_keep=1, **{CACHE: cache}).logits[0]
        logits = torch.cat([first, follow(model, cache, answer)])
    same = logits[:-1].argmax(dim=-1) == answer
    return replace(
        run,
        same_choice=same.float().mean().item(),
        same_start=same_start(run.tokens, full.tokens),
    )


def _attached(model: Any, setting: Setting) -> AbstractContextManager[Any]:
    return nullcontext() if setting.policy is None else adakv.attach(model)


def cache_bytes(cache: Any) -> tuple[int, int]:
    """Bytes that a cache holds, and that a full one would."""
    if isinstance(cache, adakv.Cache):
        stats = cache.stats()
        return stats["bytes"], stats["full_bytes"]
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    return held, held


def _found_bits(cache: Any, setting: Setting) -> str:
    """For people: the format that fits into the bytes, if it was not given."""
    found = "auto" if setting.kv_dtype is not None else cache.stats()["kv_dtype"]
    return "" if found == "auto" else f", {found}"


def _kept_of_prompt(cache: Any, prompt_tokens: int) -> list[list[int]]:
    """``[L][Hkv]``: how many entries of the prompt each kv head still holds."""
    if not isinstance(cache, adakv.Cache):
        return []
    if cache.eviction.text is not None:  # of the text, and maybe of the prompt, some are gone
        layers = range(len(cache.stats()["lengths"]))
        return [[int((row < prompt_tokens).sum()) for row in cache.kept(i)[0]] for i in layers]
    new = cache.stats()["seen"][0] - prompt_tokens
    kept: list[list[int]] = (cache.stats()["lengths"][:, 0] - new).tolist()
    return kept
