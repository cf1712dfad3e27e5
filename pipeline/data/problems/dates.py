"""Dates and clock problems: weekdays, days of a month, minutes.

Trained: going forward, and counting days. Held out: the same going backward.
Dates stay inside days 1-28 and times inside one hour, so no calendar rule decides an answer.
"""

from __future__ import annotations

from pipeline.data.problems.base import Family, Solution, add_steps, subtract_steps

WEEKDAYS = {
    "ja": ("月曜日", "火曜日", "水曜日", "木曜日", "金曜日", "土曜日", "日曜日"),
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
}
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


def _date(language: str, month: int, day: int) -> str:
    return f"{month}月{day}日" if language == "ja" else f"{MONTHS[month - 1]} {day}"


def _weekday_chain(language: str, day: int, moves: int, direction: int) -> tuple[str, str]:
    """(the days on the way, numbered, because without numbers a small model never stops; the last day)."""
    names = [WEEKDAYS[language][(day + direction * k) % 7] for k in range(moves + 1)]
    shown = [name[0] for name in names] if language == "ja" else names
    return " → ".join([shown[0], *(f"{k} {name}" for k, name in enumerate(shown[1:], start=1))]), names[-1]


def _weekday_after(language: str, day: int, days: int) -> Solution:
    chain, last = _weekday_chain(language, day, days % 7, 1)
    steps = f"{days} - 7 = {days - 7}\n{chain}" if days >= 7 else chain
    return Solution({"day": WEEKDAYS[language][day], "n": days}, steps, last)


def _weekday_before(language: str, day: int, days: int) -> Solution:
    chain, last = _weekday_chain(language, day, days, -1)
    return Solution({"day": WEEKDAYS[language][day], "n": days}, chain, last)


def _date_after(language: str, month: int, day: int, days: int) -> Solution:
    slots = {"date": _date(language, month, day), "n": days}
    return Solution(slots, f"{day} + {days} = {day + days}", _date(language, month, day + days))


def _date_before(language: str, month: int, day: int, days: int) -> Solution:
    slots = {"date": _date(language, month, day), "n": days}
    return Solution(slots, f"{day} - {days} = {day - days}", _date(language, month, day - days))


def _days_between(language: str, month: int, first: int, last: int) -> Solution:
    slots = {"first": _date(language, month, first), "last": _date(language, month, last)}
    return Solution(slots, subtract_steps(last, first), str(last - first))


def _clock_after(language: str, hour: int, minute: int, minutes: int) -> Solution:
    slots = {"time": f"{hour}:{minute:02d}", "n": minutes}
    return Solution(slots, add_steps(minute, minutes), f"{hour}:{minute + minutes:02d}")


def _clock_before(language: str, hour: int, minute: int, minutes: int) -> Solution:
    slots = {"time": f"{hour}:{minute:02d}", "n": minutes}
    return Solution(slots, subtract_steps(minute, minutes), f"{hour}:{minute - minutes:02d}")


FAMILIES = (
    Family(
        "weekday_after",
        "dates",
        False,
        tuple((day, n) for day in range(7) for n in range(1, 11)),
        {
            "ja": ("今日は{day}です。{n} 日後は何曜日?", "{day}の {n} 日後は?", "{day}から {n} 日たつと何曜日?"),
            "en": (
                "Today is {day}. What day is it in {n} days?",
                "What weekday is {n} days after {day}?",
                "It is {day}. Which day comes {n} days later?",
            ),
        },
        _weekday_after,
    ),
    Family(
        "date_after",
        "dates",
        False,
        tuple((m, d, n) for m in range(1, 13) for d in range(1, 21) for n in range(2, 9)),
        {
            "ja": ("{date}の {n} 日後は何月何日?", "{date}から {n} 日たつと?"),
            "en": ("What is the date {n} days after {date}?", "It is {date}. What date is it in {n} days?"),
        },
        _date_after,
    ),
    Family(
        "days_between",
        "dates",
        False,
        tuple((m, a, b) for m in range(1, 13) for a in range(1, 20, 2) for b in range(a + 2, min(a + 15, 29))),
        {
            "ja": ("{first}から{last}まで何日ありますか。", "{first}の何日後が{last}?"),
            "en": ("How many days are there from {first} to {last}?", "{last} is how many days after {first}?"),
        },
        _days_between,
    ),
    Family(
        "clock_after",
        "dates",
        False,
        tuple((h, m, n) for h in range(6, 22) for m in range(0, 55, 5) for n in range(5, 60 - m, 5)),
        {
            "ja": ("{time} の {n} 分後は何時何分?", "今 {time} です。{n} 分後は?"),
            "en": ("What time is it {n} minutes after {time}?", "It is {time}. What time is it in {n} minutes?"),
        },
        _clock_after,
    ),
    Family(
        "weekday_before",
        "dates",
        True,
        tuple((day, n) for day in range(7) for n in range(1, 7)),
        {
            "ja": ("今日は{day}です。{n} 日前は何曜日?", "{day}の {n} 日前は?"),
            "en": ("Today is {day}. What day was it {n} days ago?", "What weekday is {n} days before {day}?"),
        },
        _weekday_before,
    ),
    Family(
        "date_before",
        "dates",
        True,
        tuple((m, d, n) for m in range(1, 13) for d in range(10, 29) for n in range(2, 9)),
        {
            "ja": ("{date}の {n} 日前は何月何日?", "今日は{date}です。{n} 日前は?"),
            "en": ("What is the date {n} days before {date}?", "It is {date}. What date was it {n} days ago?"),
        },
        _date_before,
    ),
    Family(
        "clock_before",
        "dates",
        True,
        tuple((h, m, n) for h in range(6, 22) for m in range(10, 60, 5) for n in range(5, m + 1, 5)),
        {
            "ja": ("{time} の {n} 分前は何時何分?", "今 {time} です。{n} 分前は?"),
            "en": ("What time is it {n} minutes before {time}?", "It is {time}. What time was it {n} minutes ago?"),
        },
        _clock_before,
    ),
)
