"""Decide which part of a generation may be shown, as a pure function of its whole text and its finish reason.

An answer is released only if the text is UTF-8, the model itself ended it, and it keeps the canonical spelling of one
form (`pipeline.serve.forms`). It is withheld if a marker has any other spelling or place, if tags of another form
occur, or if the answer copies a long run of the thinking. There is no third outcome.
Finish reason, second markers and copies are known only at the end, so nothing can be shown earlier: `Guard`, the
streaming form, collects pieces of any size and calls `judge` on the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.data.think_form import strip_message
from pipeline.serve.forms.form import Form, Odd
from pipeline.serve.forms.registry import SO8T
from pipeline.serve.text_folding import fold, plain

MAX_BYTES = 1 << 18  # of one generation: some 64,000 tokens
COPY_RUN = 32  # an answer may not share so many characters in a row with its thinking; a server may allow more
COPY_WHOLE = 12  # a thinking of this length up to COPY_RUN may not stand whole in the answer
SEPARATES = "upstream separates the thinking itself: start with --think-form separated"


class TooLong(Exception):
    """A generation grew over `MAX_BYTES`; carries no text."""


@dataclass(frozen=True)
class Verdict:
    """`answer` is all that may be shown (None: nothing); `reason` is for the audit log only."""

    answer: str | None = field(repr=False)
    reason: str
    thinking: bytes = field(repr=False)  # for the log: the steps, or all text if the answer is withheld


def copies(steps: str, answer: str, *, run: int = COPY_RUN) -> bool:
    """Whether the answer shares `run` characters in a row with the steps, or holds a whole shorter thinking.

    The texts are compared twice: folded (so that dashes between letters do not hide a copy), and without spaces only
    (because arithmetic is mostly signs).
    """
    return _shares(fold(steps), fold(answer), run) or _shares(_squeeze(steps), _squeeze(answer), run)


def _squeeze(text: str) -> str:
    return "".join(plain(text).split())


def _shares(source: str, target: str, run: int) -> bool:
    size = min(run, max(COPY_WHOLE, len(source)))
    runs = set(_runs(source, size))
    return any(run in runs for run in _runs(target, size))


def _runs(text: str, size: int) -> Iterator[str]:
    return (text[i : i + size] for i in range(len(text) - size + 1))


def judge(
    data: bytes,
    finish: str | None,
    *,
    form: Form = SO8T,
    reasoning: bytes = b"",
    mixed: bool = False,
    run: int = COPY_RUN,
) -> Verdict:
    """The verdict on a whole generation.

    Args:
        data: the content.
        finish: "stop" only where the model ended its turn itself.
        reasoning: text that an upstream sent apart from the content.
        mixed: some of the reasoning came after the content had begun.
        run: characters in a row that the answer may not share with the thinking.
    """
    everything = reasoning + data
    if finish != "stop":
        return Verdict(None, "not ended by the model", everything)
    if len(everything) > MAX_BYTES:
        return Verdict(None, "too long", everything)
    try:
        content, apart = (strip_message(part.decode("utf-8")) for part in (data, reasoning))
    except UnicodeDecodeError:
        return Verdict(None, "not UTF-8", everything)
    if "\ufffd" in content + apart:  # an upstream has replaced bytes that were not UTF-8
        return Verdict(None, "not UTF-8", everything)
    try:
        parts = form.split(content, apart, mixed=mixed)
    except Odd as odd:
        return Verdict(None, SEPARATES if apart and form.markers else odd.reason, everything)
    if not parts.answer or not (parts.steps or form.may_skip):
        return Verdict(None, "empty part", everything)
    if copies(parts.steps, parts.answer, run=run) or copies(apart, parts.answer, run=run):
        return Verdict(None, "copied run", everything)
    return Verdict(parts.answer, "released", parts.steps.encode())


class Guard:
    """The streaming form: `feed` takes pieces of any size, `close` returns `judge` of the whole."""

    def __init__(self, form: Form = SO8T, *, run: int = COPY_RUN) -> None:
        self.form, self.run = form, run
        self._data, self._reasoning, self._mixed = bytearray(), bytearray(), False

    def __len__(self) -> int:
        return len(self._data) + len(self._reasoning)

    def feed(self, piece: bytes, *, reasoning: bool = False) -> None:
        """Take the next bytes of the content or of the separate reasoning.

        Raises:
            TooLong: content and reasoning together exceed MAX_BYTES, so that more tokens would be useless.
        """
        if reasoning:
            if piece and self._data.strip():
                self._mixed = True
            self._reasoning += piece
        else:
            self._data += piece
        if len(self) > MAX_BYTES:
            raise TooLong

    def close(self, finish: str | None) -> Verdict:
        """The verdict on everything fed so far."""
        content, apart = bytes(self._data), bytes(self._reasoning)
        return judge(content, finish, form=self.form, reasoning=apart, mixed=self._mixed, run=self.run)
