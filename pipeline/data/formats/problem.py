"""Problems with worked solutions: a field for the reasoning, a `solution`, one or several `generations`."""

from __future__ import annotations

from typing import Any

from pipeline.data.formats.fields import (
    ANSWERS,
    PROMPTS,
    REASONING,
    ended,
    present,
    prompt_of,
    stated_answer,
    system_of,
    text,
    value_text,
)
from pipeline.data.formats.registry import Conversation, Format, Target, ask, register
from pipeline.data.split.tags import has_tag
from pipeline.data.think_form import BrokenLine, RowError

_VERDICTS = ("correctness_math_verify", "correctness", "is_correct", "correct", "correctness_llama")


_GENERATIONS = ("generations", "generation", "responses")
_SOLUTIONS = ("generated_solution", "solution")
_TRAJECTORIES = ("thinking_trajectories", "thinking_trajectory")


@register
class Trajectories(Format):
    """A question's `thinking_trajectories` and `attempt`; a model's name and `..._grade` may belong to each."""

    name = "trajectories"
    keys = ("question", "thinking_trajectories", "attempt")

    def accepts(self, row: dict[str, Any]) -> bool:
        """Whether the row has a prompt, and a trajectory with its attempt."""
        return present(row, PROMPTS) is not None and bool(_attempts(row))

    def read(self, row: dict[str, Any]) -> Conversation:
        """See `Format.read`.

        Raises:
            BrokenLine: wrong types.
            RowError: the source calls no attempt right.
        """
        stated = stated_answer({"answer": row.get("solution"), **row})
        right = [
            Target(text(row, attempt), _steps(row, steps), stated)
            for steps, attempt, grade in _attempts(row)
            if str(row.get(grade, "yes")).strip().lower() in ("yes", "true", "none")
        ]
        if not right:
            raise RowError("judged wrong by its source", "no attempt is graded as right")
        first, *others = right
        prompt = ask(prompt_of(row, str(present(row, PROMPTS))))
        return Conversation(prompt, first, system_of(row), alternatives=tuple(others))


def _attempts(row: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The keys of each trajectory, its attempt and its grade; all three keys start with the same words."""
    found = []
    for key in row:
        name = next((name for name in _TRAJECTORIES if key.endswith(name)), None)
        if name is not None and row[key] and row.get(f"{key.removesuffix(name)}attempt"):
            front = key.removesuffix(name)
            found.append((key, f"{front}attempt", f"{front}grade"))
    return found


@register
class Generations(Format):
    """`generations` (a list) or `generation`: a model's replies to a problem, with or without verdicts."""

    name = "generations"
    keys = ("generations",)

    def accepts(self, row: dict[str, Any]) -> bool:
        """Whether the row has a prompt and at least one generation."""
        return present(row, PROMPTS) is not None and present(row, _GENERATIONS) is not None

    def read(self, row: dict[str, Any]) -> Conversation:
        """See `Format.read`.

        Raises:
            BrokenLine: generations that are no texts.
            RowError: the source calls no generation correct.
        """
        key = str(present(row, _GENERATIONS))
        given = row[key] if isinstance(row[key], list) else [row[key]]
        given = [part.get("response", part.get("content")) if isinstance(part, dict) else part for part in given]
        if not all(isinstance(part, str) for part in given):
            raise BrokenLine("wrong type", f"`{key}` must be a string or a list of strings")
        stated = stated_answer(row)
        whole = [part for part, good in zip(given, _whole(row, len(given)), strict=True) if good]
        if not whole:
            raise RowError("cut off", f"none of {len(given)} generations was ended")
        right = [part for part, good in zip(given, _verdicts(row, len(given)), strict=True) if good and part in whole]
        if not right:
            raise RowError("judged wrong by its source", f"no one of {len(given)} generations is marked as correct")
        prompt = ask(prompt_of(row, str(present(row, PROMPTS))))
        first, *others = [Target(part, stated=stated) for part in right]
        return Conversation(prompt, first, system_of(row), alternatives=tuple(others))


def _whole(row: dict[str, Any], count: int) -> list[bool]:
    """Whether each generation came to its end; True for all where the source says nothing."""
    reasons, complete = row.get("finish_reasons"), row.get("is_reasoning_complete")
    found = [True] * count
    if isinstance(reasons, list) and len(reasons) == count:
        found = [ended(reason) for reason in reasons]
    if isinstance(complete, list) and len(complete) == count:
        found = [good and one is not False for good, one in zip(found, complete, strict=True)]
    return found


def _verdicts(row: dict[str, Any], count: int) -> list[bool]:
    """Whether the source calls each generation correct; True for all where it says nothing."""
    for key in _VERDICTS:
        said = row.get(key)
        said = [said] * count if isinstance(said, bool) else said
        if isinstance(said, list) and len(said) == count and all(isinstance(one, bool) for one in said):
            return said
    return [True] * count


@register
class Reasoned(Format):
    """A prompt, a reasoning field and an answer field."""

    name = "reasoning/answer"
    keys = ("prompt", "steps", "answer")

    def accepts(self, row: dict[str, Any]) -> bool:
        """Whether the row has one key of each group."""
        question = present(row, PROMPTS)
        replies = [key for key in ANSWERS if key != question]
        return question is not None and present(row, REASONING) is not None and present(row, replies) is not None

    def read(self, row: dict[str, Any]) -> Conversation:
        """See `Format.read`."""
        question, reasoning = str(present(row, PROMPTS)), str(present(row, REASONING))
        reply = str(present(row, [key for key in ANSWERS if key != question]))
        target = Target(value_text(row, reply), _steps(row, reasoning), stated_answer(row, but=reply))
        return Conversation(ask(prompt_of(row, question)), target, system_of(row))


def _steps(row: dict[str, Any], key: str) -> str:
    """Reasoning as one text; a list of strings is one step a line."""
    value = row[key]
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "\n".join(value)
    return text(row, key)


@register
class Solution(Format):
    """A problem and its `solution`, with the answer in a box, behind a marker, or in `answer`."""

    name = "solution"
    keys = ("problem", "solution")

    def accepts(self, row: dict[str, Any]) -> bool:
        """Whether the row has a prompt and a solution. A row whose reply thinks in tags belongs to other formats."""
        replies = [row.get(key) for key in ("output", "response", "completion")]
        thinks = any(isinstance(reply, str) and has_tag(reply) for reply in replies)
        return not thinks and present(row, PROMPTS) is not None and present(row, _SOLUTIONS) is not None

    def read(self, row: dict[str, Any]) -> Conversation:
        """See `Format.read`."""
        target = Target(text(row, str(present(row, _SOLUTIONS))), stated=stated_answer(row))
        return Conversation(ask(prompt_of(row, str(present(row, PROMPTS)))), target, system_of(row))
