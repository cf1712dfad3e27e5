"""What a check without inference found: one disagreement, named so that a person can act on it.

A check returns a list of findings; an empty list is agreement. `where` is the key, tensor, token or fixture, so that a
fault is named and not only counted. `as_check` turns a list into the report's form, a count that must be zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from verification.gate.check import zero_check
from verification.gate.report import Check


@dataclass(frozen=True)
class Finding:
    """One disagreement between a file and what it should be."""

    where: str  # "llama.rope.freq_base", "blk.3.attn_output.weight", "token 2", "chat 1"
    expected: str
    found: str
    action: str = ""  # what to do about it
    cause: str = ""  # the kind of fault where it was recognised: "rotation applied twice"

    @property
    def sentence(self) -> str:
        """ "llama.rope.freq_base: expected 100000.0, found 10000.0"."""
        named = f" ({self.cause})" if self.cause else ""
        return f"{self.where}: expected {self.expected}, found {self.found}{named}"


def as_check(name: str, title: str, findings: Sequence[Finding], *, subject: str) -> Check:
    """The number of findings, which must be zero, with the first three in words."""
    return zero_check(
        name,
        title,
        len(findings),
        subject=subject,
        detail=writable("; ".join(finding.sentence for finding in findings[:3])),
    )


def writable(text: str) -> str:
    """A text with bytes that are not UTF-8 (of a file's name, of a token) spelled out, so that JSON can hold it."""
    return text.encode("utf-8", "backslashreplace").decode()


def show(value: Any, limit: int = 60) -> str:
    """A value for a person: lists by their length, texts cut."""
    if value is None:
        return "nothing"
    if isinstance(value, list):
        return f"a list of {len(value)}" if len(value) > 8 else repr(value)
    text = f"{value:.8g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
