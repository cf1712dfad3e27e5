"""What of a generation may be shown: a pure function of its whole text and of why it ended.

Narrow to open: UTF-8, ended by the model itself, first line `# 思考ステップ`, exactly one line `# 最終回答`, both parts
non-empty. Wide to close: after `fold` each marker's words occur once in the whole text, so `##`, bold, full-width,
half-width, zero-width, decomposed or split variants, and a mention in prose, withhold; so do `<think>` tags and an
answer that copies a long run of its thinking. Everything else is withheld: there is no third outcome.
Finish reason, second markers and copies are known only at the end, so nothing can be shown earlier: `Guard`, the
streaming form, gathers pieces and gives `judge` of their concatenation, whatever the pieces were.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.data.think_form import ANSWER_MARKER, THINK_MARKER, strip_message

MAX_BYTES = 1 << 18  # of one generation: some 64,000 tokens
COPY_RUN = 32  # characters in a row that an answer may not share with its thinking
COPY_WHOLE = 12  # a thinking shorter than COPY_RUN may not stand whole in the answer from this length on

_FILLERS = {0x115F: None, 0x1160: None}  # Hangul fillers: letters by category, invisible on the screen
_WORDS = re.compile(r"[^\W_]+")
_TAG = re.compile(
    r"<[^\w<]*(?:think|thought|reasoning)"
)  # from the last `<`: from each one, time grows with the square
_STRETCH = re.compile("(?s).{1,128}")


class TooLong(Exception):
    """A generation grew over `MAX_BYTES`; carries no text."""


@dataclass(frozen=True)
class Verdict:
    """`answer` is all that may be shown (None: nothing); `reason` is for the audit log only."""

    answer: str | None = field(repr=False)
    reason: str
    thinking: bytes = field(repr=False)  # what to account for: the steps, or everything where the answer is withheld


def fold(text: str) -> str:
    """Letters and digits as one sees them: NFKD, case folded; marks, spaces, punctuation and invisibles dropped."""
    return "".join(_WORDS.findall(_plain(text)))


def _plain(text: str) -> str:
    # Stretch by stretch: a run of combining marks is put in order in the square of its length.
    decomposed = "".join(unicodedata.normalize("NFKD", stretch) for stretch in _STRETCH.findall(text))
    return decomposed.casefold().translate(_FILLERS)


_MARKER_WORDS = (fold(THINK_MARKER), fold(ANSWER_MARKER))


def copies(steps: str, answer: str) -> bool:
    """True if the answer shares COPY_RUN characters in a row, or a whole short thinking, with the steps.

    Compared twice: folded (dashes between the letters do not hide a copy) and with spaces dropped only (arithmetic is
    mostly signs).
    """
    return _shares(fold(steps), fold(answer)) or _shares(_squeeze(steps), _squeeze(answer))


def _squeeze(text: str) -> str:
    return "".join(_plain(text).split())


def _shares(source: str, target: str) -> bool:
    size = min(COPY_RUN, max(COPY_WHOLE, len(source)))
    runs = set(_runs(source, size))
    return any(run in runs for run in _runs(target, size))


def _runs(text: str, size: int) -> Iterator[str]:
    return (text[i : i + size] for i in range(len(text) - size + 1))


def judge(data: bytes, finish: str | None) -> Verdict:
    """The verdict on a whole generation; `finish` is "stop" only where the model ended its turn itself."""
    if finish != "stop":
        return Verdict(None, "not ended by the model", data)
    if len(data) > MAX_BYTES:
        return Verdict(None, "too long", data)
    try:
        text = strip_message(data.decode("utf-8"))
    except UnicodeDecodeError:
        return Verdict(None, "not UTF-8", data)
    if "\ufffd" in text:  # somebody upstream has replaced what was not UTF-8
        return Verdict(None, "not UTF-8", data)
    lines = text.split("\n")
    if lines[0] != THINK_MARKER:
        return Verdict(None, "thinking marker not first", data)
    if lines.count(ANSWER_MARKER) != 1:
        return Verdict(None, "answer marker missing or repeated", data)
    folded = fold(text)
    if any(folded.count(words) != 1 for words in _MARKER_WORDS) or _TAG.search(_plain(text)):
        return Verdict(None, "odd marker", data)
    border = lines.index(ANSWER_MARKER)
    steps, answer = strip_message("\n".join(lines[1:border])), strip_message("\n".join(lines[border + 1 :]))
    if not steps or not answer:
        return Verdict(None, "empty part", data)
    if copies(steps, answer):
        return Verdict(None, "copied run", data)
    return Verdict(answer, "released", steps.encode())


class Guard:
    """The streaming form: `feed` pieces of any size, `close` gives `judge` of the whole. Nothing leaves before."""

    def __init__(self) -> None:
        self._data = bytearray()

    def __len__(self) -> int:
        return len(self._data)

    def feed(self, piece: bytes) -> None:
        """Take the next bytes.

        Raises:
            TooLong: together they exceed MAX_BYTES; generating on would be wasted.
        """
        self._data += piece
        if len(self._data) > MAX_BYTES:
            raise TooLong

    def close(self, finish: str | None) -> Verdict:
        """The verdict on everything fed so far."""
        return judge(bytes(self._data), finish)
