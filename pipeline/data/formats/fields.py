"""Read single fields of a row, with a clear error for a wrong type."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pipeline.data.think_form import BrokenLine, RowError, strip_message

REASONING = (
    *("reasoning_content", "reasoning", "thinking", "thought", "thoughts"),
    *("chain_of_thought", "cot", "complex_cot", "rationale", "steps", "explanation"),
)
PROMPTS = ("problem", "question", "prompt", "instruction", "query", "input")
ANSWERS = (
    "answer",
    "final_answer",
    "expected_answer",
    "ground_truth",
    "response",
    "output",
    "completion",
    "solution",
    "target",
    "content",
)
_CHOICES = ("choices", "options")
_STATED = (
    *("answer", "final_answer", "expected_answer", "ground_truth"),
    *("reference_answer", "gold_answer", "correct_answer"),
)
_NO_ANSWER = frozenset({"proof", "notfound", "not found", "n/a", "nan", "inf", "-inf", "null"})  # in many tables
_VERDICTS = (
    *("correct", "is_correct", "correctness", "answer_correct", "is_verified", "verified"),
    *("is_valid", "problem_is_valid", "solution_is_valid", "question_is_valid"),
)
_REFUTED = frozenset({"no", "false", "incorrect", "wrong", "invalid", "incomplete", "fail", "failed"})
_CUT = frozenset({"length", "max_tokens", "content_filter"})  # finish reasons of a reply that was cut off
_CONFIRMED = frozenset({"yes", "true", "valid"})  # other values say many things: "Incomplete", "Problem not solved"
_PICTURES = ("image", "images", "audio", "audios", "video", "videos")


def text(row: dict[str, Any], key: str, where: str = "") -> str:
    """A field that must be a string.

    Raises:
        BrokenLine: the field is missing or is no string.
    """
    value = row.get(key)
    if not isinstance(value, str):
        raise BrokenLine("wrong type", f"`{where}{key}` must be a string, got {type(value).__name__}")
    return value


def optional(row: dict[str, Any], key: str) -> str | None:
    """A field that is a string, null or missing."""
    return None if row.get(key) is None else text(row, key)


def value_text(row: dict[str, Any], key: str) -> str:
    """An answer's field as text: a string, a number, a truth value, or a list of one of these.

    Raises:
        BrokenLine: anything else.
        RowError: several answers, or a word that means "no answer".
    """
    value = row.get(key)
    if isinstance(value, list):
        if len(value) != 1:
            raise RowError("two different answers", f"`{key}` is a list of {len(value)}")
        value = value[0]
    if isinstance(value, bool):
        return "True" if value else "False"
    if not isinstance(value, str | int | float):
        raise BrokenLine("wrong type", f"`{key}` must be a string or a number, got {type(value).__name__}")
    if str(value).strip().lower() in _NO_ANSWER:
        raise RowError("empty answer", f"`{key}` is {str(value)[:20]!r}")
    return str(value)


def stated_answer(row: dict[str, Any], *, but: str = "") -> str | None:
    """The short answer in the row's answer field (`answer`, ...); None where the row has no such field."""
    for key in _STATED:
        given = row.get(key)
        if key != but and isinstance(given, str | int | float) and strip_message(str(given)):
            if str(given).strip().lower() in _NO_ANSWER:
                return None
            value = strip_message(value_text(row, key))
            return value if "\n" not in value and len(value) <= 400 else None
    return None


def present(row: dict[str, Any], keys: Sequence[str]) -> str | None:
    """The first of `keys` that the row has with a value that is not empty."""
    return next((key for key in keys if row.get(key) not in (None, "", [])), None)


def prompt_of(row: dict[str, Any], key: str) -> str:
    """The question's text, with an instruction's `input` below it.

    Raises:
        BrokenLine: wrong types.
        RowError: the choices of the question stand in another field, so that nobody could answer it.
    """
    prompt = text(row, key)
    if key == "instruction":
        parts = strip_message(prompt), strip_message(optional(row, "input") or "")
        prompt = "\n\n".join(filter(None, parts))
    for name in _CHOICES:
        listed = row.get(name)
        said = (
            next(iter(listed.values()), None) if isinstance(listed, dict) else listed
        )  # {"text": [...], "label": ...}
        if isinstance(said, list) and any(re.sub(r"\W", "", str(p)) not in re.sub(r"\W", "", prompt) for p in said):
            raise RowError("choices outside the prompt", f"`{name}` holds what the question asks about")
    return prompt


def require_usable(row: dict[str, Any]) -> None:
    """Raise `RowError` where a field of the row says that the row cannot be used.

    Raises:
        RowError: the source calls problem or answer wrong, the reply was cut off, or the row belongs to a picture, a
            sound or a video.
    """
    require_ended(row)
    for name in _VERDICTS:
        value = row.get(name)
        word = value.strip().lower() if isinstance(value, str) and name != "correct" else ""
        if value is False or word in _REFUTED or (word and name.endswith("_is_valid") and word not in _CONFIRMED):
            raise RowError("judged wrong by its source", f"`{name}` is {str(value)[:20]!r}")
    for name in _PICTURES:
        if row.get(name) not in (None, "", [], {}, False):
            raise RowError("not text", f"`{name}` holds what the question is about")


def require_ended(fields: dict[str, Any]) -> None:
    """Raise `RowError` where the fields of a row or a message say that the reply was cut off.

    Raises:
        RowError: a finish reason other than an end, or `truncated`.
    """
    if ended(fields.get("finish_reason")) and ended(fields.get("stop_reason")) and fields.get("truncated") is not True:
        return
    raise RowError("cut off", "its source says that the reply was not ended")


def ended(reason: Any) -> bool:
    """Whether a reply came to its end, by its finish reason."""
    return not (isinstance(reason, str) and reason.strip().lower() in _CUT)


def system_of(row: dict[str, Any]) -> str | None:
    """The system text of the row."""
    return optional(row, "system") if row.get("system") is not None else optional(row, "system_prompt")
