"""Dates, clock times and weekdays in English and Japanese, each as one comparable value."""

from __future__ import annotations

import re

from pipeline.data.truth.numerals import fold

_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_MONTH = r"(?P<{}>jan|feb|mar|apr|may|jun|jul|aug|sept?|oct|nov|dec)[a-z]*\.?"
_DATES = (
    re.compile(r"(?<!\d)(?P<year>\d{4})[-/.](?P<month>\d{1,2})[-/.](?P<day>\d{1,2})(?!\d)"),
    re.compile(r"(?:(?P<year>\d{4})\s*年\s*)?(?P<month>\d{1,2})\s*月\s*(?P<day>\d{1,2})\s*日"),
    re.compile(rf"\b{_MONTH.format('name')}\s+(?P<day>\d{{1,2}})(?:st|nd|rd|th)?\b(?!:)(?:,?\s+(?P<year>\d{{4}}))?"),
    re.compile(
        rf"\b(?P<day>\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?{_MONTH.format('name')}\b(?:,?\s+(?P<year>\d{{4}}))?"
    ),
)
_TIMES = (
    re.compile(r"(?<![\d:])(?P<hour>\d{1,2}):(?P<minute>\d{2})(?![\d:])\s*(?P<half>[ap]\.?m\b\.?)?"),
    re.compile(r"(?P<half>午前|午後)?\s*(?P<hour>\d{1,2})\s*時(?!間)\s*(?:(?P<minute>\d{1,2})\s*分|(?P<thirty>半))?"),
    re.compile(r"\b(?P<hour>\d{1,2})\s*(?P<half>[ap]\.?m\b\.?)"),
)
_DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
_WEEKDAY = re.compile(rf"\b({'|'.join(_DAYS)})s?\b|([月火水木金土日])曜")

Date = tuple[int | None, int, int]
Clock = tuple[int, int, str]


def dates_in(text: str) -> list[Date]:
    """(year or None, month, day) of every date, in the order of the patterns, then of the text."""
    folded = fold(text)
    found: list[Date] = []
    for pattern in _DATES:
        for match in pattern.finditer(folded):
            parts = match.groupdict()
            month = int(parts["month"]) if parts.get("month") else _MONTHS.index(str(parts["name"])[:3]) + 1
            year = parts.get("year")
            if 1 <= month <= 12 and 1 <= int(match["day"]) <= 31:
                found.append((int(year) if year else None, month, int(match["day"])))
    return found


def same_date(a: Date, b: Date) -> bool:
    """Whether month and day are equal, and the years too where both dates have one."""
    return a[1:] == b[1:] and (a[0] is None or b[0] is None or a[0] == b[0])


def times_in(text: str) -> list[Clock]:
    """(hour, minute, `am`, `pm` or empty) of every clock time."""
    folded = fold(text)
    found: list[Clock] = []
    for pattern in _TIMES:
        for match in pattern.finditer(folded):
            parts = match.groupdict()
            half = {"午前": "am", "午後": "pm"}.get(parts["half"] or "", (parts["half"] or "").replace(".", ""))
            minute = 30 if parts.get("thirty") else int(parts.get("minute") or 0)
            found.append((int(match["hour"]), minute, half))
    return list(dict.fromkeys(found))


def weekdays_in(text: str) -> list[int]:
    """Weekdays in order, Monday = 0."""
    return [_DAYS.index(m[1]) if m[1] else "月火水木金土日".index(m[2]) for m in _WEEKDAY.finditer(fold(text))]
