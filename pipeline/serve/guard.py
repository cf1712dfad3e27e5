"""Decides what may be shown of a generation, as a pure function of its whole text and of the reason why it ended.

An answer is released only from text that is UTF-8, was ended by the model itself and keeps the canonical spelling of
one form (`pipeline.serve.forms`). A marker in any other spelling or place withholds it; so do tags of another form and
an answer that copies a long run of its thinking. There is no third outcome.
Finish reason, second markers and copies are known only at the end, so nothing can be shown earlier: `Guard`, the
streaming form, gathers pieces and gives `judge` of their concatenation, whatever the pieces were.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.data.think_form import strip_message
from pipeline.serve.forms.form import Form, Odd
from pipeline.serve.forms.registry import SO8T
from pipeline.serve.text_folding import fold, plain

MAX_BYTES = 1 << 18  # of one generation: some 64,000 tokens
COPY_RUN = 32  # characters in a row that an answer may not share with its thinking, unless a server allows more
COPY_WHOLE = 12  # a thinking shorter than COPY_RUN may not stand whole in the answer from this length on
SEPARATES = "upstream separates the thinking itself: start with --think-form separated"


class TooLong(Exception):
    """A generation grew over `MAX_BYTES`; carries no text."""


@dataclass(frozen=True)
class Verdict:
    """`answer` is all that may be shown (None: nothing); `reason` is for the audit log only."""

    answer: str | None = field(repr=False)
    reason: str
    thinking: bytes = field(repr=False)  # what to account for: the steps, or everything where the answer is withheld


def copies(steps: str, answer: str, *, run: int = COPY_RUN) -> bool:
    """True if the answer shares `run` characters in a row, or a whole shorter thinking, with the steps.

    Compared twice: folded (dashes between the letters do not hide a copy) and with spaces dropped only (arithmetic is
    mostly signs).
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
        reasoning: what an upstream delivered apart from the content.
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
    if "\ufffd" in content + apart:  # somebody upstream has replaced what was not UTF-8
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
    """The streaming form: `feed` pieces of any size, `close` gives `judge` of the whole. Nothing leaves before."""

    def __init__(self, form: Form = SO8T, *, run: int = COPY_RUN) -> None:
        self.form, self.run = form, run
        self._data, self._reasoning, self._mixed = bytearray(), bytearray(), False

    def __len__(self) -> int:
        return len(self._data) + len(self._reasoning)

    def feed(self, piece: bytes, *, reasoning: bool = False) -> None:
        """Take the next bytes, of the content or of what the upstream separates from it.

        Raises:
            TooLong: together they exceed MAX_BYTES; generating on would be wasted.
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
