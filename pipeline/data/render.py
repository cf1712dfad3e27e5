"""Render chats through a model's own template, as transformers does, with a fixed clock.

A template may refuse a chat (`raise_exception`), write today's date (`strftime_now`), want content as parts, know no
system role, or know tools. The server renders by the same rules: content as text first; as parts where the template
loses the text; the system text in front of the first question where the template refuses the role.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from pipeline.data.think_form import Message, RowError

CLOCK = datetime(2026, 1, 1, 12, 0, 0)  # `strftime_now` reads it, so that the same rows give the same bytes on any day
DATED = "rendered at a fixed date (the chat template writes the date)"


@contextlib.contextmanager
def frozen_clock() -> Iterator[None]:
    """Let templates that transformers renders read `CLOCK`.

    It replaces the clock in transformers' module, because transformers replaces functions among a template's arguments.
    """
    from transformers.utils import chat_template_utils

    real = chat_template_utils.datetime

    class Frozen(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return CLOCK

    chat_template_utils.datetime = Frozen
    try:
        yield
    finally:
        chat_template_utils.datetime = real


def render(tokenizer: Any, chat: Sequence[Message], *, prompt: bool, tools: Sequence[Any] = ()) -> str:
    """A chat as text.

    Args:
        prompt: add the generation prompt, from which the model goes on.
    Raises:
        RowError: the template refuses the chat.
    """
    from jinja2 import TemplateError

    try:
        with frozen_clock():
            return str(
                tokenizer.apply_chat_template(
                    [dict(message) for message in chat],
                    tools=list(tools) or None,
                    tokenize=False,
                    add_generation_prompt=prompt,
                )
            )
    except (TemplateError, TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise RowError("chat template refuses the row", " ".join(str(error).split())[:200]) from None


def as_parts(chat: Sequence[Message]) -> list[Message]:
    """The chat with every content as one part of text, for templates that want typed content."""
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in chat]


def without_system(chat: Sequence[Message]) -> list[Message]:
    """The chat with its system text in front of the first question."""
    if not chat or chat[0]["role"] != "system" or len(chat) < 2 or chat[1]["role"] != "user":
        return list(chat)
    first = {**chat[1], "content": f"{chat[0]['content']}\n\n{chat[1]['content']}"}
    return [first, *chat[2:]]


def writes_the_date(tokenizer: Any) -> bool:
    """Whether the template reads the clock."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", ""))
