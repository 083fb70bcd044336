"""What must stay of a prompt, as options: spans, tokens by their text, and what a chat template
says first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import takewhile
from typing import Any

import click

from adakv.cli.inputs import InputError
from adakv.cli.measure import Setting
from adakv.eval.chat import encode_messages

Span = tuple[int, int]


class _Span(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.5
    """Tokens of a prompt."""

    name = "span"

    def convert(self, value: Any, param: Any, context: Any) -> Span:
        begin, _, end = str(value).partition(":")
        if not (begin.isdecimal() and end.isdecimal() and int(begin) < int(end)):
            self.fail(f"{value!a} must be BEGIN:END, two numbers of tokens", param, context)
        return int(begin), int(end)


class _Text(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """What tokens are known by."""

    name = "text"

    def convert(self, value: Any, param: Any, context: Any) -> str:
        if not value:
            self.fail("a text must not be empty", param, context)
        return str(value).replace(r"\n", "\n").replace(r"\t", "\t")


protect_option = click.option(
    "--protect",
    type=_Span(),
    metavar="BEGIN:END",
    multiple=True,
    help="Keep these tokens of every prompt, whatever they score; may be given many times.",
)
protect_tokens_option = click.option(
    "--protect-tokens",
    type=_Text(),
    metavar="TEXT",
    multiple=True,
    help=r"Keep every token of a prompt that has this text in it, such as \n or <ANCHOR>; may be "
    "given many times.",
)


def protect_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of what must stay, for its argument ``setting``."""

    @functools.wraps(command)
    def with_protection(
        *,
        setting: Setting,
        protect: tuple[Span, ...],
        protect_tokens: tuple[str, ...],
        protect_system: bool,
        **rest: Any,
    ) -> None:
        setting = replace(setting, protect=protect, protect_tokens=protect_tokens)
        command(setting=replace(setting, protect_system=protect_system), **rest)

    system_help = "Keep all tokens that the chat template has before the user's first word."
    for option in (
        click.option("--protect-system", is_flag=True, help=system_help),
        protect_tokens_option,
        protect_option,
    ):
        with_protection = option(with_protection)
    return with_protection


def tokens_with(
    tokenizer: Any, texts: Iterable[str], prompts: Iterable[Iterable[int]]
) -> list[int]:
    """The ids of all tokens of some prompts that have one of the texts in them."""
    wanted = tuple(texts)
    if not wanted:
        return []
    ids = sorted({token for prompt in prompts for token in prompt})
    shown = ((token, tokenizer.decode([token])) for token in ids)
    return [token for token, text in shown if any(x in text for x in wanted)]


def system_spans(tokenizer: Any, messages: list[dict[str, Any]]) -> list[Span]:
    """Tokens before the user's first one: a system prompt, and what the template puts there.

    It is what the conversation has in common with others of which only that message is different.
    """
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise InputError(f"--protect-system: there is no message of a user, but of {roles}")
    first = roles.index("user")
    before = encode_messages(tokenizer, messages)[0].tolist()
    for other in ("0", "x"):  # one of the two begins otherwise than the message
        changed = [*messages]
        changed[first] = {**messages[first], "content": other}
        pairs = zip(before, encode_messages(tokenizer, changed)[0].tolist(), strict=False)
        before = [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return [(0, len(before))] if before else []
