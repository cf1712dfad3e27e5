"""Decide whether the text behind an answer marker is an answer and nothing else."""

from __future__ import annotations

import re

from pipeline.data.split.tags import has_tag
from pipeline.data.think_form import RowError, strip_message
from pipeline.data.truth.equality import unwrap

MAX_ANSWER = 400  # characters of an answer behind a marker in running text
_PAIRS = {"(": ")", "[": "]", "{": "}", "（": "）", "【": "】", "「": "」", "『": "』"}
_SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\bvs)(?<!\b[A-Z])[.!?]\s+\S|[。！？](?=.)")
_EDGE = ":：=、。,，.)）】」』]>*|"  # no answer begins with one of these
_GOES_ON = re.compile(
    r"\b(?:because|since|but|wait|however|actually|instead|unless|let me|let's|hmm|maybe|perhaps|probably|whether|"
    r"so that|therefore|rather than|I (?:guess|think|believe|suppose))\b|,\s*(?:so|and|which|as|not|for)\b|\bor\b"
    r"|か\s*\d|\d\S{0,3}か(?:\s|$)|(?:でしょう|です|だろう|の|何|どれ|どこ|いつ|誰|いくつ|いくら)か$"
    r"|^\S*\d\S*\s+(?:if|when|unless|for)\b"
    r"|[でてりし]、|(?:ので|から|ため|けれど|けど|しかし|ただし|いや|待って|ではな|じゃな|または|もしくは|かもしれ|たぶん|おそらく|違う|間違)",
    re.IGNORECASE,
)
# Words that point to an answer elsewhere, or say that there is no answer.
_ELSEWHERE = re.compile(
    r"(?:as follows|see|given (?:by|in|above|below)|shown|left (?:as|to)|the following|listed|described|explained|"
    r"above|below|(?:in|on) the (?:table|figure|text|list|picture|image|graph))\b|.*[:：]$",
    re.IGNORECASE,
)


def require_answer(text: str, *, marker: str) -> str:
    """The answer in `text`, without bold marks, a box or a final full stop.

    Args:
        marker: the marker in front of the text, for the message.
    Raises:
        RowError: no text, or more than an answer: another sentence, a reason, an alternative, open brackets.
    """
    text = strip_message(text)
    if "\n" in text:
        raise RowError("no reasoning", "text follows the explicit answer, so the row does not end in it")
    bare = unwrap(text, quotes=False) if text.count("**") != 1 else text.replace("**", "").strip()
    if not re.search(r"\w", bare):
        raise RowError("empty answer", f"nothing stands after {marker!r}")
    if len(bare) > MAX_ANSWER:
        raise RowError(
            "answer unclear", f"{len(bare)} characters follow {marker!r}; an answer has {MAX_ANSWER} at most"
        )
    if bare[0] in _EDGE or has_tag(bare):
        raise RowError("answer unclear", f"{bare[:20]!r} follows {marker!r}")
    if bare.rstrip(")） ").endswith(("?", "？", "…", "...")) or _SENTENCE_END.search(bare) or _GOES_ON.search(bare):
        raise RowError("answer unclear", f"more than an answer follows {marker!r}")
    if _ELSEWHERE.match(bare):
        raise RowError("answer unclear", f"{bare[:20]!r} follows {marker!r}")
    if re.match(r"(?:not|n't|never|no longer)\b", bare, re.IGNORECASE) or not _balanced(bare):
        raise RowError("answer unclear", f"{bare[:20]!r} follows {marker!r}")
    return bare


def _balanced(text: str) -> bool:
    """Whether brackets open and close in order; `a)` and half-open intervals pass."""
    if re.fullmatch(r"[\[(][^\[\]()]+,[^\[\]()]+[\])]|\w\)", text):
        return True
    waiting: list[str] = []
    for letter in text:
        if letter in _PAIRS:
            waiting.append(_PAIRS[letter])
        elif letter in _PAIRS.values() and (not waiting or waiting.pop() != letter):
            return False
    return not waiting
