"""The interface of a form of thinking: it splits a whole generation into thinking and answer, or says why it cannot.

`split` accepts one spelling of a form's markers, each in its place. A marker of any form, in any spelling, elsewhere in
the text raises `Odd`.
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
        """The canonical markers; if they are control tokens of a vocabulary, the engine does not refuse them."""

    @property
    def instructs(self) -> bool:
        """Whether the shared system message asks the model for this form."""

    @property
    def may_skip(self) -> bool:
        """Whether the thinking may be empty: hybrid models write an empty block if they need no thinking."""

    def split(self, content: str, reasoning: str, *, mixed: bool) -> Parts:
        """Split a stripped generation into thinking and answer.

        Args:
            reasoning: text that an upstream sent apart from the content; otherwise empty.
            mixed: some of the reasoning came after the content had begun.

        Raises:
            Odd: the generation is not in the form.
        """
