"""Read numbers with units as people write them: 12.0, 1,200, １２, 十二, 1万2千, 1 1/2, \\frac{1}{2}, 1.5e3, twelve.

Values are exact fractions. A unit is the word behind a number (12 個, 12 km, 12%) or a currency in front ($12, ¥12).
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 60  # of one number; a longer run of digits is no answer, and its powers cost time
MAX_TEXT = 200  # characters of a text that is tried as a number

_KANJI = dict(zip("〇零一二三四五六七八九", (0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9), strict=True))
_SMALL = {"十": 10, "百": 100, "千": 1000}
_LARGE = {"万": 10**4, "億": 10**8, "兆": 10**12}
_WORDS = {
    word: value
    for value, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
        ]
    )
} | {
    word: 20 + 10 * place
    for place, word in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"])
}
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_DIGITS = r"\d{1,3}(?:,\d{3})+(?!\d)|\d+"
DECIMAL = rf"(?:(?:{_DIGITS})(?:\.\d+)?|\.\d+)(?:e[+-]?\d{{1,3}}(?!\w))?"
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?P<money>[$¥€£]?)\s*(?P<sign2>-?)"
    rf"(?:(?P<whole>\d+)\s+(?P<mixed>\d+)\s*/\s*(?P<by>\d+)|(?P<top>\d+)\s*/\s*(?P<under>\d+)|(?P<plain>{DECIMAL}))"
    rf"(?P<rest>.*)",
    re.DOTALL | re.IGNORECASE,
)
_KANJI_NUMBER = re.compile(r"(?P<number>[〇零一二三四五六七八九十百千万億兆]+)(?P<rest>.*)", re.DOTALL)
_ANY_NUMBER = re.compile(
    rf"(?:(?<![\w.)])-)?(?:\d+\s*/\s*\d+(?!\s*/)|\d+(?:\.\d+)?[万億兆千百]|{DECIMAL})|[〇一二三四五六七八九十百千万億]+",
    re.IGNORECASE,
)
_MIXED_KANJI = re.compile(r"\d+(?:\.\d+)?[十百千万億兆][\d十百千万億兆]*")
_MONEY = {"$": "dollar", "¥": "円", "€": "euro", "£": "pound"}
# Each line has the spellings of one unit; the first spelling is compared. A plural loses its s first.
_SPELLINGS = """
円 yen jpy
dollar ドル usd
euro ユーロ eur
% percent パーセント \\%
秒 second sec
分 minute min
時間 hour hr
日 day
週間 week
ヶ月 month か月
年 year
人 people person 名
km kilometer kilometre キロメートル
m meter metre メートル
cm centimeter centimetre センチメートル
kg kilogram キログラム
g gram グラム
l liter litre リットル
度 degree °
倍 times
"""
_SAME_UNIT = {other: first for first, *others in map(str.split, _SPELLINGS.strip().splitlines()) for other in others}
# Marks behind a number that change its meaning: they may not be left out like a unit.
MEANINGFUL = {"am", "pm", "a.m", "p.m", "st", "nd", "rd", "th", "番目", "月", "時", "角形", "次", "位", "進数", "番"}


@dataclass(frozen=True)
class Quantity:
    """An exact value and its unit in one spelling (empty: none)."""

    value: Fraction
    unit: str = ""


def fold(text: str) -> str:
    """NFKC, lower case, every minus a hyphen."""
    return re.sub("[−‐‑–—ー](?=\\s*[\\d$¥€£.])", "-", unicodedata.normalize("NFKC", text)).casefold().strip()


def quantity(text: str) -> Quantity | None:
    """The number that `text` consists of, with its unit; None where it is no single number."""
    if len(text) > MAX_TEXT:
        return None
    folded = _FRACTION.sub(lambda m: f"{m[1]}/{m[2]}", fold(text).strip("$ ") if text.count("$") > 1 else fold(text))
    folded = (
        folded.strip().removesuffix("です").rstrip(".。 ").replace("\\$", "$").replace("\\,", "").replace("{,}", ",")
    )
    if found := _MIXED_KANJI.match(folded):
        value, rest = _kanji_value(found[0]), folded[found.end() :]
        return _with_unit(value, rest) if value is not None else None
    if (found := _NUMBER.fullmatch(folded)) is not None:
        value = _value(found)
        return None if value is None else _with_unit(value, found["rest"], _MONEY.get(found["money"], ""))
    if found := _KANJI_NUMBER.fullmatch(folded):
        value = _kanji_value(found["number"])
        return _with_unit(value, found["rest"]) if value is not None else None
    return _from_words(folded)


def numbers_in(text: str) -> list[Fraction]:
    """Every number written in digits or kanji numerals inside a text, in order."""
    folded = _FRACTION.sub(lambda m: f"{m[1]}/{m[2]}", fold(text)).replace("{,}", ",")
    found: list[Fraction] = []
    for match in _ANY_NUMBER.finditer(folded):
        part = quantity(match[0])
        if part is not None:
            found.append(part.value)
        if "/" in match[0]:
            found += [Fraction(int(n)) for n in re.findall(r"\d+", match[0])]
    return found


def _value(found: re.Match[str]) -> Fraction | None:
    if max(map(len, re.findall(r"\d+", found[0])), default=0) > MAX_DIGITS:
        return None
    sign = -1 if "-" in (found["sign"], found["sign2"]) else 1
    if found["whole"]:
        return (
            sign * (int(found["whole"]) + Fraction(int(found["mixed"]), int(found["by"]))) if int(found["by"]) else None
        )
    if found["top"]:
        return sign * Fraction(int(found["top"]), int(found["under"])) if int(found["under"]) else None
    return sign * Fraction(found["plain"].replace(",", ""))


def _with_unit(value: Fraction, rest: str, money: str = "") -> Quantity | None:
    unit = re.sub(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", rest)
    unit = unit.replace("\\ ", " ").replace("\\circ", "度").replace("^", "").strip(" .。{}")
    first, _, tail = unit.partition(" ")
    if first in _SCALES:
        value, unit = value * _SCALES[first], tail
    if re.search(r"[\\π√]|^[a-z]$(?<![mglsh])", unit):
        return None  # 2π, 3x: a formula
    if re.search(r"[\d=<>,;:()\[\]/*+?!]", unit.replace("km/h", "").replace("m/s", "")) or len(unit) > 40:
        return None  # more than a number and its unit
    return Quantity(value, money if money and not unit else _one_spelling(unit))


def _one_spelling(unit: str) -> str:
    unit = unit.removeprefix("of ").strip()
    if unit in _SAME_UNIT:
        return _SAME_UNIT[unit]
    singular = unit[:-1] if unit.endswith("s") and len(unit) > 2 else unit
    return _SAME_UNIT.get(singular, singular)


def _kanji_value(text: str) -> Fraction | None:
    """Value of a numeral in kanji, or in digits with 十, 百, 千, 万 between; None if their order makes no sense."""
    if all(letter in _KANJI for letter in text):  # one digit a place: 二〇二六
        return Fraction(int("".join(str(_KANJI[letter]) for letter in text))) if len(text) <= MAX_DIGITS else None
    total = section = Fraction(0)
    pending: Fraction | None = None
    last_small, last_large = 10**4, 10**16
    for piece in re.findall(r"\d+(?:\.\d+)?|.", text):
        if piece in _SMALL:
            if _SMALL[piece] >= last_small:
                return None
            section += (pending if pending is not None else 1) * _SMALL[piece]
            last_small, pending = _SMALL[piece], None
        elif piece in _LARGE:
            section += pending or 0
            if _LARGE[piece] >= last_large or not section:
                return None
            total += section * _LARGE[piece]
            section, pending, last_small, last_large = Fraction(0), None, 10**4, _LARGE[piece]
        elif pending is not None:
            return None
        else:
            pending = Fraction(_KANJI[piece]) if piece in _KANJI else Fraction(piece)
    return total + section + (pending or 0)


def _from_words(text: str) -> Quantity | None:
    """`twenty-one apples`: English number words, then the unit."""
    total, current, used = 0, 0, 0
    words = text.replace("-", " ").split()
    for word in words:
        if word in _WORDS:
            current += _WORDS[word]
        elif word in _SCALES and current:
            current *= _SCALES[word]
            if _SCALES[word] > 100:
                total, current = total + current, 0
        elif not (word == "and" and used):
            break
        used += 1
    if not used or len(words) - used > 2:
        return None
    return _with_unit(Fraction(total + current), " ".join(words[used:]))
