"""Split a whole assistant text into steps and answer, by /think markers, thinking tags, answer tags, answer markers."""

from __future__ import annotations

import re

from pipeline.data.split.answer_text import require_answer
from pipeline.data.split.markers import (
    disagrees,
    final_answer,
    handovers,
    last_named,
    split_at_marker,
    without_calculator_marks,
)
from pipeline.data.split.tags import has_tag, resembles_tag, take_answer, take_thinking
from pipeline.data.think_form import RowError, Thought, has_marker, require, strip_message


def split_text(text: str) -> Thought:
    """Split a text at its own marks; nothing is invented, and an uncertain split is refused.

    Raises:
        RowError: the reason, see docs/data.md.
    """
    text = strip_message(text)
    if has_marker(text):
        if has_tag(text):
            raise RowError("two thinking forms", "/think markers and thinking tags in one text")
        return require(text)
    tagged = take_thinking(text)
    if tagged is None or not tagged.steps:
        plain = text if tagged is None else tagged.rest
        block = take_answer(plain)
        if block is None:
            return checked(split_at_marker(plain))
        steps, answer = block
        if not steps:
            raise RowError("no reasoning", "nothing stands before the answer's tag")
        return checked(Thought(without_calculator_marks(steps), reduced(answer)))
    return checked(thought_of(tagged.steps, tagged.rest))


def thought_of(steps: str, rest: str) -> Thought:
    """The thought of known steps and the text that follows them.

    Raises:
        RowError: no text follows, or its tags are not certain.
    """
    if not rest:
        raise RowError("empty answer", "nothing follows the thinking")
    block = take_answer(rest)
    if block is None:
        return Thought(steps, reduced(rest))
    between, answer = block
    return Thought(strip_message(f"{steps}\n\n{between}") if between else steps, reduced(answer))


def reduced(text: str) -> str:
    """The answer in the text behind the thinking: the value of its marker, or the whole text if there is more."""
    text = strip_message(text)
    found = handovers(text)
    if len(found) == 1 and found[0].start == 0:
        answer = final_answer(text)
        return text if answer is None else answer
    if re.fullmatch(r"\\\[?\s*\$*\s*\\boxed\{.*\}\s*\$*\s*(?:\\\])?\.?|\$+\\boxed\{.*\}\$+\.?", text):
        answer = final_answer(text)
        return text if answer is None else answer
    try:
        return require_answer(text, marker="") if "**" in text and "\n" not in text else text
    except RowError:
        return text


def checked(thought: Thought) -> Thought:
    """Return the thought if its parts do not contradict each other.

    Raises:
        RowError: tags or markers left over, or steps whose last marked answer is another one.
    """
    for part in (thought.steps, thought.answer):
        if resembles_tag(part):
            raise RowError("thinking tags unclear", "a tag is left over")
        if has_marker(part):
            raise RowError("two thinking forms", "/think markers inside the thinking or the answer")
    named = last_named(thought.steps)
    final = final_answer(thought.answer) or thought.answer
    if named is not None and disagrees(named, final):
        raise RowError("two different answers", "the thinking names another answer at its end than the reply")
    return thought
