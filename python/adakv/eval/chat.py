"""A text, a question about it, and conversations: as the tokens that a model reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def encode_prompt(tokenizer: Any, text: str, question: str | None) -> Tensor:
    """``[1, T]`` tokens of the text and, if there is one, the question about it.

    With a question the two become one message in the tokenizer's chat template, if it has one.
    """
    if question is None:
        return _encode(tokenizer, text)
    if not tokenizer.chat_template:
        return _encode(tokenizer, f"{text}\n\nQuestion: {question}\nAnswer:")
    return encode_messages(tokenizer, messages_of(text, question))


def messages_of(text: str, question: str) -> list[dict[str, Any]]:
    """A text and a question about it, as a conversation."""
    return [{"role": "user", "content": f"{text}\n\n{question}"}]


def encode_messages(tokenizer: Any, messages: list[dict[str, Any]]) -> Tensor:
    """``[1, T]`` tokens of a conversation in the tokenizer's chat template."""
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return _encode(tokenizer, prompt, add_special_tokens=False)


def _encode(tokenizer: Any, prompt: str, *, add_special_tokens: bool = True) -> Tensor:
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=add_special_tokens)
    tokens: Tensor = encoded["input_ids"]
    return tokens
