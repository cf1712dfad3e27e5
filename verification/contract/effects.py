"""Tokenizer keys that are written differently but have the same effect in llama.cpp.

Older converters and other makers' converters write special ids that are the default, omit flags, or store the lists
of another tokenizer class. Such a difference is harmless if llama.cpp, with either file, has the same pieces and flags
for every token, has the same special ids, adds the same tokens, and gives the same ids for the adversarial texts and
for texts made of every piece. Lists of the *same* class that differ (a merge, a score, a token) stay faults: no finite
text shows the effect of every merge.
"""

from __future__ import annotations

from collections.abc import Sequence

from verification.contract.finding import Finding
from verification.contract.tokens import PLAIN
from verification.engines.child import ChildDied
from verification.engines.sandbox import Vocabulary
from verification.gguf.reader import GGUFFile

_CLASS = "tokenizer.ggml.model"
_LISTS = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "scores", "merges"))
_TEMPLATES = ("tokenizer.chat_template", "tokenizer.ggml.chat_template")  # compared as text by `chat`


def written_otherwise(
    findings: Sequence[Finding], file: GGUFFile, oracle: GGUFFile
) -> tuple[list[Finding], list[Finding]]:
    """Split the findings of `metadata.against_oracle` into (faults, notes on harmless differences of writing).

    Args:
        oracle: the conversion of the reference, or its metadata alone.
    """
    other_class = file.metadata.get(_CLASS) != oracle.metadata.get(_CLASS)
    open_ones = [finding for finding in findings if _by_effect(finding.where, other_class=other_class)]
    if not open_ones or not _behave_alike(file, oracle):
        return list(findings), []
    notes = [
        Finding(f.where, f.expected, f.found, "nothing: llama.cpp does the same with both", "written otherwise")
        for f in open_ones
    ]
    return [finding for finding in findings if finding not in open_ones], notes


def _by_effect(where: str, *, other_class: bool) -> bool:
    """Whether llama.cpp's behaviour shows every effect of a key."""
    if not where.startswith("tokenizer.") or where.startswith(_TEMPLATES):
        return False
    return other_class or not where.startswith(_LISTS)


def _behave_alike(file: GGUFFile, oracle: GGUFFile) -> bool:
    try:
        with Vocabulary(file.path) as one, Vocabulary(oracle.path) as other:
            return not one.refused and not other.refused and one.effects(PLAIN) == other.effects(PLAIN)
    except ChildDied:
        return False
