"""Markers between reasoning and answer: "The answer is", `**Answer:**`, `####`, 【答え】, `\\boxed{}`.

Colons may be half or full width, brackets and bold of any kind, or missing where the answer is one word. The last
marker counts; connectives ("So", したがって) belong to it. Earlier markers must give the same answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.data.split.answer_text import require_answer
from pipeline.data.think_form import RowError, Thought, strip_message
from pipeline.data.truth.equality import closing_brace, same_answer
from pipeline.data.truth.numerals import numbers_in, quantity

_SPACE = r"[ \t\u3000]*"
_BOLD = r"(?:\*\*|__)?"
_COLON = r"[:：＝=]"
_OPENED, _CLOSED = r"[\[［【(（「『<〈＜《]", r"[\]］】)）」』>〉＞》]"
_ENGLISH = (
    rf"(?:^{_SPACE}>{_SPACE})?{_BOLD}(?:final\s+answer{_COLON}\s*)?(?<!\w)(?:(?:so|thus|therefore|hence)\b,?\s+)?(?:the|our|my)\s+(?:final\s+|correct\s+|right\s+)?"
    rf"(?:answer|choice|option)(?:\s+(?:here|to\s+(?:the|this)\s+(?:question|problem)))?\s*"
    rf"(?:\bis\b|\bmust\s+be\b|\bwould\s+be\b|{_COLON}){_BOLD}{_SPACE}{_COLON}?{_SPACE}(?={_BOLD}(?!\s*(?:not|n't)\b))"
)
_HEAD = rf"^{_SPACE}(?:(?:>|[-•]|\*(?!\*)){_SPACE})?(?:#{{1,3}}{_SPACE})?"  # a quotation, list or heading mark in front
_NAME = r"(?:(?:the\s+)?final\s+)?(?:answer|ans\.?)|final\s+result"
_LABELLED = (
    rf"{_HEAD}{_BOLD}{_OPENED}?{_BOLD}{_SPACE}(?:{_NAME}){_SPACE}"
    rf"(?:{_BOLD}{_CLOSED}{_BOLD}{_SPACE}{_COLON}?|{_BOLD}{_SPACE}{_COLON}{_SPACE}{_BOLD}{_CLOSED}?){_BOLD}\s*"
    rf"|{_HEAD}(?:\*\*|__)?(?:final\s+)?answer(?:\*\*|__)?{_SPACE}\n+"
    rf"|(?<=[.!?])[ \t]+{_BOLD}(?:final\s+)?answer\s*{_BOLD}\s*{_COLON}{_BOLD}{_SPACE}"
    rf"|^{_SPACE}(?:final\s+)?(?:answer)[ \t\u3000]+(?=[^\s:：=]+{_SPACE}\Z)"
)
_HASHES = r"(?<!#)####(?!#)\s*"
_SO_JA = r"(?:(?:したがって|従って|よって|ゆえに|故に|だから|つまり|以上より|以上から|これより)[、,]?\s*)?"
_NAME_JA = r"(?:最終的な|最終の|最終|正しい)?(?:答え|解答|回答|正解|答)"
_JAPANESE = (
    rf"{_SO_JA}{_BOLD}(?:最終的な|最終の|最終|正しい)?(?:答え|解答|回答|正解)(?:{_BOLD}は|{_BOLD}{_SPACE}{_COLON})"
    rf"[:：、＝=\s]*{_BOLD}"
    rf"|^{_SPACE}(?:#{{1,3}}{_SPACE})?{_BOLD}{_OPENED}{_SPACE}{_NAME_JA}{_SPACE}{_CLOSED}{_BOLD}[:：、\s]*"
    rf"|^{_SPACE}(?:#{{1,3}}{_SPACE})?{_BOLD}{_NAME_JA}{_BOLD}{_SPACE}(?:{_COLON}|[.．→⇒]){_BOLD}\s*"
    rf"|^{_SPACE}(?:#{{1,6}}{_SPACE})?{_BOLD}(?:最終的な|最終)?(?:答え|解答|回答|正解){_BOLD}[ \t\u3000\n]+"
    rf"|(?<=[。.!?！？]){_SPACE}(?:答え|解答|回答|正解)[ \t\u3000]+(?=\S+\s*\Z)"
    rf"|(?<=[。.!?！？]){_SPACE}【{_NAME_JA}】[:：、]?(?!と)(?=[^\n【】]{{1,40}}\s*\Z)"
)
_KOREAN = r"(?:(?:따라서|그러므로),?\s*)?(?:정답은|답은|정답\s*[:：])\s*"
_HANDOVER = re.compile(
    f"(?P<english>{_ENGLISH}|{_LABELLED})|(?P<hashes>{_HASHES})|(?P<japanese>{_JAPANESE}|{_KOREAN})",
    re.IGNORECASE | re.MULTILINE,
)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_CALCULATOR = re.compile(r"<<[\d\s+\-*/().,%$x×÷]{1,120}=[\d\s.,/%$-]{1,40}>>")
_COPULA = re.compile(
    r"(?:です|でした|だ|である|であります|[にと]な(?:る|った|ります|りました)|(?:だ|である)?と(?:わか|分か)(?:る|ります|りました)|\s*입니다|\s*이다)$"
)
_EMPTY_LABEL = re.compile(r"(?:^|(?<=[.!?\n]))[ \t*#]*final answer\s*[:：]?[\s*]*\Z", re.IGNORECASE)
_POLITE = re.compile(r"\s*I hope it is correct\.?\s*\Z", re.IGNORECASE)
_VERB = re.compile(
    "(?:ます|ました|ません|する|した|なる|なった|いる|いた|ない|なかった|れる|れた|える|えた|でしょう|だろう)$"
)
_VALUE = 6  # words of a value behind a marker; of a longer text only the numbers are compared
_STOPS = "。." + "".join(filter(str.isspace, map(chr, range(0x3001))))


@dataclass(frozen=True)
class Handover:
    """One place where a text names its answer: the marker's span and the rest of its line."""

    kind: str  # english, hashes, japanese (Korean too)
    start: int
    end: int
    text: str


def handovers(text: str) -> list[Handover]:
    """Every marker in running text except boxes, in order."""
    return [Handover(str(m.lastgroup), m.start(), m.end(), m.group()) for m in _HANDOVER.finditer(text)]


def boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of every outermost `\\boxed{...}`.

    Raises:
        RowError: a box that is never closed.
    """
    found = []
    at = 0
    while match := _BOXED.search(text, at):
        end = closing_brace(text, match.end())
        if end < 0:
            raise RowError("answer unclear", "\\boxed{ is never closed")
        found.append((match.start(), end + 1, text[match.end() : end].strip()))
        at = end + 1
    return found


def without_calculator_marks(text: str) -> str:
    """A GSM8K text without its `<<3+4=7>>`."""
    return _CALCULATOR.sub("", text)


def split_at_marker(text: str) -> Thought:
    """Split reasoning from the explicit answer that ends it.

    Raises:
        RowError: no explicit answer at the end, no text before it, more than an answer after the marker, or two
            different answers.
    """
    found, boxed = handovers(text), boxes(text)
    if not found and not boxed:
        raise RowError(
            "no reasoning", "no /think markers and no explicit answer such as `The answer is`, `####` or 答えは"
        )
    if not found or (boxed and boxed[-1][0] > found[-1].end and not _only_the_box(text, found[-1], boxed[-1])):
        return _split_at_box(text, found, boxed)
    last = found[-1]
    answer = _answer_after(text, last)
    steps = strip_message(_EMPTY_LABEL.sub("", text[: last.start])).rstrip(",、 ").rstrip()
    steps = strip_message(without_calculator_marks(steps))
    if not steps:
        raise RowError("no reasoning", "nothing stands before the explicit answer")
    _require_one_answer(text, [h for h in found if h is not last], [b for b in boxed if b[1] <= last.start], answer)
    return Thought(steps=unbox(steps), answer=answer)


def _only_the_box(text: str, handover: Handover, box: tuple[int, int, str]) -> bool:
    """Whether the box is the whole answer behind the marker, as in `The answer is $\\boxed{5}$.`"""
    between, after = text[handover.end : box[0]], text[box[1] :]
    return not re.sub(r"[\s$*:：(\\\[]|\\\(", "", between) and not re.sub(r"[\s$*.。)\\\]]|です", "", after)


def _split_at_box(text: str, found: list[Handover], boxed: list[tuple[int, int, str]]) -> Thought:
    """Split a solution whose sentence holds the box: all of it is reasoning, the box's content is the answer."""
    answer = boxed[-1][2]
    if not answer or len(answer) > 400 or "\n" in answer:
        raise RowError("answer unclear", "the box is empty or holds a text")
    steps = strip_message(unbox(text))
    if not re.search(r"\w", re.sub(r"[\s$*.\\()\[\]]", "", text[: boxed[-1][0]])):
        raise RowError("no reasoning", "nothing stands before the box")
    _require_one_answer(text, found, boxed[:-1], answer)
    return Thought(steps=steps, answer=answer)


def unbox(text: str) -> str:
    """A text with every box replaced by its content."""
    for start, end, content in reversed(boxes(text)):
        text = text[:start] + content + text[end:]
    return text


def _answer_after(text: str, handover: Handover) -> str:
    answer = strip_message(_POLITE.sub("", text[handover.end :]))
    if handover.kind == "english":
        answer = answer.rstrip(".。 ")
    elif handover.kind == "japanese":
        answer = _COPULA.sub("", answer.rstrip(_STOPS))
    bold = re.compile(r"[*_]{2}$")
    if bold.search(answer) and answer.count("**") + answer.count("__") == 1:  # "**The answer is 5**"
        answer = bold.sub("", answer).rstrip(".。 ")
        answer = _COPULA.sub("", answer) if handover.kind == "japanese" else answer
    if handover.kind == "japanese" and _VERB.search(answer):
        raise RowError("answer unclear", "a sentence follows the marker, not an answer")
    return require_answer(answer, marker=handover.text.strip())


def final_answer(text: str) -> str | None:
    """The last marked answer of a text; None where no marked answer is certain."""
    try:
        found, boxed = handovers(text), boxes(text)
        if boxed and (not found or boxed[-1][1] > found[-1].end):
            return boxed[-1][2] or None
        return _answer_after(text, found[-1]) if found else None
    except RowError:
        return None


def last_named(text: str) -> str | None:
    """The value behind the last marker or in the last box of a text; None where the text has neither.

    Raises:
        RowError: a box that is never closed.
    """
    found, boxed = handovers(text), boxes(text)
    if boxed and (not found or boxed[-1][1] > found[-1].end):
        return boxed[-1][2] or None
    return _named_by(text, found[-1]) or None if found else None


def _require_one_answer(text: str, earlier: list[Handover], boxed: list[tuple[int, int, str]], answer: str) -> None:
    """Raise `RowError` where an earlier marker or box names another answer."""
    named = [content for _, _, content in boxed] + [_named_by(text, handover) for handover in earlier]
    for other in named:
        if other and disagrees(other, answer):
            raise RowError("two different answers", "an earlier marker names another answer than the last one")


def _named_by(text: str, handover: Handover) -> str:
    """The first sentence behind an earlier marker, without words that cannot belong to an answer."""
    line = text[handover.end :].lstrip().split("\n", 1)[0]
    sentence = re.split(r"\.(?=[\s*_]|$)|[。!?！？]", line, maxsplit=1)[0]
    return _COPULA.sub("", strip_message(sentence).rstrip("*_ "))


def disagrees(named: str, answer: str) -> bool:
    """Whether the text behind a marker is another answer than `answer`; words without a value never disagree."""
    try:
        named = require_answer(named, marker="")
    except RowError:
        pass  # more than a value: only its numbers are compared
    else:
        if same_answer(named, answer):
            return False
        if quantity(named) is not None or len(named.split()) <= _VALUE:
            return not set(numbers_in(named)) & set(numbers_in(answer)) or quantity(named) is not None
    wanted, seen = numbers_in(answer), numbers_in(named)
    return bool(wanted and seen) and not set(wanted) & set(seen)
