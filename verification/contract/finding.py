"""A finding of a check without inference: one disagreement, with its place and the action to take.

A check returns a list of findings; an empty list is agreement. `where` is the key, tensor, token or fixture, so that a
fault is named and not only counted. `as_check` turns a list into a check of the report, a count that must be zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from verification.gate.check import zero_check
from verification.gate.report import Check

# kinds of fault that a program may act on; "" if no kind was recognised
Code = Literal[
    "",
    "flipped_bit",
    "row_order",  # the reference's rows in another order
    "head_rows",  # the permutation of q or k rows is doubled or missing
    "f16_overflow",
    "rotation",  # missing, doubled, transposed, on the wrong side, or left over
    "merge",  # the change from the base missing, doubled or scaled
    "transposed",
    "unexplained_tensor",  # in the file, and not explained by the reference
]


class Cause(NamedTuple):
    """The kind of a fault, in words and as a code for programs."""

    words: str
    code: Code


@dataclass(frozen=True)
class Finding:
    """One disagreement between a file and its expected contents."""

    where: str  # "llama.rope.freq_base", "blk.3.attn_output.weight", "token 2", "chat 1"
    expected: str
    found: str
    action: str = ""  # what to do about it
    cause: str = ""  # the kind of fault if recognised: "rotation applied twice"
    code: Code = ""  # the kind of fault, for programs

    @property
    def sentence(self) -> str:
        """ "llama.rope.freq_base: expected 100000.0, found 10000.0"."""
        named = f" ({self.cause})" if self.cause else ""
        return f"{self.where}: expected {self.expected}, found {self.found}{named}"


def as_check(name: str, title: str, findings: Sequence[Finding], *, subject: str) -> Check:
    """A check that the number of findings is zero; it shows the first three, and the code and place of the first."""
    return zero_check(
        name,
        title,
        len(findings),
        subject=subject,
        detail=writable("; ".join(finding.sentence for finding in findings[:3])),
        code=findings[0].code if findings else "",
        where=writable(findings[0].where) if findings else "",
    )


def writable(text: str) -> str:
    """A text (a file's name, a token) with its non-UTF-8 bytes spelled out, so that JSON can hold it."""
    return text.encode("utf-8", "backslashreplace").decode()


def show(value: Any, limit: int = 60) -> str:
    """A value for a person: lists by their length, texts cut."""
    if value is None:
        return "nothing"
    if isinstance(value, list):
        return f"a list of {len(value)}" if len(value) > 8 else repr(value)
    text = f"{value:.8g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
