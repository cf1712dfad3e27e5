"""Text folded for pattern search, with a map from offsets of the folded text to offsets of the original.

Folding covers NFKC forms (full width, half-width kana, mathematical digits), the digits of other scripts, kanji digits
in runs of two or more (〇九〇), dashes of every kind, and invisible characters (zero width, soft hyphen, joiners,
variation selectors), which vanish. Circled and raised numbers become spaces, because they are list marks and exponents.
Most texts keep their offsets, since each character becomes one character; only the other texts need a map.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2043\u2212\u207b\ufe58\ufe63\uff0d\u2500\u2501\u2e3a"
_SPACES = "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000\t"
_ZERO_DIGITS = "\u0660\u06f0\u0966\u09e6\u0e50"  # zeros of the Arabic, Persian, Devanagari, Bengali and Thai digits
_LIST_MARKS = (*range(0x2460, 0x249C), *range(0x24EA, 0x2500), *range(0x2776, 0x2794), *range(0x3220, 0x322A))
_RAISED = "\u00b2\u00b3\u00b9\u2070\u2074\u2075\u2076\u2077\u2078\u2079\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087"

_ONE_TO_ONE = {
    **{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)},  # full-width ASCII
    **{ord(zero) + n: ord("0") + n for zero in _ZERO_DIGITS for n in range(10)},
    **dict.fromkeys(_LIST_MARKS, ord(" ")),
    **dict.fromkeys(map(ord, _RAISED + "\u2088\u2089\u00bc\u00bd\u00be\u2026\u2025"), ord(" ")),
    **dict.fromkeys(map(ord, _SPACES), ord(" ")),
    **dict.fromkeys(map(ord, _DASHES), ord("-")),
}
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\u20dd-\u20e4\ufe00-\ufe0f\ufeff\U000e0001-\U000e007f\U000e0100-\U000e01ef]"
)
_KANJI_RUN = re.compile("[〇零一二三四五六七八九](?:[-ーｰ]?[〇零一二三四五六七八九])+")
_KANJI_DIGITS = str.maketrans("〇零一二三四五六七八九ーｰ", "00123456789--")
_CLUSTER = 64  # characters at most; further marks begin a new cluster, because ordering them takes quadratic time
_LONG_MARK = re.compile("(?<=[0-9)])[ーｰ~](?=[0-9(〇零一二三四五六七八九])")  # 03ー1234: a long vowel mark as a dash


@dataclass(frozen=True)
class Folded:
    """Folded text; `origin[i]` is the original offset of its character i, None where offsets are the same."""

    text: str
    origin: Sequence[int] | None
    length: int  # of the original

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Original offsets of `text[start:end]` (not empty); invisible characters inside belong to it."""
        if self.origin is None:
            return start, end
        last = self.origin[end - 1]
        while end < len(self.origin) and self.origin[end] == last:
            end += 1
        return self.origin[start], self.origin[end] if end < len(self.origin) else self.length


def fold(text: str) -> Folded:
    """Fold `text`; see the module's text."""
    if text.isascii():
        return Folded(text, None, len(text))
    changed = text.translate(_ONE_TO_ONE)
    origin: list[int] | None = None
    if _INVISIBLE.search(changed) or not unicodedata.is_normalized("NFKC", changed):
        changed, origin = _normalise(changed)
        changed = changed.translate(_ONE_TO_ONE)
    changed = _KANJI_RUN.sub(lambda run: run.group().translate(_KANJI_DIGITS), changed)
    return Folded(_LONG_MARK.sub("-", changed), origin, len(text))


def _normalise(text: str) -> tuple[str, list[int]]:
    """NFKC of each cluster (a character and its combining marks), so that each result has one origin."""
    out: list[str] = []
    origin: list[int] = []
    start = 0
    while start < len(text):
        if _INVISIBLE.match(text, start):
            start += 1
            continue
        end = start + 1
        while end < min(len(text), start + _CLUSTER) and (
            unicodedata.combining(text[end]) or text[end] in "\uff9e\uff9f"
        ):
            end += 1
        folded = unicodedata.normalize("NFKC", text[start:end])
        out.append(folded)
        origin += [start] * len(folded)
        start = end
    return "".join(out), origin
