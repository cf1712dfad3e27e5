"""Turn one row of a source into one conversation in the trained form: read it by its format, split it, check it.

A row that cannot be split with certainty raises `RowError` with a short reason; a line that is no row, or a row of an
unknown format, raises `BrokenLine`. Reasoning is never invented.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.data.formats import Conversation, Target, read_row
from pipeline.data.formats.fields import optional, require_usable
from pipeline.data.split.leftovers import calls_a_tool, require_clean
from pipeline.data.split.markers import (
    boxes,
    disagrees,
    final_answer,
    handovers,
    split_at_marker,
    without_calculator_marks,
)
from pipeline.data.split.tags import has_tag, tags, take_thinking
from pipeline.data.split.text import checked, split_text, thought_of
from pipeline.data.think_form import (
    BrokenLine,
    Message,
    RowError,
    Thought,
    assistant_message,
    format_assistant,
    has_marker,
    read_assistant,
    strip_message,
    system_text,
)
from pipeline.data.truth.agreement import objection
from pipeline.data.truth.equality import normalised, same_answer
from pipeline.data.truth.numerals import numbers_in, quantity

LABELS = ("four_class_label", "domain_label", "safety_label")
DISAGREES = "steps and answer disagree"
OTHER_FORM = "own system text dropped (it asks for another thinking form)"
EARLIER = "earlier turns cut to their answers"
_DENIES = re.compile(r"\b(?:not|never|no|nor|without)\b|n't\b|ない|なく|ません|ではな|違", re.IGNORECASE)
_KOREAN_LETTER = re.compile(r"[\uac00-\ud7a3]")
_JAPANESE_LETTER = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")


@dataclass(frozen=True)
class RowOptions:
    """The settings for the trained form: the keys of `data` with the same names."""

    think_form: Literal["so8t", "base"] = "so8t"
    tools: Literal["exclude", "keep"] = "exclude"
    earlier_turns: Literal["answers", "whole"] = "answers"
    disagreements: Literal["exclude", "keep"] = "exclude"


@dataclass(frozen=True)
class ThinkRow:
    """One conversation in the trained form; its last message is the assistant's."""

    messages: list[Message]
    answer: str
    family: str
    language: str
    labels: dict[str, Any] = field(default_factory=dict)
    tools: list[Any] = field(default_factory=list)
    notes: tuple[str, ...] = ()  # changes to the row and findings in it, for the counts

    @property
    def thought(self) -> Thought:
        """Steps and answer of the last message."""
        return read_assistant(self.messages[-1])


def to_think_row(row: dict[str, Any], *, family: str, options: RowOptions | None = None) -> ThinkRow:
    """Bring one row into the trained form; `family` is the family of a row that names none.

    Raises:
        BrokenLine: unknown format or wrong types.
        RowError: an empty message, roles out of order, no reasoning, no certain split, two answers.
    """
    options = options or RowOptions()
    found = read_row(row)
    require_usable(row)
    notes: list[str] = []
    turns = _checked_turns(found, options, notes)
    thought, text = _target(found)
    asked = str(turns[-1]["content"]) if turns[-1]["role"] == "user" else ""
    if said := objection(asked, thought.steps, thought.answer):
        if options.disagreements == "exclude":
            raise RowError(DISAGREES, said)
        notes.append(DISAGREES)
    system = _system(found.system, options, notes)
    answer: Message = {"role": "assistant", "content": text} if options.think_form == "so8t" and text else {}
    answer = answer or assistant_message(thought, base_form=options.think_form == "base")
    return ThinkRow(
        messages=[*([{"role": "system", "content": system}] if system else []), *turns, answer],
        answer=thought.answer,
        family=optional(row, "family") or family,
        language=optional(row, "language") or detect_language(asked + thought.steps + thought.answer),
        labels={name: _label(row, name) for name in LABELS if row.get(name) is not None or name in row},
        tools=found.tools if options.tools == "keep" else [],
        notes=tuple(notes),
    )


def _system(own: str | None, options: RowOptions, notes: list[str]) -> str:
    """The shared system text and the row's; a row's text that asks for other thinking tags would contradict it."""
    if options.think_form == "base":
        return strip_message(own or "")
    if own and any(tag.kind == "think" for tag in tags(own)):
        notes.append(OTHER_FORM)
        own = None
    return system_text(own)


def _target(found: Conversation) -> tuple[Thought, str]:
    """The thought of the first usable candidate, and its text if that was in /think form already.

    Raises:
        RowError: no candidate is usable; the error is that of the first candidate.
    """
    first: RowError | None = None
    kept: list[tuple[Thought, Target]] = []
    for target in (found.target, *found.alternatives):
        try:
            thought = target_thought(target)
            require_clean(thought)
            format_assistant(thought.steps, thought.answer)  # refuses markers inside, in any form
        except BrokenLine:
            raise
        except RowError as error:
            first = first or error
        else:
            kept.append((thought, target))
            if target.stated is not None:
                break  # the stated answer has decided
    if not kept:
        assert first is not None
        raise first
    (thought, target), *others = kept
    if any(not same_answer(_named(thought), _named(other)) for other, _ in others):
        raise RowError("two different answers", "several generations, which disagree, and no answer that decides")
    text = strip_message(target.text)
    return thought, text if target.reasoning is None and has_marker(text) else ""


def _named(thought: Thought) -> str:
    """The answer that the reply names, or all of the reply."""
    return final_answer(thought.answer) or thought.answer


def target_thought(target: Target) -> Thought:
    """Steps and answer of a target.

    Raises:
        RowError: no reasoning, no certain split, or an answer other than the stated answer.
    """
    text, reasoning = strip_message(target.text), strip_message(target.reasoning or "")
    if reasoning:
        if has_marker(reasoning) or has_tag(reasoning):
            reasoning = _bare_reasoning(reasoning)
        if has_tag(text) and (tagged := take_thinking(text)) is not None and tagged.steps == reasoning:
            text = tagged.rest  # field and text hold the same reasoning
        if has_marker(text) or has_tag(text):
            raise RowError("two thinking forms", "reasoning in a field of its own and thinking marks in the reply")
        thought = checked(thought_of(strip_message(without_calculator_marks(reasoning)), text))
        if "\n" not in reasoning and normalised(reasoning) == normalised(thought.answer):
            raise RowError("no reasoning", "the reasoning is the answer")
    elif not text:
        raise RowError("empty message", "the assistant message has no text")
    elif target.stated is not None and not (has_marker(text) or has_tag(text) or handovers(text) or boxes(text)):
        if same_answer(text, target.stated) or len(text) <= len(target.stated):
            raise RowError("no reasoning", "the reply is the answer")
        thought = checked(Thought(strip_message(without_calculator_marks(text)), target.stated))
    else:
        thought = split_text(text)
    if target.stated is not None:
        _require_stated(thought, target.stated)
    return thought


def _bare_reasoning(text: str) -> str:
    """A reasoning field without its tags, which must enclose all of it."""
    found = re.fullmatch(r"\s*<think>(.*)</think>\s*", text, re.DOTALL)
    if found is None or has_tag(found[1]) or has_marker(found[1]):
        raise RowError("two thinking forms", "thinking marks inside the field of the reasoning")
    return strip_message(found[1])


def _require_stated(thought: Thought, stated: str) -> None:
    """Raise `RowError` unless the answer that was split off is the row's stated answer."""
    named = _named(thought)
    if same_answer(named, stated) or same_answer(thought.answer, stated):
        return
    value = quantity(stated)
    if value is not None and set(numbers_in(named)) == {value.value} and not _DENIES.search(named):
        return  # "It is 42."
    long = "\n" in named or len(named) > 60
    if long and not disagrees(named, stated) and normalised(stated) in normalised(named):
        return
    raise RowError("two different answers", "the reply's answer is not the one that the row states")


def _checked_turns(found: Conversation, options: RowOptions, notes: list[str]) -> list[Message]:
    """The turns before the target: stripped, in order, with earlier replies in the served form.

    Raises:
        RowError: an empty message, roles out of order, or tool calls where `tools` excludes them.
    """
    turns: list[Message] = []
    if not found.turns or found.turns[0]["role"] != "user":
        raise RowError("roles out of order", "the first turn after the system's must be the user's")
    calling = any(
        turn["role"] == "tool"
        or turn.get("tool_calls")
        or (turn["role"] == "assistant" and calls_a_tool(turn["content"]))
        for turn in found.turns
    )
    if calling and options.tools == "exclude":
        raise RowError("tool calls", "data.tools: keep trains on such rows")
    for turn in found.turns:
        made = {**turn, "content": strip_message(turn["content"])}
        if made["role"] == "assistant":
            made = _earlier(made, options, notes)
        if "<image>" in made["content"]:
            raise RowError("not text", f"the {made['role']} message holds a picture's place")
        if not made["content"] and not made.get("tool_calls"):
            raise RowError("empty message", f"the {made['role']} message has no text")
        turns.append(made)
    spoken = [t["role"] for t in turns if t["role"] != "tool" and not t.get("tool_calls")]
    ordered = spoken == ["user", "assistant"] * (len(spoken) // 2) + ["user"]
    if not ordered or not _answered(turns):
        raise RowError("roles out of order", "expected an optional system, then user and assistant in turn")
    return turns


def _answered(turns: list[Message]) -> bool:
    """Whether every tool message follows a call or a tool message, and a tool message follows every call."""
    for number, turn in enumerate(turns):
        before = turns[number - 1] if number else {"role": ""}
        called = bool(before.get("tool_calls"))
        if turn["role"] == "tool" and not (called or before["role"] == "tool"):
            return False
        if turn["role"] != "tool" and called:
            return False
    return not turns[-1].get("tool_calls")


def _earlier(turn: Message, options: RowOptions, notes: list[str]) -> Message:
    """An earlier reply: if it holds reasoning, its answer alone, as a server sends it back; otherwise unchanged."""
    text, reasoning = turn["content"], turn.pop("reasoning_content", None)
    if turn.get("tool_calls"):
        return turn
    if reasoning:
        thought = target_thought(Target(text, reasoning))
    elif not has_marker(text) and has_tag(text) and (tagged := take_thinking(text)) is not None and not tagged.steps:
        return {**turn, "content": tagged.rest}  # an empty block: the reply has no thinking
    elif has_marker(text) or has_tag(text):
        thought = split_text(text)
    else:
        try:
            thought = split_at_marker(text)
        except RowError:
            return turn
        if options.earlier_turns == "whole":
            return turn
    if options.earlier_turns == "whole":
        return turn | assistant_message(thought, base_form=options.think_form == "base")
    notes.append(EARLIER)
    return {**turn, "content": thought.answer}


def detect_language(text: str) -> str:
    """`ko` for Hangul, `ja` for kana or han characters, else `en`; the label is only for counts."""
    if _KOREAN_LETTER.search(text):
        return "ko"
    return "ja" if _JAPANESE_LETTER.search(text) else "en"


def _label(row: dict[str, Any], key: str) -> Any:
    if not isinstance(row[key], str | int | float | bool | None):
        raise BrokenLine("wrong type", f"`{key}` must be a string, number, boolean or null")
    return row[key]
