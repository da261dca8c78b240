"""Conversations in records, and the texts that a model reads them as."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from ghosted_fast.errors import SourceError
from ghosted_fast.text.bos import adds_bos
from ghosted_fast.text.files import first_line

_LOGGER = logging.getLogger(__name__)
_FIELDS = ("messages", "conversations", "conversation", "dialogue", "chosen")
# What is asked, and what is answered, where they stand in fields of their own.
_ASKED = ("prompt", "instruction", "question", "query")
_ANSWERED = ("completion", "response", "output", "answer")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_SEPARATOR = "\n\n"
# Stands for what a user asks; no template has it.
_MARK = "ghostedfastquestion"


def is_chat(record: Mapping[str, Any], field: str | None = None) -> bool:
    """Return whether a record, or a field of it, is a conversation."""
    if field is not None:
        return _is_messages(record.get(field))
    return _field_of(record) is not None or _pair_of(record) is not None


def messages_of(record: Mapping[str, Any], field: str | None = None) -> list[dict[str, str]]:
    """Return the conversation of a record, as chat templates take it.

    Raises:
        ValueError: A message has no role or no text; the message says which.
    """
    name = field or _field_of(record)
    if name is not None:
        return [_message(item, index) for index, item in enumerate(record[name], 1)]
    pair = _pair_of(record)
    assert pair is not None
    asked, answered = (record[name] for name in pair)
    if _is_messages(asked):
        both = [*asked, *(answered if _is_messages(answered) else [])]
        return [_message(item, index) for index, item in enumerate(both, 1)]
    if isinstance(more := record.get("input"), str) and more and pair[0] == "instruction":
        asked = f"{asked}\n{more}"
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def prompt_tokens(tokenizer: Any, asked: str) -> list[int]:
    """Return the tokens after which a model answers what somebody asked.

    Through the tokenizer's chat template that is one message of the user and what opens the answer;
    where there is no template, the text as it is.

    Args:
        tokenizer: A transformers tokenizer.
        asked: The text.

    Raises:
        SourceError: The template refuses the message.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return list(tokenizer(asked)["input_ids"])
    return list(tokenizer(_opened(tokenizer, asked), add_special_tokens=False)["input_ids"])


def around_question(tokenizer: Any) -> tuple[str, str]:
    """Return what a chat template writes before what a user asks, and from there to the answer.

    Args:
        tokenizer: A transformers tokenizer with a chat template.

    Raises:
        SourceError: The template refuses the message, or does not write it as it is.
    """
    before, _, behind = _opened(tokenizer, _MARK).partition(_MARK)
    if not behind.strip() or _MARK in behind:
        raise SourceError(
            "expected the tokenizer's chat template to write a message of the user once, and open "
            "the answer behind it, got one that does not: correct the template, or take it off "
            "the tokenizer"
        )
    return before, behind


def _opened(tokenizer: Any, asked: str) -> str:
    message = [{"role": "user", "content": asked}]
    try:
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # jinja's errors, and whatever a template raises
        raise SourceError(
            f"expected the tokenizer's chat template to take one message of the user, got "
            f"{first_line(error)}: correct the template, or take it off the tokenizer"
        ) from error
    return str(text)


class ChatWriter:
    """Writes conversations as the model of a tokenizer reads them.

    Args:
        tokenizer: A transformers tokenizer; None if there is none.
        name: Of the source, for messages.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer, self._name = tokenizer, name
        self._warned = False

    def text_of(self, messages: Sequence[Mapping[str, str]], number: int) -> str:
        """Return a conversation as a text.

        Args:
            messages: The conversation.
            number: Of the record, for messages.

        Raises:
            SourceError: There is no tokenizer, or its template refuses the conversation.
        """
        if self._tokenizer is None:
            raise SourceError(
                f"record {number} of {self._name!r} is a conversation, which the tokenizer's chat "
                "template makes a text: expected a tokenizer, got none; pass tokenizer=... to "
                "load_texts"
            )
        if getattr(self._tokenizer, "chat_template", None) is None:
            return self._plain(messages)
        try:
            text = str(self._tokenizer.apply_chat_template(list(messages), tokenize=False))
        except Exception as error:  # jinja's errors, and whatever a template raises
            raise SourceError(
                f"expected record {number} of {self._name!r} to fit the tokenizer's chat template, "
                f"got {first_line(error)}: correct the record, or leave it out"
            ) from error
        return text.removeprefix(self._begin)

    @cached_property
    def _begin(self) -> str:
        """What rows of tokens begin with anyway; a BOS token that is not added opens a turn."""
        begin = self._tokenizer.bos_token
        return str(begin) if begin and adds_bos(self._tokenizer) else ""

    def _plain(self, messages: Sequence[Mapping[str, str]]) -> str:
        if not self._warned:
            self._warned = True
            _LOGGER.warning(
                "%r holds conversations and the tokenizer has no chat template: the messages are "
                "read as plain text",
                self._name,
            )
        return _SEPARATOR.join(item["content"] for item in messages)


def _field_of(record: Mapping[str, Any]) -> str | None:
    return next((name for name in _FIELDS if _is_messages(record.get(name))), None)


def _is_messages(value: Any) -> bool:
    if not isinstance(value, list) or not value or not isinstance(value[0], Mapping):
        return False
    return any(name in value[0] for name in ("content", "value"))


def _pair_of(record: Mapping[str, Any]) -> tuple[str, str] | None:
    asked = next((name for name in _ASKED if _said(record.get(name))), None)
    answered = next((name for name in _ANSWERED if _said(record.get(name))), None)
    return None if asked is None or answered is None else (asked, answered)


def _said(value: Any) -> bool:
    return isinstance(value, str) or _is_messages(value)


def _message(item: Any, index: int) -> dict[str, str]:
    if not isinstance(item, Mapping):
        raise ValueError(f"message {index} is of type {type(item).__name__}")
    role = item.get("role", item.get("from"))
    content = item.get("content", item.get("value"))
    if isinstance(content, list):  # parts, of which those of text are read
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        content = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(role, str) or not isinstance(content, str):
        missing = "role" if not isinstance(role, str) else "content"
        raise ValueError(f"message {index} has no {missing}")
    return {"role": _ROLES.get(role.lower(), role.lower()), "content": content}
