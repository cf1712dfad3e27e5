"""Decide whether two answers mean the same: "12", "12.0", "十二", "12 個", "\\boxed{12}" do; "12 km" and "12 m" do not.

Answers are compared as text, then as choices, yes and no, numbers with units, dates, times, weekdays, and as formulas
by math-verify (sympy). A unit counts only where both answers have one.
"""

from __future__ import annotations

import re
import unicodedata

from pipeline.data.truth.calendar import dates_in, same_date, times_in, weekdays_in
from pipeline.data.truth.numerals import MEANINGFUL, Quantity, quantity

MAX_MATHS = 120  # characters of an expression for sympy
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_CHOICE = re.compile(r"(?:option\s+|choice\s+|選択肢\s*)?(?:\(([a-j])\)|([a-j])[).:]?)$")
_CHOICE_AND_TEXT = re.compile(r"(?:\(([a-j])\)|([a-j])[).:])\s+\S")
_YES_NO = {"yes": True, "はい": True, "no": False, "いいえ": False}
_QUOTES = {"「": "」", "『": "』", "'": "'", '"': '"', "“": "”", "`": "`"}
_POWER_TOWER = re.compile(r"(?:\^|\*\*)\s*[\{\(]?\s*(?:\d{3,}|[^+\-=]*(?:\^|\*\*))|!")


def normalised(answer: str) -> str:
    """An answer's text without differences that never matter: width, case, spaces at the ends, one final full stop."""
    text = unicodedata.normalize("NFKC", answer).strip()
    return (text[:-1].strip() if text.endswith((".", "。")) else text).casefold()


def unwrap(answer: str, *, quotes: bool = True) -> str:
    """An answer without `\\boxed{}`, `$`, `\\( \\)`, bold marks and (where `quotes`) quotation marks around it."""
    text = answer.strip()
    for _ in range(8):
        before = text
        text = re.sub(r"^(\*\*|__)(.+)\1$", r"\2", text, flags=re.DOTALL).strip()
        if (found := _BOXED.match(text)) and (end := closing_brace(text, found.end())) == len(text) - 1:
            text = text[found.end() : end].strip()
        for opened, closed in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("\\text{", "}")):
            inner = text[len(opened) : len(text) - len(closed)]
            if (
                len(text) > len(opened) + len(closed)
                and text.startswith(opened)
                and text.endswith(closed)
                and not re.search(rf"(?<!\\){re.escape(opened)}|(?<!\\){re.escape(closed)}", inner)
            ):
                text = inner.strip()
        if quotes and len(text) > 2 and _QUOTES.get(text[0]) == text[-1] and text[-1] not in text[1:-1]:
            text = text[1:-1].strip()
        if text == before:
            break
    return text


def closing_brace(text: str, start: int) -> int:
    """Index of the brace that closes the brace just before `start`, without escaped braces; -1 where it is missing."""
    depth, at = 1, start
    while at < len(text):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return at
        at += 2 if text[at] == "\\" else 1
    return -1


def same_answer(first: str, second: str) -> bool:
    """Whether two answers mean the same; symmetric."""
    if normalised(first) == normalised(second):
        return True
    a, b = (normalised(unwrap(text.strip().rstrip("。"))) for text in (first, second))
    if not a or not b:
        return False
    if a == b or re.sub(r"\s+", " ", a) == re.sub(r"\s+", " ", b):
        return True
    if a in _YES_NO and b in _YES_NO:
        return _YES_NO[a] == _YES_NO[b]
    letters = [_CHOICE.match(text) or _CHOICE_AND_TEXT.match(text) for text in (a, b)]
    if letters[0] and letters[1]:
        chosen = [match[1] or match[2] for match in letters if match]
        bare = any(_CHOICE.match(text) for text in (a, b))
        return chosen[0] == chosen[1] and bare
    numbers = quantity(a), quantity(b)
    if numbers[0] is not None and numbers[1] is not None:
        return _same_quantity(numbers[0], numbers[1])
    if _same_calendar(a, b):
        return True
    return _same_maths(*(unicodedata.normalize("NFKC", unwrap(text.strip().rstrip(".。"))) for text in (first, second)))


def _same_quantity(a: Quantity, b: Quantity) -> bool:
    if {a.unit, b.unit} == {"%", ""} and a.value != b.value:
        percent, plain = (a, b) if a.unit == "%" else (b, a)
        return percent.value == 100 * plain.value
    if a.value != b.value:
        return False
    if a.unit == b.unit:
        return True
    lone = a.unit or b.unit
    return (not a.unit or not b.unit) and not any(lone.startswith(mark) for mark in MEANINGFUL)


def _same_calendar(a: str, b: str) -> bool:
    """Whether both sides are the same one date, time or weekday, with no other word of weight."""
    if max(len(a), len(b)) > 60:
        return False
    dates = dates_in(a), dates_in(b)
    if all(len(found) == 1 for found in dates):
        return same_date(dates[0][0], dates[1][0])
    times = times_in(a), times_in(b)
    if all(len(found) == 1 for found in times) and not any(dates):
        (hour, minute, half), (hour2, minute2, half2) = times[0][0], times[1][0]
        readings = _hours(hour, half), _hours(hour2, half2)
        return minute == minute2 and _hour(hour, half) in readings[1] and _hour(hour2, half2) in readings[0]
    days = weekdays_in(a), weekdays_in(b)
    short = all(len(text) <= 12 for text in (a, b))
    return all(len(found) == 1 for found in days) and short and days[0] == days[1]


def _hour(hour: int, half: str) -> int:
    return hour % 12 + 12 if half == "pm" else hour % 12 if half == "am" else hour


def _hours(hour: int, half: str) -> set[int]:
    """Hours of the day that a written hour may mean."""
    exact = _hour(hour, half)
    return {exact} if half or hour > 12 else {exact, exact % 12, exact % 12 + 12}


def _same_maths(a: str, b: str) -> bool:
    """Whether formulas or sets are equal; sympy gets only short texts without towers of powers."""
    if (
        max(len(a), len(b)) > MAX_MATHS
        or "\n" in a + b
        or not all(re.search(r"\d|\\|\^|=|√|π|\bpi\b", text) for text in (a, b))
    ):
        return False
    if any("=" in text and not re.match(r"[A-Za-z]_?\w?\s*=[^=]+$", text) for text in (a, b)):
        return False  # a chain of steps: math-verify would take its last part
    if any(_POWER_TOWER.search(text) for text in (a, b)) or re.search(r"\d{30}", a + b):
        return False
    words = re.sub(r"\\[A-Za-z]+|\b(?:pi|sqrt|sin|cos|tan|log|ln|exp|or|and|inf|infty)\b", "", a + " " + b)
    if re.search(r"[A-Za-z]{3,}|[^\x00-\x7f√π∞±≤≥∪∩°]", words):
        return False  # prose, not mathematics
    return _verified(a, b)


def _verified(a: str, b: str) -> bool:
    """Whether math-verify finds both equal; an expression that it cannot read is not equal.

    math-verify's time limit needs the main thread's alarm, which a library must not set; `_same_maths` bounds the work.
    """
    import logging

    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    parsed = [parse(f"${text.strip('$')}$", parsing_timeout=None, raise_on_error=False) for text in (a, b)]
    if not all(parsed):
        return False
    return bool(verify(parsed[0], parsed[1], timeout_seconds=None, raise_on_error=False)) and bool(
        verify(parsed[1], parsed[0], timeout_seconds=None, raise_on_error=False)
    )
