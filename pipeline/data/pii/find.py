"""Find personal and confidential content in text, mask it, and show the shape of a text that holds some.

It finds e-mail, telephone, My Number, corporate number, card, IBAN, IP and postal addresses, keys and tokens, and marks
of confidential papers (社外秘). Rules cannot find names of people: no list of names is complete, and most names are
ordinary words. The search runs on folded text (see `folded_text`); spans refer to the original.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from pipeline.config import PII_KINDS, PiiKind
from pipeline.data.pii.folded_text import fold
from pipeline.data.pii.numbers import check_numbers, ibans, ip_addresses, phones
from pipeline.data.pii.postal_address import addresses
from pipeline.data.pii.secrets import secrets

_LETTER = r"[^\W_]"  # any script, as domains and mailboxes allow; words joined to it in front cannot be told apart
_EMAIL = re.compile(
    r"(?:(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+'-]{1,64}|[^\W\d_A-Za-z]{1,16})"
    r"(?:@|%40|&\#64;|\s?アットマーク\s?|\s?[\[(<{]\s?(?:at|アット(?:マーク)?|@)\s?[\])>}]\s?)"
    rf"(?:(?:{_LETTER}|-){{1,63}}(?:[.。]|\s?[\[({{]\s?(?:dot|ドット)\s?[\])}}]\s?)){{1,8}}[A-Za-z]{{2,24}}(?![A-Za-z0-9])"
    r"|(?<![A-Za-z0-9._-])[A-Za-z0-9._-]{2,64} at (?!(?:the|that|this|an?|any|each) )"
    r"(?:[A-Za-z0-9-]{2,63} dot ){1,4}[A-Za-z]{2,24}(?![A-Za-z0-9])",
    re.IGNORECASE,
)
_AT = re.compile(r"@|%40|&#64;|アット|[\[({<]\s?at| at [A-Za-z0-9-]+ dot ", re.IGNORECASE)  # every address has one
_CONFIDENTIAL = re.compile(
    r"[【\[(〔《<]\s?(?:社外秘|部外秘|関係者外秘|取扱厳重注意|極秘|厳秘|マル秘|機密|confidential|strictly confidential|"
    r"internal use only)\s?[】\])〕》>]|^\s{0,3}(?:社外秘|部外秘|関係者外秘|極秘)\s{0,3}$"
    r"|\b(?:strictly|company|attorney[- ]client)\s+(?:confidential|privileged)\b"
    r"|\bconfidential\s?[-:/]\s?(?:do not|internal)",
    re.IGNORECASE | re.MULTILINE,
)
_DIGITS = re.compile("[0-9]{3}")  # every number kind has three digits in a row


@dataclass(frozen=True)
class Finding:
    """One hit: `text[start:end]` of the text that was searched."""

    kind: PiiKind
    start: int
    end: int


def find(text: str, kinds: Collection[str] = PII_KINDS) -> list[Finding]:
    """Findings in order of their place, without overlaps."""
    folded = fold(text)
    taken: list[Finding] = []  # in order of their place
    for kind, (start, end) in _claims(folded.text):
        if kind in kinds:
            finding = Finding(kind, *folded.span(start, end))
            at = bisect_left(taken, finding.start, key=lambda other: other.start)
            before = at == 0 or taken[at - 1].end <= finding.start
            if before and (at == len(taken) or finding.end <= taken[at].start):
                taken.insert(at, finding)
    return taken


def _claims(text: str) -> Iterator[tuple[PiiKind, tuple[int, int]]]:
    for span in secrets(text):
        yield "secret", span
    if _AT.search(text):
        for match in _EMAIL.finditer(text):
            yield "email", match.span()
    if _DIGITS.search(text):
        for span in ibans(text):
            yield "iban", span
        for kind, span in check_numbers(text):
            yield kind, span  # type: ignore[misc]  # its kinds are three of ours
        for span in phones(text):
            yield "phone", span
    if text.count(".") >= 3 or text.count(":") >= 2:
        for span in ip_addresses(text):
            yield "ip", span
    for span in addresses(text):
        yield "address", span
    for match in _CONFIDENTIAL.finditer(text):
        yield "confidential", match.span()


def mask(text: str, findings: Collection[Finding]) -> str:
    """`text` with its kind in brackets in place of each finding; `findings` are `find(text)`."""
    out, position = [], 0
    for finding in findings:
        out += [text[position : finding.start], f"[{finding.kind}]"]
        position = finding.end
    return "".join([*out, text[position:]])


def sample(text: str, findings: Collection[Finding], *, width: int = 80) -> str:
    """The shape of `text` for a report: each finding by its kind, letters as x, digits as 9, kana and kanji as 〇.

    Names may stand beside a finding, so the words around it are as private as the finding itself.
    """
    out, position = [], 0
    for finding in findings:
        out += [_shape(text[position : finding.start]), f"[{finding.kind}]"]
        position = finding.end
    shown = " ".join("".join([*out, _shape(text[position : position + width])]).split())
    return shown if len(shown) <= width else shown[: width - 3] + "..."


def _shape(text: str) -> str:
    return "".join(map(_shape_of, text))


def _shape_of(letter: str) -> str:
    category = unicodedata.category(letter)
    if category[0] == "N":
        return "9"
    if category[0] == "Z" or letter in "\n\t":
        return " "
    if category[0] in "LM":
        return "〇" if letter >= "\u2e80" else "x"
    return letter if category[0] == "P" else "*"
