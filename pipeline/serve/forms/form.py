"""The interface of a form of thinking: it has to take a whole generation apart, or to say why it cannot.

`split` accepts one spelling of a form's markers, each where it belongs. A marker of any form, in any spelling,
elsewhere in the text raises `Odd`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


class Odd(Exception):
    """The generation is not in the form; `reason` is one of a few fixed words, for the audit log."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Parts:
    """Thinking and answer, both stripped."""

    steps: str = field(repr=False)
    answer: str = field(repr=False)


class Form(Protocol):
    """One way in which a model writes its thinking."""

    @property
    def name(self) -> str:
        """The name that `--think-form` takes."""

    @property
    def markers(self) -> tuple[str, ...]:
        """The canonical markers; where a vocabulary has them as control tokens, the engine lets them through."""

    @property
    def instructs(self) -> bool:
        """Whether the shared system message asks the model for this form."""

    @property
    def may_skip(self) -> bool:
        """Whether an empty thinking is in the form: hybrid models write an empty block where they need none."""

    def split(self, content: str, reasoning: str, *, mixed: bool) -> Parts:
        """Take a stripped generation apart.

        Args:
            reasoning: what an upstream delivered apart from the content; empty where it does no such thing.
            mixed: some of the reasoning came after the content had begun.

        Raises:
            Odd: the generation is not in the form.
        """
