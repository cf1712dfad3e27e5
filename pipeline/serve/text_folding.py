"""Reduce text to the characters that a reader sees, so that a marker is recognised in any spelling.

`fold` keeps letters and digits only; `skeleton` also keeps brackets and bars, each kind in one spelling, so that every
spelling of a tag becomes one: `＜ THINK ＞`, `</t-h-i-n-k>` and `&lt;think&gt;` all become `<think>`.
`has_tags` knows the tags with which model families begin or end a thinking.
"""

from __future__ import annotations

import html
import re
import unicodedata

_FILLERS = {0x115F: None, 0x1160: None}  # Hangul fillers: letters by category, but invisible
_BRACKETS = str.maketrans("‹⟨◁›⟩▷【〔〖{】〕〗}", "<<<>>>[[[[]]]]")
_WORDS = re.compile(r"[^\W_]+")
_SKELETON = re.compile(r"[^\W_]+|[<>|\[\]]")
_STRETCH = re.compile("(?s).{1,128}")
_THINK = "(?:seed|(?:begin|end|start)(?:of)?)?(?:think|thought|reasoning)"
TAGS = rf"<[|\[\]]*{_THINK}|\[\|?{_THINK}(?:ing)?\|?\]|<\|channel|<channel\|"
_TAGS = re.compile(TAGS)


def plain(text: str) -> str:
    """The text after NFKD and case folding."""
    # In short pieces, because ordering a run of combining marks takes quadratic time.
    decomposed = "".join(unicodedata.normalize("NFKD", stretch) for stretch in _STRETCH.findall(text))
    return decomposed.casefold().translate(_FILLERS)


def fold(text: str) -> str:
    """Letters and digits, NFKD and case folded; marks, spaces, punctuation and invisible characters are dropped."""
    return "".join(_WORDS.findall(plain(text)))


def skeleton(text: str) -> str:
    """The characters that `fold` keeps, with brackets `<>[]` and bars; HTML character references are resolved first."""
    return "".join(_SKELETON.findall(plain(html.unescape(text)).translate(_BRACKETS)))


def has_tags(text: str) -> bool:
    """Whether a text holds an opening or closing thinking tag of any family in any spelling."""
    return _TAGS.search(skeleton(text)) is not None
