"""Thinking between tags, `<think>...</think>` and similar, anywhere in a text; the opening tag may be missing.

A split is certain with one pair of tags of one name in order, or with one closing tag and the thinking in front of it
(as templates leave it that open the block themselves). It is not certain with nested, repeated, unclosed or crossed
tags, or a closing tag without text before it. An empty block (`<think></think>`) comes from a template and is removed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.data.think_form import RowError, strip_message

_THINKING = "think|thinking|thought|thoughts|reasoning|reason|scratchpad|chain_of_thought|cot|rationale|seed:think"
_ANSWER = "answer|final_answer|final|solution|response|output|conclusion"
_ATTRIBUTES = r"""(?:\s+[\w:-]+\s*=\s*(?:"[^"<>]*"|'[^'<>]*'|[^\s<>"']+))*\s*"""
_TAG = re.compile(
    rf"<\s*(?P<end1>/?)\s*(?P<think1>{_THINKING}){_ATTRIBUTES}>"
    rf"|\[(?P<end2>/?)(?P<think2>THINK|THINKING|REASONING)\]"
    rf"|<\|(?P<end3>begin|end)_of_(?P<think3>thought)\|>"
    rf"|◁(?P<end4>/?)(?P<think4>think)▷"
    rf"|<\|(?P<end5>START|END)_(?P<think5>THINKING)\|>"
    rf"|<\s*(?P<end6>/?)\s*(?P<answer1>{_ANSWER}){_ATTRIBUTES}>"
    rf"|<\|(?P<end7>begin|end)_of_(?P<answer2>solution)\|>"
    rf"|<\|(?P<end8>START|END)_(?P<answer3>RESPONSE)\|>",
    re.IGNORECASE,
)
_CHANNELS = re.compile(
    r"\s*(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>(?P<steps>.*?)<\|end\|>\s*"
    r"<\|start\|>assistant<\|channel\|>final<\|message\|>(?P<answer>.*?)(?:<\|return\|>|<\|end\|>)?\s*",
    re.DOTALL,
)


# An unknown tag that may enclose thinking: its text is never taken for steps.
_LOOKALIKE = re.compile(
    r"(?:[<＜◁]|&lt;)\s*[|/]{0,2}\s*(?:begin_of_|end_of_)?"
    r"(?:think|thought|reason|scratchpad|reflect|inner[_ ]?mono|ant_?thinking|cot\b|chain_of)"
    r"[^<>＜＞\n]{0,40}?(?:[>＞▷]|&gt;)",
    re.IGNORECASE,
)
# Leftovers of a damaged tag in the steps: a tag or a word with > at their start, half a closing tag anywhere.
_DEBRIS = re.compile(
    r"\A\s*(?:</?[A-Za-z]|\[/?[A-Za-z_]{1,24}\]|/?[A-Za-z_]{4,24}>)|</?[A-Za-z_]*\s*\Z|</[A-Za-z_]*(?![A-Za-z_]*>)"
)


@dataclass(frozen=True)
class Tag:
    """One tag in a text."""

    kind: str  # think or answer
    name: str
    closes: bool
    start: int
    end: int


@dataclass(frozen=True)
class Tagged:
    """A text that was split at its thinking tags; `steps` is empty if the block was empty."""

    steps: str
    rest: str


def tags(text: str) -> list[Tag]:
    """Every thinking and answer tag, in order."""
    found = []
    for match in _TAG.finditer(text):
        parts = {key: value for key, value in match.groupdict().items() if value is not None}
        key = next(key for key in parts if key.startswith(("think", "answer")))
        ends = next((value for key, value in parts.items() if key.startswith("end")), "")
        kind = "think" if key.startswith("think") else "answer"
        found.append(Tag(kind, parts[key].lower(), ends.lower() in ("/", "end"), match.start(), match.end()))
    return found


def has_tag(text: str) -> bool:
    """True if a thinking tag, or both ends of an answer tag, stand in `text`."""
    found = tags(text)
    answers = [tag for tag in found if tag.kind == "answer"]
    both = {tag.name for tag in answers if tag.closes} & {tag.name for tag in answers if not tag.closes}
    return any(tag.kind == "think" for tag in found) or bool(both) or "<|channel|>" in text


def resembles_tag(text: str) -> bool:
    """True if something in `text` looks like a thinking tag, known or not."""
    return _LOOKALIKE.search(text) is not None or has_tag(text)


def take_thinking(text: str) -> Tagged | None:
    """Split a text at its thinking tags; None where it has no such tag.

    Raises:
        RowError: the tags leave it uncertain which text is thinking.
    """
    if "<|channel|>" in text:
        found = _CHANNELS.fullmatch(text)
        if found is None or "<|channel|>" in found["steps"] + found["answer"]:
            raise RowError("thinking tags unclear", "channels other than one analysis and one final")
        return Tagged(strip_message(found["steps"]), strip_message(found["answer"]))
    think = [tag for tag in tags(text) if tag.kind == "think"]
    if not think:
        return None
    shape = "".join("c" if tag.closes else "o" for tag in think)
    if shape == "o" or shape.endswith("o"):
        raise RowError("thinking tags unclosed", f"<{think[-1].name}> is never closed")
    if "oo" in shape:
        raise RowError("thinking tags nested", f"<{think[0].name}> opens twice")
    if shape.count("c") > 1:
        raise RowError("thinking tags repeated", f"{shape.count('c')} closing tags; certain is one")
    if len({tag.name for tag in think}) > 1:
        raise RowError("thinking tags unclear", f"<{think[0].name}> is closed by <{think[-1].name}>")
    close = think[-1]
    start = think[0].end if shape == "oc" else 0
    before = text[: think[0].start] if shape == "oc" else ""
    inner = strip_message(text[start : close.start])
    if shape == "c" and not inner:
        raise RowError("thinking tags unclear", "a closing tag with nothing before it")
    if any(tag.kind == "answer" and tag.end <= close.start for tag in tags(text)):
        raise RowError("thinking tags unclear", "an answer tag stands before the thinking ends")
    if _DEBRIS.search(inner):
        raise RowError("thinking tags unclear", "half a tag stands inside the thinking")
    steps = strip_message(f"{strip_message(before)}\n\n{inner}") if inner else ""
    rest = strip_message(text[close.end :]) if inner else strip_message(before + text[close.end :])
    return Tagged(steps, rest)


def take_answer(text: str) -> tuple[str, str] | None:
    """(text in front, answer) of a text that ends in one answer block; None where it has no such tags.

    Raises:
        RowError: several blocks, an unclosed or empty block, or text behind the block.
    """
    found = [tag for tag in tags(text) if tag.kind == "answer"]
    names = {tag.name for tag in found if tag.closes} & {tag.name for tag in found if not tag.closes}
    if not names and any(tag.name.endswith("answer") or text[tag.start : tag.end].startswith("<|") for tag in found):
        raise RowError("answer tags unclear", f"<{found[0].name}> is open or closed alone")
    found = [tag for tag in found if tag.name in names]
    if not found:
        return None
    if len(found) != 2 or found[0].closes or not found[1].closes:
        raise RowError("answer tags unclear", f"{len(found)} answer tags; certain is one pair")
    if strip_message(text[found[1].end :]):
        raise RowError("answer tags unclear", "text follows the answer's tag")
    answer = strip_message(text[found[0].end : found[1].start])
    if not answer:
        raise RowError("empty answer", f"nothing stands in <{found[0].name}>")
    return strip_message(text[: found[0].start]), answer
