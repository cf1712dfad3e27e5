"""The /think form: its markers, system message, writer and parser. Only this module spells out the markers.

An assistant turn is `THINK_MARKER \n steps \n\n ANSWER_MARKER \n answer`; each marker stands exactly once, alone on its
line, in this order, and both parts are non-empty. Data, Modelfile and server share `SYSTEM_MESSAGE`.
Messages are stripped here, because leading Unicode whitespace tokenises differently in HF and in llama.cpp (C `isspace`
only). In the base's own form `reasoning_content` holds the steps beside the answer, and the chat template writes both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from so8t_core.errors import InputError

THINK_MARKER = "# 思考ステップ"
ANSWER_MARKER = "# 最終回答"
FORM_KEY = "so8t.think_form"  # key of a GGUF file: `so8t`, or `base` for the form of the base's chat template
SYSTEM_MESSAGE = f'Write short steps under "{THINK_MARKER}", then only the answer under "{ANSWER_MARKER}".'

# Invisible at the ends of a message: zero width space, word joiner, Mongolian vowel separator, byte order mark.
# Joiners (U+200C, U+200D) carry meaning in some scripts and stay.
_INVISIBLE = "\u200b\u2060\u180e\ufeff"
_ENDS = "".join(filter(str.isspace, map(chr, range(0x3001)))) + _INVISIBLE  # U+3000 is the last space of Unicode

Message = dict[str, Any]  # role and content; reasoning_content in the base's form; tool calls


class RowError(InputError):
    """One row cannot be used; `reason` is the short name that it is counted by, `detail` the particulars.

    `shown` are the particulars that a report may show: they hold no text of the row.
    """

    def __init__(self, reason: str, detail: str = "", *, shown: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
        self.shown = shown


class BrokenLine(RowError):
    """A line that is not a row in a known format: it stops the run unless `skip_bad_rows` is set."""


@dataclass(frozen=True)
class Thought:
    """The two parts of an assistant turn, both stripped and non-empty."""

    steps: str
    answer: str


def strip_message(text: str) -> str:
    """Remove Unicode whitespace (U+3000 included), BOMs and zero-width spaces from both ends; the inside stays."""
    return text.strip(_ENDS)


def format_assistant(steps: str, answer: str) -> str:
    """The assistant turn in /think form; `require` undoes it.

    Raises:
        RowError: a part is empty or contains a marker.
    """
    text = f"{THINK_MARKER}\n{strip_message(steps)}\n\n{ANSWER_MARKER}\n{strip_message(answer)}"
    require(text)
    return text


def require(text: str) -> Thought:
    """Parse an assistant turn in /think form.

    Raises:
        RowError: a marker is missing, repeated, out of order or not alone on its line; text stands before the first
            marker; a part is empty.
    """
    text = strip_message(text)
    lines = text.split("\n")
    where = {}
    for marker in (THINK_MARKER, ANSWER_MARKER):
        count = text.count(marker)
        if count == 0:
            raise RowError("marker missing", f"`{marker}` does not occur")
        if count > 1:
            raise RowError("marker repeated", f"`{marker}` occurs {count} times, allowed is 1")
        own = [number for number, line in enumerate(lines) if line.rstrip() == marker]
        if not own:
            raise RowError("marker not on its own line", f"`{marker}` shares its line with other text")
        where[marker] = own[0]
    think, final = where[THINK_MARKER], where[ANSWER_MARKER]
    if final < think:
        raise RowError("markers out of order", f"`{ANSWER_MARKER}` stands before `{THINK_MARKER}`")
    if think > 0:
        raise RowError("text before the first marker", f"{lines[0][:40]!r}")
    steps = strip_message("\n".join(lines[think + 1 : final]))
    answer = strip_message("\n".join(lines[final + 1 :]))
    if not steps:
        raise RowError("empty steps", f"nothing between `{THINK_MARKER}` and `{ANSWER_MARKER}`")
    if not answer:
        raise RowError("empty answer", f"nothing after `{ANSWER_MARKER}`")
    return Thought(steps=steps, answer=answer)


def assistant_message(thought: Thought, *, base_form: bool) -> Message:
    """The assistant's message of a thought; `read_assistant` undoes it.

    Raises:
        RowError: a part is empty or contains a marker.
    """
    if base_form:
        return {"role": "assistant", "reasoning_content": thought.steps, "content": thought.answer}
    return {"role": "assistant", "content": format_assistant(thought.steps, thought.answer)}


def read_assistant(message: Message) -> Thought:
    """Steps and answer of an assistant's message in either form.

    Raises:
        RowError: the message is in neither form.
    """
    if "reasoning_content" not in message:
        return require(message["content"])
    thought = Thought(strip_message(message["reasoning_content"]), strip_message(message["content"]))
    if not thought.steps or not thought.answer:
        raise RowError("empty answer" if thought.steps else "empty steps", "a part of the message has no text")
    return thought


def parse(text: str) -> Thought | None:
    """`require` for callers that only count: None where the text is not in /think form."""
    try:
        return require(text)
    except RowError:
        return None


def has_marker(text: str) -> bool:
    """True if either marker occurs anywhere: the text is, or tries to be, in /think form."""
    return THINK_MARKER in text or ANSWER_MARKER in text


def system_text(system: str | None = None) -> str:
    """The shared system message, followed by the caller's; not doubled if the caller's starts with it."""
    own = strip_message(system or "")
    if own.startswith(SYSTEM_MESSAGE):
        return own
    return f"{SYSTEM_MESSAGE}\n\n{own}" if own else SYSTEM_MESSAGE


def chat(prompt: str, system: str | None = None) -> list[Message]:
    """Messages that ask one question: the shared system message (with the caller's after it) and the prompt."""
    return [
        {"role": "system", "content": system_text(system)},
        {"role": "user", "content": strip_message(prompt)},
    ]
