"""Reading single fields of a row with a clear error for a wrong type."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pipeline.data.think_form import BrokenLine, RowError, strip_message

REASONING = (
    *("reasoning_content", "reasoning", "thinking", "thought", "thoughts"),
    *("chain_of_thought", "cot", "rationale", "steps", "explanation"),
)
PROMPTS = ("problem", "question", "prompt", "instruction", "query", "input")
ANSWERS = ("answer", "final_answer", "expected_answer", "ground_truth", "response", "output", "completion", "solution")
_CHOICES = ("choices", "options")


def text(row: dict[str, Any], key: str, where: str = "") -> str:
    """A field that must be a string.

    Raises:
        BrokenLine: it is not.
    """
    value = row.get(key)
    if not isinstance(value, str):
        raise BrokenLine("wrong type", f"`{where}{key}` must be a string, got {type(value).__name__}")
    return value


def optional(row: dict[str, Any], key: str) -> str | None:
    """A field that is a string, null or missing."""
    return None if row.get(key) is None else text(row, key)


def value_text(row: dict[str, Any], key: str) -> str:
    """An answer's field: a string, or a number or truth value as its text; a list of one such thing is that thing.

    Raises:
        BrokenLine: anything else.
        RowError: several answers.
    """
    value = row.get(key)
    if isinstance(value, list):
        if len(value) != 1:
            raise RowError("two different answers", f"`{key}` is a list of {len(value)}")
        value = value[0]
    if isinstance(value, bool):
        return "True" if value else "False"
    if isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str):
        raise BrokenLine("wrong type", f"`{key}` must be a string or a number, got {type(value).__name__}")
    return value


def stated_answer(row: dict[str, Any], *, but: str = "") -> str | None:
    """A short answer that the row states in a field of its own (`answer`, ...); None where it does not."""
    for key in ("answer", "final_answer", "expected_answer", "ground_truth"):
        if key != but and isinstance(row.get(key), str | int | float) and strip_message(str(row[key])):
            value = strip_message(value_text(row, key))
            return value if "\n" not in value and len(value) <= 400 else None
    return None


def present(row: dict[str, Any], keys: Sequence[str]) -> str | None:
    """The first of `keys` that the row has with a value that is not empty."""
    return next((key for key in keys if row.get(key) not in (None, "", [])), None)


def prompt_of(row: dict[str, Any], key: str) -> str:
    """The question's text, an instruction's `input` below it; a row whose choices are not in it cannot be asked.

    Raises:
        BrokenLine: wrong types.
        RowError: choices stand in another field.
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


def system_of(row: dict[str, Any]) -> str | None:
    """The row's own system text."""
    return optional(row, "system") if row.get("system") is not None else optional(row, "system_prompt")
