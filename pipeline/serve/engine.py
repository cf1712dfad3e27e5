"""The interface between server and engine, and the error of an engine that failed.

An engine gets a whole conversation and returns one generation in pieces of bytes. A failure carries a fixed word, never
text of a generation, a prompt or another program's message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pipeline.data.think_form import Message
from pipeline.serve.forms.form import Form


class Feed(Protocol):
    """Takes the pieces of a generation: of its content, or of the reasoning that an upstream sends separately."""

    def __call__(self, piece: bytes, /, *, reasoning: bool = False) -> None: ...


class EngineError(Exception):
    """A generation failed; `kind` is one of a few fixed words, `busy` means that a later try may succeed."""

    def __init__(self, kind: str, *, busy: bool = False) -> None:
        super().__init__(kind)
        self.kind, self.busy = kind, busy


@dataclass(frozen=True)
class Job:
    """One conversation to answer, with the client's sampling options."""

    messages: list[Message]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


class Engine(Protocol):
    """A model that answers; safe to call from one event loop."""

    model_id: str  # the model's name for clients
    digest: str  # the model's name in the audit log
    form: Form  # the model's form of thinking
    quick: bool  # `check` is fast; otherwise it is run in a thread

    def check(self, messages: list[Message]) -> int | None:
        """Tokens of the prompt (None: unknown). Raises `Refusal` if the prompt is too long or has control tokens."""

    def count(self, text: str) -> int | None:
        """Tokens of a text, None where no tokenizer is known."""

    def cut(self, text: str, limit: int) -> str:
        """The text's first `limit` tokens; raises `Refusal` where no tokenizer is known."""

    async def generate(self, job: Job, feed: Feed) -> str | None:
        """Feed the generation's bytes; return why it ended: "stop" where the model ended its turn, else another word.

        Cancelling the task ends the generation. Raises `EngineError` and every error of `feed`.
        """

    async def close(self) -> None:
        """Free the engine's resources."""
