"""Files become items: questions in SQuAD's layout, plain text, needles hidden in any text.

Prompts hold up to ``tokens`` tokens of text, to which a chat template adds its own. ``aware`` says
whether the question belongs to the prompt that is compressed, where the policy's window sees it, or
comes after it. If it belongs to it, its last token is kept back and read from the compressed cache,
so that every token of the answer depends on what was kept.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from adakv.eval.files import parse_json, read_text
from adakv.eval.metrics import Item

ADJECTIVES = ("amber", "brave", "clever", "frozen", "gentle", "hidden", "jolly", "mellow")
NOUNS = ("anchor", "bridge", "candle", "desert", "engine", "falcon", "garden", "lantern")
NAMES = ("Alice", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo")
BRIEFLY = "Answer in a few words taken from the text."


@dataclass(frozen=True)
class Size:
    """How much of a file is used.

    Parameters
    ----------
    tokens : int
        Of the text in a prompt.
    prompts : int
        Spread evenly over the file.
    per_prompt : int
        Questions about each prompt, or needles in it.
    """

    tokens: int
    prompts: int
    per_prompt: int

    def __post_init__(self) -> None:
        for name, least in (("tokens", 64), ("prompts", 1), ("per_prompt", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


class Frame:
    """The words around a text and a question about it: the tokenizer's chat template, if any."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._has_template = bool(tokenizer.chat_template)
        text, question = "<the text>", "<the question>"
        if self._has_template:
            message = [{"role": "user", "content": f"{text}\n\n{question}"}]
            whole = tokenizer.apply_chat_template(
                message, tokenize=False, add_generation_prompt=True
            )
        else:
            whole = f"{text}\n\nQuestion: {question}\nAnswer:"
        parts = re.split(f"{re.escape(text)}|{re.escape(question)}", whole)
        if len(parts) != 3:
            raise ValueError("tokenizer: its chat template doesn't repeat a message as it is")
        self._before, self._between, self._after = parts

    def item(
        self, name: str, text: str, question: str, answer: str, *, given: str = "", aware: bool
    ) -> Item:
        """An item named group.number; ``given`` is a beginning of the answer, not compared."""
        compared = answer
        if not self._has_template or given:
            compared = f" {compared}"
        if given and not self._has_template:
            given = f" {given}"
        prompt = self._encode(self._before + text, is_start=True)
        query = self._encode(f"{self._between}{question}{self._after}{given}")
        if aware:
            whole = prompt + query
            prompt, query = whole[:-1], whole[-1:]
        return Item(name, name.partition(".")[0], prompt, query, self._encode(compared))

    def _encode(self, text: str, *, is_start: bool = False) -> tuple[int, ...]:
        special = is_start and not self._has_template  # a template brings its own
        return tuple(self._tokenizer(text, add_special_tokens=special)["input_ids"])


def questions(path: str, tokenizer: Any, size: Size, *, aware: bool) -> list[Item]:
    """Questions about prompts made of consecutive paragraphs of a file in SQuAD's layout.

    ``{"data": [{"paragraphs": [{"context": str, "qas": [{"question": str, "answers": [{"text":
    str}]}]}]}]}`` (https://rajpurkar.github.io/SQuAD-explorer/). Of each prompt ``per_prompt``
    paragraphs, evenly spread, give their first question that has an answer.
    """
    frame = Frame(tokenizer)
    groups = list(_grouped(_paragraphs(path), tokenizer, size))
    if len(groups) < size.prompts:
        raise ValueError(
            f"{path} holds {len(groups)} prompts of {size.tokens} tokens with {size.per_prompt} "
            f"questions each, but {size.prompts} are asked for"
        )
    items = []
    for i, group in enumerate(_spread(groups, size.prompts)):
        text = "\n\n".join(context for context, _ in group)
        asked = [pair for _, pairs in group for pair in pairs[:1]]
        for j, (question, answer) in enumerate(_spread(asked, size.per_prompt)):
            question = f"{question} {BRIEFLY}"
            items.append(frame.item(f"{i}.{j}", text, question, answer, aware=aware))
    return items


def continuations(path: str, tokenizer: Any, size: Size, *, num_new: int = 64) -> list[Item]:
    """Stretches of a text, each with the ``num_new`` tokens that follow it as its answer."""
    tokens = _tokens(path, tokenizer)
    lead = tuple(tokenizer("")["input_ids"])
    items = []
    for i, start in enumerate(_starts(path, len(tokens), size.tokens + num_new, size.prompts)):
        end = start + size.tokens
        prompt = lead + tokens[start : end - 1]
        items.append(
            Item(f"{i}", f"{i}", prompt, tokens[end - 1 : end], tokens[end : end + num_new])
        )
    return items


def needles(path: str, tokenizer: Any, size: Size, *, aware: bool) -> list[Item]:
    """Sentences like "The password of Clara is hidden lantern." between those of a text.

    ``per_prompt`` of them in every prompt, each asked for in turn: 1 is the plain needle test, more
    are its multi-key form. Depths fill [0, 1] evenly over all prompts.
    """
    if size.per_prompt > len(NAMES):
        raise ValueError(f"per_prompt must be at most {len(NAMES)}, got {size.per_prompt}")
    tokens, frame = _tokens(path, tokenizer), Frame(tokenizer)
    items = []
    for i, start in enumerate(_starts(path, len(tokens), size.tokens, size.prompts)):
        random_ = random.Random(i)
        names = random_.sample(NAMES, size.per_prompt)
        words = [f"{random_.choice(ADJECTIVES)} {random_.choice(NOUNS)}" for _ in names]
        depths = [(j + (i + 0.5) / size.prompts) / size.per_prompt for j in range(size.per_prompt)]
        hidden = [f"The password of {n} is {w}." for n, w in zip(names, words, strict=True)]
        room = sum(len(tokenizer(f" {sentence}")["input_ids"]) for sentence in hidden)
        if room >= size.tokens:
            raise ValueError(f"tokens must be above {room} for {len(hidden)} needles each")
        stretch = tokenizer.decode(tokens[start : start + size.tokens - room])
        text = _insert(stretch, hidden, depths)
        for j, (name, word, depth) in enumerate(zip(names, words, depths, strict=True)):
            question, given = f"What is the password of {name}?", f"The password of {name} is"
            item = frame.item(f"{i}.{j}", text, question, word, given=given, aware=aware)
            items.append(replace(item, depth=depth))
    return items


def _paragraphs(path: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """What a file in SQuAD's layout holds: each context with its questions and first answers."""
    try:
        content = parse_json(read_text(path))
        return [
            (
                paragraph["context"].strip(),
                [
                    (qa["question"].strip(), qa["answers"][0]["text"].strip())
                    for qa in paragraph["qas"]
                    if qa["answers"]
                ],
            )
            for article in content["data"]
            for paragraph in article["paragraphs"]
        ]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not in SQuAD's layout: {error!r}") from error


def _grouped(paragraphs: list[Any], tokenizer: Any, size: Size) -> Iterator[list[Any]]:
    """Consecutive paragraphs of at most ``tokens`` tokens together that hold enough questions."""
    group: list[Any] = []
    total = 0
    for paragraph in paragraphs:
        length = len(tokenizer(paragraph[0] + "\n\n")["input_ids"])
        if total + length > size.tokens and group:
            if sum(bool(pairs) for _, pairs in group) >= size.per_prompt:
                yield group
            group, total = [], 0
        group.append(paragraph)
        total += length


def _spread(values: list[Any], count: int) -> Iterator[Any]:
    """``count`` of the values, evenly."""
    return (values[i * len(values) // count] for i in range(count))


def _starts(path: str, total: int, length: int, count: int) -> list[int]:
    """Where ``count`` stretches of ``length`` tokens begin that don't overlap."""
    if count * length > total:
        raise ValueError(
            f"{path} holds {total} tokens, but {count} prompts of {length} are asked for"
        )
    return [i * (total - length) // max(count - 1, 1) for i in range(count)]


def _insert(text: str, sentences: list[str], depths: list[float]) -> str:
    """The text with each sentence between two of its own, at that share of them."""
    pieces = re.split(r"(?<=[.!?])\s+|\n+", text)
    places = [round(depth * len(pieces)) for depth in depths]
    for place, sentence in sorted(zip(places, sentences, strict=True), reverse=True):
        pieces.insert(place, sentence)
    return " ".join(pieces)


def _tokens(path: str, tokenizer: Any) -> tuple[int, ...]:
    return tuple(tokenizer(read_text(path), add_special_tokens=False)["input_ids"])
