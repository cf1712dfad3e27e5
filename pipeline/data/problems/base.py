"""The interface of a problem family: a finite list of cases, prompts in each language, and a worked solution.

A family's rows are cases x phrasings, so that the number of distinct rows is exact. `solve(language, *case)` returns
the prompt's slots, the steps and the canonical answer. Held-out families are similar to trained families (the same
area, another operation or direction), and training never sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Case = tuple[Any, ...]
LANGUAGES = ("ja", "en")


@dataclass(frozen=True)
class Solution:
    """`slots` fill the prompt template; `steps` are 1-4 short lines; `answer` is the canonical answer string."""

    slots: Mapping[str, object]
    steps: str
    answer: str


@dataclass(frozen=True)
class Family:
    """One kind of problem; `phrasings[language]` are `str.format` templates over the solution's slots."""

    name: str
    area: str
    heldout: bool
    cases: tuple[Case, ...]
    phrasings: Mapping[str, tuple[str, ...]]
    solve: Callable[..., Solution]

    def count(self, language: str) -> int:
        """Number of distinct rows in one language."""
        return len(self.cases) * len(self.phrasings[language])

    def row(self, language: str, number: int) -> tuple[str, str, str]:
        """(prompt, steps, answer) of row `number`, 0 <= number < count(language)."""
        case, phrasing = divmod(number, len(self.phrasings[language]))
        solution = self.solve(language, *self.cases[case])
        return self.phrasings[language][phrasing].format(**solution.slots), solution.steps, solution.answer


def add_steps(a: int, b: int) -> str:
    """`a + b` by tens, then ones: one line, or two where both exist."""
    tens, ones = b // 10 * 10, b % 10
    if not tens or not ones:
        return f"{a} + {b} = {a + b}"
    return f"{a} + {tens} = {a + tens}\n{a + tens} + {ones} = {a + b}"


def subtract_steps(a: int, b: int) -> str:
    """`a - b` by tens, then ones: one line, or two where both exist."""
    tens, ones = b // 10 * 10, b % 10
    if not tens or not ones:
        return f"{a} - {b} = {a - b}"
    return f"{a} - {tens} = {a - tens}\n{a - tens} - {ones} = {a - b}"
