"""Read the messages of a request; harmless extra fields are dropped, and any other field is refused by its index.

A reply that a client stored, from this server or another provider, comes back with fields that a model does not use:
those of an assistant's message are dropped and never forwarded. An assistant's message without a text, as a failed
request leaves it, is dropped too, and two messages of one role in a row become one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.data.think_form import Message, strip_message, system_text
from pipeline.serve.request_error import invalid

MAX_MESSAGES = 256
ROLES = ("system", "developer", "user", "assistant")
_TEXTS = ("text", "input_text", "output_text")
_INERT = frozenset({"name", "id", "cache_control", "timestamp", "created_at", "metadata"})  # dropped from every message
_INERT_IN_REPLIES = _INERT | {
    "additional_kwargs",
    "annotations",
    "citations",
    "created",
    "finish_reason",
    "index",
    "logprobs",
    "model",
    "object",
    "parsed",
    "phase",
    "provider_specific_fields",
    "reasoning",
    "reasoning_content",
    "reasoning_details",
    "refusal",
    "response_metadata",
    "status",
    "stop_reason",
    "thinking",
    "thinking_blocks",
    "type",
    "usage",
    "usage_metadata",
}
_OFF = ("prefix", "partial")  # if true, the model would have to continue this reply
_INERT_PARTS = ("refusal", "reasoning", "thinking", "redacted_thinking")


@dataclass(frozen=True)
class Turn:
    """One message of the client: its index in the request, its role and its stripped text."""

    index: int
    role: str
    text: str


def read_turns(raw: Any) -> list[Turn]:
    """The client's messages.

    Raises:
        Refusal: 422 with name and index of the field that cannot be used.
    """
    if not isinstance(raw, list) or not 1 <= len(raw) <= MAX_MESSAGES:
        raise invalid(f"`messages` must be a list of 1 to {MAX_MESSAGES} messages", param="messages")
    return [_turn(index, message) for index, message in enumerate(raw)]


def _turn(index: int, raw: Any) -> Turn:
    where = f"messages.{index}"
    if not isinstance(raw, dict):
        raise invalid(f"`{where}` must be an object with role and content", param=where)
    role = raw.get("role")
    if role not in ROLES:
        raise invalid(f"`{where}.role` must be one of {', '.join(ROLES)}", param=f"{where}.role")
    inert = _INERT_IN_REPLIES if role == "assistant" else _INERT
    for key, value in raw.items():
        empty = value is None or value == [] or (key in _OFF and value is False)
        known = key in ("role", "content") or key in inert or empty
        if not known:
            name = f"{where}.{key}"[:80]
            raise invalid(f"`{name}` is not supported here; leave it out", param=name, code="unsupported_parameter")
    return Turn(index, role, strip_message(_text(raw.get("content"), f"{where}.content", role)))


def _text(content: Any, where: str, role: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"`{where}` must be a text or a list of parts", param=where)
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _TEXTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif not (role == "assistant" and kind in _INERT_PARTS):
            name = f"{where}.{number}"
            raise invalid(f"`{name}` is no part with a text; only texts can be taken", param=name)
    return "".join(texts)


def conversation(turns: list[Turn], *, instructs: bool) -> list[Message]:
    """Messages for the engine; with `instructs`, the shared system message stands before the client's.

    Raises:
        Refusal: a system message behind another message, an empty text, or a last message that is not the user's.
    """
    system: list[str] = []
    found: list[Message] = []
    for turn in turns:
        if turn.role in ("system", "developer"):
            if found:
                name = f"messages.{turn.index}.role"
                raise invalid(f"`{name}`: a system message must come first", param=name)
            system.append(turn.text)
        elif turn.text and found and found[-1]["role"] == turn.role:
            found[-1] = {"role": turn.role, "content": f"{found[-1]['content']}\n\n{turn.text}"}
        elif turn.text:
            found.append({"role": turn.role, "content": turn.text})
        elif turn.role == "user":
            raise invalid(f"message {turn.index} is empty", param=f"messages.{turn.index}.content")
    if not found or found[-1]["role"] != "user":
        raise invalid(
            "the last message must be the user's: a reply cannot be begun for the model",
            param="messages",
            code="unsupported_parameter",
        )
    own = "\n\n".join(filter(None, system))
    text = system_text(own) if instructs else own
    return [{"role": "system", "content": text}, *found] if text else found
