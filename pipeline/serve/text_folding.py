"""Text reduced to what a reader sees, so that a marker is recognised whatever it is written with.

`fold` keeps letters and digits alone; `skeleton` keeps brackets and bars as well, each kind in one spelling, so that a
tag in any dress has one form: `＜ THINK ＞`, `</t-h-i-n-k>` and `&lt;think&gt;` all become `<think>`.
`has_tags` knows what the model families use to begin or end a thinking.
"""

from __future__ import annotations

import html
import re
import unicodedata

_FILLERS = {0x115F: None, 0x1160: None}  # Hangul fillers: letters by category, invisible on the screen
_BRACKETS = str.maketrans("‹⟨◁›⟩▷【〔〖{】〕〗}", "<<<>>>[[[[]]]]")
_WORDS = re.compile(r"[^\W_]+")
_SKELETON = re.compile(r"[^\W_]+|[<>|\[\]]")
_STRETCH = re.compile("(?s).{1,128}")
_THINK = "(?:seed|(?:begin|end|start)(?:of)?)?(?:think|thought|reasoning)"
TAGS = rf"<[|\[\]]*{_THINK}|\[\|?{_THINK}(?:ing)?\|?\]|<\|channel|<channel\|"
_TAGS = re.compile(TAGS)


def plain(text: str) -> str:
    """NFKD and case folded."""
    # Stretch by stretch: a run of combining marks is put in order in the square of its length.
    decomposed = "".join(unicodedata.normalize("NFKD", stretch) for stretch in _STRETCH.findall(text))
    return decomposed.casefold().translate(_FILLERS)


def fold(text: str) -> str:
    """Letters and digits, NFKD and case folded; marks, spaces, punctuation and invisible characters are dropped."""
    return "".join(_WORDS.findall(plain(text)))


def skeleton(text: str) -> str:
    """The characters that `fold` keeps, with brackets `<>[]` and bars; HTML character references are resolved first."""
    return "".join(_SKELETON.findall(plain(html.unescape(text)).translate(_BRACKETS)))


def has_tags(text: str) -> bool:
    """Whether a tag of thinking stands in a text, opening or closing, of any family and in any dress."""
    return _TAGS.search(skeleton(text)) is not None
